"""What the shipped adapter gains: perplexity with the full cache, with anchors and without memory, the same weights.

    python benchmarks/adapter.py --data ../shared/data                    # what the built-in model runs with
    python benchmarks/adapter.py --data ../shared/data --model some.gguf  # an exported adapter

Documents of pg19.test and wikitext2.test, scored after their first tokens, are read through llama.cpp as users read
them: nothing is masked, the cells are gone. Each policy is judged against "no memory" with its own sinks, recent window
and segments. "window" keeps the newest text whole instead of anchors, as many cells as `default` keeps: what anchors
have to beat. Writes results/adapter.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from inference import ROOT, console, write_results
from quality import UNSCORED, losses, newest_whole
from rich.console import Console
from rich.progress import track
from rich.table import Table

import anchorkv
from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Engine

TEXTS = {"pg19.test": "lm/pg19.test.jsonl.gz", "wikitext2.test": "lm/wikitext2.test.jsonl.gz"}
FULL, PAPER = "full", ("paper-ep", "paper-ac")


def policies(reductions: list[float]) -> dict[str, AnchorConfig]:
    base = anchorkv.preset("default").replace(recall="off", cell_budget=None)
    found = {FULL: anchorkv.preset("full")}
    for reduction in reductions:
        found[f"default {reduction:g}x"] = base.replace(reduction=reduction)
        found[f"window {reduction:g}x"] = newest_whole(base.replace(reduction=reduction))
    return found | {name: anchorkv.preset(name) for name in PAPER}


def documents(engine: Engine, path: Path, count: int, length: int) -> list[list[int]]:
    """The first `length` tokens of the first texts that have as many; short articles are read one after the other."""
    found: list[list[int]] = []
    waiting: list[int] = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            waiting += engine.tokenizer.encode(json.loads(line)["text"][: 8 * length])
            if len(waiting) >= length:
                found.append(waiting[:length])
                waiting = []
            if len(found) == count:
                break
    return found


def measure(engine: Engine, texts: dict[str, list[list[int]]], wanted: dict[str, AnchorConfig]) -> dict[Any, Any]:
    """{(text, policy): (mean -log p, reduction)}; "no memory" of every policy that needs one is measured too."""
    jobs = dict(wanted)
    jobs |= {_ground(config): config.replace(anchors=()) for name, config in wanted.items() if name != FULL}
    out: dict[Any, Any] = {}
    work = [(text, name) for text in texts for name in jobs]
    for text, name in track(work, "reading", console=console, transient=True):
        read = [losses(engine, jobs[name], tokens) for tokens in texts[text]]
        scored = np.concatenate([loss[UNSCORED:] for loss, _ in read])
        out[text, name] = float(scored.mean()), float(np.mean([accounting["reduction"] for _, accounting in read]))
    return out


def _ground(config: AnchorConfig) -> str:
    """Name of the "no memory" below a policy: that of every other with the same sinks, recent window and segments."""
    return f"no memory {config.sinks}/{config.recent_window}/{config.min_segment}-{config.max_segment}"


def rows(found: dict[Any, Any], before: dict[Any, Any], wanted: dict[str, AnchorConfig]) -> list[dict[str, Any]]:
    """`before`: the same of the base model without the adapter."""
    out = []
    for (text, name), (loss, reduction) in found.items():
        if name not in wanted:
            continue
        full = math.exp(found[text, FULL][0])
        row = {
            "text": text, "policy": name, "reduction": reduction, "perplexity": math.exp(loss),
            "ratio": math.exp(loss) / full, "ratio_to_base": math.exp(loss - before[text, FULL][0]),
            "base_ratio": math.exp(before[text, name][0] - before[text, FULL][0]),
            "context_recovered": _recovered(found, text, name, wanted[name]),
            "base_context_recovered": _recovered(before, text, name, wanted[name]),
        }
        out.append(row)
    return out


def _recovered(found: dict[Any, Any], text: str, name: str, config: AnchorConfig) -> float:
    if name == FULL:
        return 1.0
    none = math.exp(found[text, _ground(config)][0])
    full, anchored = math.exp(found[text, FULL][0]), math.exp(found[text, name][0])
    return (none - anchored) / (none - full)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with lm/*.test.jsonl.gz")
    parser.add_argument("--model", help="GGUF file of an exported adapter; without it what `anchorkv run` uses")
    parser.add_argument("--documents", type=int, default=2, help="of each text")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--reductions", type=float, nargs="+", default=[12, 24])
    parser.add_argument("--no-paper", action="store_true", help=f"leave out {' and '.join(PAPER)}, the slow ones")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "adapter.json")
    options = parser.parse_args()
    wanted = policies(options.reductions)
    if options.no_paper:
        wanted = {name: config for name, config in wanted.items() if name not in PAPER}
    results = []
    for adapted in (True, False):
        model = anchorkv.load(options.model) if adapted else anchorkv.load(adapter=False)
        texts = {
            name: documents(model.engine, options.data / path, options.documents, options.length)
            for name, path in TEXTS.items()
        }
        results.append(measure(model.engine, texts, wanted))
        model.close()
    table = Table(title=f"{options.documents} documents of {options.length:,} tokens each, scored after {UNSCORED}")
    for heading in ("text", "policy", "full / kept", "perplexity", "ratio", "to base", "recovered", "without adapter"):
        table.add_column(heading, justify="left" if heading in ("text", "policy") else "right")
    found = rows(*results, wanted)
    for row in found:
        table.add_row(
            row["text"], row["policy"], f"{row['reduction']:.1f}x", f"{row['perplexity']:.2f}", f"{row['ratio']:.3f}",
            f"{row['ratio_to_base']:.3f}", f"{row['context_recovered']:.1%}", f"{row['base_context_recovered']:.1%}",
        )
    Console().print(table)
    settings = {**vars(options), "data": True, "out": options.out.name, "model": Path(options.model or "").name}
    write_results(options.out, perplexity=found, settings=settings)


if __name__ == "__main__":
    main()
