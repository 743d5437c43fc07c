"""Speed and memory: anchored against the full cache, side by side in one process.

    python benchmarks/inference.py                      # llama.cpp at 1k … 32k, PyTorch at 8k, resident memory
    python benchmarks/inference.py --contexts 1024 --engines llama

Both sides read the same tokens in alternating slices, so that a noisy machine slows both; decoding alternates in bursts
and the ratio of medians counts. The full side gets its best settings: flash attention on and off, f16 and q8_0 cells,
batches of 128, 512 and 2,048, each tried, the fastest kept for prefill and for decode separately. Writes
results/inference.json.
"""

from __future__ import annotations

import argparse
import inspect
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

import anchorkv
from anchorkv.engines.base import Engine
from anchorkv.evaluate.environment import environment
from anchorkv.session import Session

ROOT = Path(__file__).resolve().parent.parent
SLICE, BURST, ROUNDS = 512, 12, 5
DOUBLE_FROM = 16384
"""Longer contexts of the full side are not read but made by holding these cells twice: decode asks only how many."""
console = Console(stderr=True)


@dataclass
class Row:
    """One context length on one engine. Speeds in tokens/s; ratios are anchored / full."""

    engine: str
    policy: str
    context: int
    weights: str
    prefill_full: float
    prefill_anchored: float
    prefill_ratio: float
    decode_full: float
    decode_anchored: float
    decode_ratio: float
    kept_cells: int
    peak_cells: int
    full_cells: int
    full_settings: str
    note: str = ""


class Side(Protocol):
    """Something that reads slices of one stream and then decodes."""

    label: str

    def read(self, tokens: Sequence[int]) -> None: ...

    def decode(self, tokens: Sequence[int]) -> None:
        """Read one token at a time, as generation does."""

    def close(self) -> None: ...


