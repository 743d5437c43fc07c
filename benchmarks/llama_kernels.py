"""Where llama.cpp's time goes on this machine: weights by batch size, and cells by attention kernel.

    python benchmarks/llama_kernels.py            # both tables, about five minutes
    python benchmarks/llama_kernels.py --weights  # prefill tokens/s by quantisation and batch
    python benchmarks/llama_kernels.py --cells    # milliseconds a decoded token by cells held

Variants of one row take turns, so that drift of the machine hits all alike. Writes results/llama_kernels.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import llama_cpp
import numpy as np
from inference import ROOT, console
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anchorkv.engines.llama import LlamaEngine
from anchorkv.engines.llama_file import fast_copy
from anchorkv.evaluate.environment import environment
from anchorkv.models import builtin

WEIGHTS = {"Q4_1": None, "Q4_0": 2, "Q8_0": 7, "F16": 1, "BF16": 32, "F32": 0}
BATCHES = (1, 16, 32, 64, 128, 512)
CELLS = (16, 45, 128, 234, 300, 480, 700, 1000, 2000, 4000, 8000)
KERNELS = {"no flash, f16": (False, "f16"), "flash, f16": (True, "f16"), "flash, q8_0": (True, "q8_0")}
random = np.random.default_rng(0)


def some_tokens(count: int) -> list[int]:
    return [int(token) for token in random.integers(300, 40_000, count)]


def by_weights(folder: Path) -> list[dict[str, Any]]:
    engines = {}
    for name, kind in WEIGHTS.items():
        path = builtin() if kind is None else folder / f"{name}.gguf"
        if kind is not None:
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype, params.allow_requantize = kind, True
            llama_cpp.llama_model_quantize(str(builtin()).encode(), str(path).encode(), ctypes.byref(params))
        engines[name] = LlamaEngine.load(path, weights="as-is", cells=768)
    rows = []
    for batch in track(BATCHES, "weights", console=console, transient=True):
        spent: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(4):
            for name, engine in engines.items():
                memory = engine.open()
                tokens = some_tokens(batch)
                started = time.perf_counter()
                memory.decode(tokens, 0)
                spent[name].append(time.perf_counter() - started)
                memory.close()
        rows.append({"batch": batch, **{name: batch / median(values[1:]) for name, values in spent.items()}})
    return rows


def by_cells() -> list[dict[str, Any]]:
    path = fast_copy(builtin())
    engines = {
        name: LlamaEngine.load(path, cells=CELLS[-1] + 64, flash_attention=flash, kv_type=kind)
        for name, (flash, kind) in KERNELS.items()
    }
    memories = {name: engine.open() for name, engine in engines.items()}
    rows, held = [], 0
    for cells in track(CELLS, "cells", console=console, transient=True):
        tokens = some_tokens(cells - held)
        for memory in memories.values():
            memory.decode(tokens, held, logits=False)
        held = cells
        spent: dict[str, list[float]] = {name: [] for name in memories}
        for _ in range(12):
            for name, memory in memories.items():
                # The first decode warms the caches for this variant, the second counts.
                for count in (0, 1):
                    started = time.perf_counter()
                    memory.decode(some_tokens(1), held)
                    if count:
                        spent[name].append(1000 * (time.perf_counter() - started))
                    memory.drop(np.asarray([held]))
        rows.append({"cells": cells, **{name: median(values) for name, values in spent.items()}})
    return rows


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for value in row.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--cells", action="store_true")
    options = parser.parse_args()
    both = not (options.weights or options.cells)
    target = ROOT / "results" / "llama_kernels.json"
    result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    if options.weights or both:
        with tempfile.TemporaryDirectory() as folder:
            result["prefill_tokens_per_second"] = by_weights(Path(folder))
        show("prefill tokens/s by weights", result["prefill_tokens_per_second"])
    if options.cells or both:
        result["decode_milliseconds"] = by_cells()
        show("milliseconds a decoded token by cells held", result["decode_milliseconds"])
    result["environment"] = environment()
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
