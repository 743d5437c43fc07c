"""Should a trained adapter be merged into the weights, or loaded beside them by llama.cpp?

    python benchmarks/adapter_loading.py                 # the shipped adapter
    python benchmarks/adapter_loading.py --adapter DIR   # any LoRA adapter of the built-in model

The same Q8_0 weights, with the adapter merged in, with it loaded at run time (llama_set_adapters_lora), and without it;
batches take turns. Writes results/adapter_loading.json.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import llama_cpp
import numpy as np
from inference import ROOT, console, write_results
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anchorkv.adapter import read_adapter
from anchorkv.engines.llama import LlamaEngine
from anchorkv.engines.llama_file import fast_copy
from anchorkv.export import merge
from anchorkv.gguf_merge import in_order
from anchorkv.ggufheader import read_header
from anchorkv.models import DEFAULT, builtin
from anchorkv.shipped import adapter_folder

BATCHES = (1, 32, 128)
ROUNDS = 8


def write_lora(folder: Path, base: Path, out: Path) -> None:
    """The adapter as llama.cpp loads it."""
    header = read_header(base)
    architecture = str(header.fields["general.architecture"])
    known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, header.of_architecture("block_count", 0))
    writer = gguf.GGUFWriter(str(out), architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    alpha = None
    for module, change in read_adapter(folder).items():
        if change.left is None or change.right is None:
            continue
        left, leaf = change.left, module.rpartition(".")[2]
        if leaf in ("q_proj", "k_proj"):
            left = in_order(left, leaf, module, header, architecture)
        if alpha is None:  # the scale is in `left` already
            alpha = float(left.shape[1])
            writer.add_float32("adapter.lora.alpha", alpha)
        name = f"{names.get_name(module)}.weight"
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(change.right, dtype=np.float32))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(left, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_beside(engine: LlamaEngine, lora: Path) -> None:
    adapter = llama_cpp.llama_adapter_lora_init(engine._model, str(lora).encode())
    if not adapter:
        raise SystemExit(f"llama.cpp does not accept {lora}.")
    adapters, scales = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(1.0)
    if llama_cpp.llama_set_adapters_lora(engine._context, adapters, 1, scales) != 0:
        raise SystemExit("llama.cpp could not apply the adapter.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=adapter_folder(DEFAULT))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "adapter_loading.json")
    options = parser.parse_args()
    base = fast_copy(builtin())
    with tempfile.TemporaryDirectory() as name:
        folder, took = Path(name), {}
        started = time.perf_counter()
        merge(builtin(), options.adapter, folder / "merged.gguf", "Q8_0")
        took["merge, once"] = time.perf_counter() - started
        write_lora(options.adapter, builtin(), folder / "lora.gguf")
        engines = {way: LlamaEngine.load(path, weights="as-is", cells=512) for way, path in (
            ("without", base), ("merged", folder / "merged.gguf"), ("beside", base))}
        started = time.perf_counter()
        load_beside(engines["beside"], folder / "lora.gguf")
        took["load beside, every start"] = time.perf_counter() - started
        text = engines["merged"].tokenizer.encode((ROOT / "examples" / "english.txt").read_text(encoding="utf-8"))
        logits: dict[str, Any] = {}
        rows = []
        for batch in track(BATCHES, "batches", console=console, transient=True):
            spent: dict[str, list[float]] = {way: [] for way in engines}
            for _ in range(ROUNDS):
                for way, engine in engines.items():
                    memory = engine.open()
                    memory.decode(text[:64], 0, logits=False)
                    started = time.perf_counter()
                    logits[way] = memory.decode(text[64 : 64 + batch], 64).logits
                    spent[way].append(time.perf_counter() - started)
                    memory.close()
            rows.append({"batch": batch, **{way: batch / median(seconds[1:]) for way, seconds in spent.items()}})
        # The same function, or the comparison means nothing.
        apart = {way: float(np.abs(logits[way] - logits["merged"]).mean()) for way in ("beside", "without")}
        for engine in engines.values():
            engine.close()
    table = Table(title="tokens/s by batch, Q8_0")
    for heading in ("batch", "without adapter", "merged", "beside", "beside / merged"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["batch"]), *(f"{row[way]:.0f}" for way in ("without", "merged", "beside")),
            f"{row['beside'] / row['merged']:.2f}",
        )
    out = Console()
    out.print(table)
    for what, seconds in took.items():
        out.print(f"{what}: {seconds:.2f} s")
    out.print("mean logit difference to merged: " + ", ".join(f"{way} {gap:.3f}" for way, gap in apart.items()))
    write_results(options.out, speeds=rows, seconds=took, logit_difference=apart)


if __name__ == "__main__":
    main()