class Anchored:
    """The package's own session."""

    def __init__(self, engine: Engine, policy: str) -> None:
        self.label = policy
        self.session = Session(engine, anchorkv.preset(policy))

    def read(self, tokens: Sequence[int]) -> None:
        self.session.read(tokens, logits=False)

    def decode(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.session.read([token])

    def close(self) -> None:
        self.session.close()


class StockLlama:
    """llama.cpp as it is: one sequence, everything kept."""

    def __init__(self, path: Path, cells: int, flash: bool, kv_type: str, batch: int) -> None:
        from anchorkv.engines.llama import LlamaEngine

        self.label = f"{'flash' if flash else 'no flash'}, {kv_type} cells, batch {batch}"
        self.engine = LlamaEngine(path, cells=cells, flash_attention=flash, kv_type=kv_type, batch=batch, sessions=2)
        self.memory = self.engine.open()
        self.at = 0

    def read(self, tokens: Sequence[int]) -> None:
        self.memory.decode(tokens, self.at, logits=False)
        self.at += len(tokens)

    def decode(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.memory.decode([token], self.at)
            self.at += 1

    def double(self) -> None:
        """Hold every cell twice, the copies at the positions that follow (decode speed does not ask what cells say)."""
        state = self.memory.state()
        positions, blob = state["positions"], state["cells"]
        head, each = 16, 12
        for index, position in enumerate(positions.tolist()):
            blob[head + each * index : head + each * index + 4] = memoryview((position + self.at).to_bytes(4, "little"))
        other = self.engine.restore({"positions": positions + self.at, "cells": blob})
        self.engine.merge(other, self.memory)
        self.at *= 2

    def close(self) -> None:
        self.memory.close()
        self.engine.close()


class StockTorch:
    """transformers with its own dynamic cache."""

    def __init__(self, engine: Any) -> None:
        from transformers import DynamicCache

        from anchorkv.engines.torch_model import cache_argument

        self.label = "transformers DynamicCache, sdpa"
        self.model, self.cache = engine.model, DynamicCache()
        self.cache_argument = cache_argument(frozenset(inspect.signature(self.model.forward).parameters))

    def read(self, tokens: Sequence[int]) -> None:
        import torch

        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=self.model.device)
            self.model(input_ids=ids, logits_to_keep=1, use_cache=True, **{self.cache_argument: self.cache})

    def decode(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.read([token])

    def close(self) -> None:
        self.cache = None


def document_tokens(engine: Engine, count: int, data: Path | None) -> list[int]:
    """`count` tokens of a real text: --data (a text file) or the shipped example, repeated as often as it takes."""
    path = data or next(ROOT.glob("examples/*.txt"))
    tokens = engine.tokenizer.encode(path.read_text(encoding="utf-8"))
    return (tokens * (count // len(tokens) + 1))[:count]


def paired_prefill(sides: Sequence[Side], tokens: Sequence[int], slice_: int = SLICE) -> list[float]:
    """Seconds that each side took, slice by slice in turn."""
    spent = [0.0] * len(sides)
    for first in track(range(0, len(tokens), slice_), f"prefill {len(tokens):,}", console=console, transient=True):
        for index, side in enumerate(sides):
            started = time.perf_counter()
            side.read(tokens[first : first + slice_])
            spent[index] += time.perf_counter() - started
    return spent


def paired_decode(sides: Sequence[Side], tokens: Sequence[int]) -> list[float]:
    """Median seconds a token of each side, in alternating bursts; the first burst warms up."""
    spent: list[list[float]] = [[] for _ in sides]
    for burst in range(ROUNDS + 1):
        part = tokens[burst * BURST : (burst + 1) * BURST]
        for index, side in enumerate(sides):
            started = time.perf_counter()
            side.decode(part)
            if burst:
                spent[index].append((time.perf_counter() - started) / len(part))
    return [median(values) for values in spent]


def llama_rows(contexts: Sequence[int], policies: Sequence[str], data: Path | None) -> Iterator[Row]:
    """One stream per side, read on from context to context, so that each length is measured and none is read twice."""
    from anchorkv.engines.llama_file import fast_copy
    from anchorkv.models import builtin

    contexts = sorted(contexts)
    path, room = fast_copy(builtin()), BURST * (ROUNDS + 1)
    most = max((context for context in contexts if context <= DOUBLE_FROM), default=contexts[-1])
    cells = (2 * most if contexts[-1] > most else most) + len(contexts) * room + 512
    settings = [
        (True, "f16", 128), (False, "f16", 128), (True, "f16", 512), (False, "f16", 512), (True, "q8_0", 128),
        (False, "f16", 2048),
    ]
    # A context of its own for each policy: sessions of one context pay for each other's cells.
    models = [anchorkv.load() for _ in policies]
    weights = models[0].engine.info.weights
    anchored = [Anchored(model.engine, policy) for model, policy in zip(models, policies, strict=True)]
    full = [StockLlama(path, cells, *setting) for setting in settings]
    tokens = document_tokens(models[0].engine, contexts[-1] + room, data)
    spent: dict[str, float] = {}
    reached, best_decoding = 0, full[0]
    for context in contexts:
        note = ""
        if context > most:
            full = [best_decoding]
            best_decoding.double()
            note = f"full side: decodes over {best_decoding.at // 2:,} tokens' cells held twice; prefill to {most:,}"
        sides: list[Side] = [*anchored] if note else [*anchored, *full]
        for side, seconds in zip(sides, paired_prefill(sides, tokens[reached:context], 2048), strict=True):
            spent[side.label] = spent.get(side.label, 0.0) + seconds
        reached = context
        figures = [side.session.accounting() for side in anchored]
        pace = paired_decode([*anchored, *full], tokens[context : context + room])
        best_prefill = min(full, key=lambda side: spent[side.label])
        best_decoding, decode = min(zip(full, pace[len(anchored) :], strict=True), key=lambda pair: pair[1])
        prefill_full = (most if note else context) / spent[best_prefill.label]
        for side, found, seconds in zip(anchored, figures, pace, strict=False):
            prefill = context / spent[side.label]
            yield Row(
                "llama", side.label, context, weights, prefill_full, prefill, prefill / prefill_full, 1 / decode,
                1 / seconds, decode / seconds, found.kept_cells, found.peak_cells, context,
                f"prefill: {best_prefill.label}; decode: {best_decoding.label}", note,
            )
        if context >= 4096:  # by now the slower settings have shown themselves
            for side in full:
                if side not in (best_prefill, best_decoding):
                    side.close()
            full = list({id(side): side for side in (best_prefill, best_decoding)}.values())
    for side in [*anchored, *full]:
        side.close()
    for model in models:
        model.close()


def torch_rows(contexts: Sequence[int], policies: Sequence[str], data: Path | None) -> Iterator[Row]:
    for context in contexts:
        model = anchorkv.load(engine="torch")
        tokens = document_tokens(model.engine, context + BURST * (ROUNDS + 1), data)
        for policy in policies:
            full, anchored = StockTorch(model.engine), Anchored(model.engine, policy)
            spent = paired_prefill([anchored, full], tokens[:context], 2048)
            pace = paired_decode([anchored, full], tokens[context:])
            figures = anchored.session.accounting()
            yield Row(
                "torch", policy, context, model.engine.info.weights, context / spent[1], context / spent[0],
                spent[1] / spent[0], 1 / pace[1], 1 / pace[0], pace[1] / pace[0], figures.kept_cells,
                figures.peak_cells, figures.full_cells, full.label,
            )
            anchored.close()
        model.close()


def resident(context: int, policy: str, data: Path | None) -> dict[str, int]:
    """Resident bytes of this process after reading `context` tokens, and at the peak. "none" reads nothing."""
    from anchorkv.engines.llama import LlamaEngine
    from anchorkv.models import builtin

    cells = {"full": context + 256, "none": 256}.get(policy, 1024)
    engine = LlamaEngine.load(builtin(), cells=cells)
    process, kept = psutil.Process(), 0
    if policy == "none":
        engine.open().decode(engine.tokenizer.encode("One segment to warm the buffers for a batch up. " * 40), 0)
    else:
        session = Session(engine, anchorkv.preset(policy))
        session.read(document_tokens(engine, context, data))
        kept = session.accounting().kept_bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"after": process.memory_info().rss, "peak": peak, "kept_bytes": kept, "allocated": engine.allocated_bytes()}


def resident_of_both(context: int, policy: str, data: Path | None) -> dict[str, Any]:
    """`resident` of the policy, of the full cache and of the model alone, each in a process of its own."""
    found: dict[str, Any] = {"context": context, "policy": policy}
    for name, side in ((policy, "anchored"), ("full", "full"), ("none", "model")):
        command = [sys.executable, __file__, "--resident-of", name, "--contexts", str(context)]
        if data:
            command += ["--data", str(data)]
        found[side] = json.loads(subprocess.check_output(command))
    base = found["model"]["after"] - found["model"]["allocated"]
    above = {side: found[side]["peak"] - base for side in ("anchored", "full")}
    found["above_model"], found["ratio"] = above, above["full"] / max(1, above["anchored"])
    return found


def write_results(path: Path, **parts: Any) -> None:
    """`parts` and the machine that they were measured on, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**parts, "environment": environment()}, indent=2) + "\n", encoding="utf-8")


def show(rows: Sequence[Row], memory: dict[str, Any] | None) -> None:
    table = Table(title="anchored / full cache, side by side")
    headings = "engine,policy,context,prefill t/s,ratio,decode t/s,ratio,kept,peak,full"
    for heading in headings.split(","):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.engine} {row.weights}", row.policy, f"{row.context:,}",
            f"{row.prefill_anchored:.0f} / {row.prefill_full:.0f}", f"[bold]{row.prefill_ratio:.2f}x",
            f"{row.decode_anchored:.1f} / {row.decode_full:.1f}", f"[bold]{row.decode_ratio:.2f}x",
            f"{row.kept_cells:,} ({row.full_cells / row.kept_cells:.1f}x)",
            f"{row.peak_cells:,} ({row.full_cells / row.peak_cells:.1f}x)", f"{row.full_cells:,}",
        )
    Console().print(table)
    if memory:
        above = {side: f"{size / 2**20:.0f} MiB" for side, size in memory["above_model"].items()}
        Console().print(
            f"Peak resident memory above the model itself, {memory['context']:,} tokens: "
            f"anchored {above['anchored']}, full cache {above['full']} ({memory['ratio']:.1f}x)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="1024,4096,8192,16384,32768")
    parser.add_argument("--torch-contexts", default="8192")
    parser.add_argument("--policies", default="default,sepllm")
    parser.add_argument("--engines", default="llama,torch")
    parser.add_argument("--data", type=Path, help="a text file to read instead of the shipped example")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "inference.json")
    parser.add_argument("--resident-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    contexts = [int(value) for value in options.contexts.split(",")]
    if options.resident_of:
        print(json.dumps(resident(contexts[0], options.resident_of, options.data)))
        return
    policies, engines = options.policies.split(","), options.engines.split(",")
    rows: list[Row] = []
    memory = resident_of_both(8192, "default", options.data) if "llama" in engines else None
    sources = []
    if "llama" in engines:
        sources.append(llama_rows(contexts, policies, options.data))
    if "torch" in engines:
        torch_contexts = [int(value) for value in options.torch_contexts.split(",")]
        sources.append(torch_rows(torch_contexts, policies[:1], options.data))
    for source in sources:
        for row in source:
            rows.append(row)
            show([row], None)
            write_results(options.out, rows=[asdict(r) for r in rows], memory=memory)
    show(rows, memory)


if __name__ == "__main__":
    main()
