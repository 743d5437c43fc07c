"""What the shipped adapter gains: `anchorkv eval perplexity` with and without it, and the paper's own anchors.

    python benchmarks/adapter.py --data ../shared/data
    python benchmarks/adapter.py --data ../shared/data --model some.gguf       # an exported adapter
    python benchmarks/adapter.py --data ../shared/data --paper RUNS            # with the logs of shipped_adapter.py

Documents of pg19.test and wikitext2.test, scored after their first 512 tokens, are read through llama.cpp as users read
them: nothing is masked, the cells are gone. "window" keeps the newest text whole instead of anchors, as many cells as
`default` keeps: what anchors have to beat. Measurements are kept in --work; a stopped run goes on. Writes
results/adapter.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import platformdirs
from inference import ROOT, console, write_results
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from anchorkv.evaluate.run import Models, Store, run, settings_of
from anchorkv.evaluate.tasks.perplexity import Perplexity
from anchorkv.evaluate.ways import BASE, FULL, ways

KINDS = ("ep", "ac")
FIGURES = ("reduction", "perplexity", "ratio", "ratio_to_base", "context_recovered")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of text and policy, those without the adapter as `base_…` beside them."""
    # Within the model's window nothing but the reduction bounds the cells.
    labels = {
        f"{name}:reduction={r:g},recall=off,cell_budget=null": f"{name} {r:g}x"
        for r in options.reductions for name in ("default", "window")
    }
    bases = [] if options.model else [BASE, *(f"{BASE}/{name}" for name in labels)]
    wanted = ways([*labels, *bases])
    task = Perplexity(data=options.data, documents=options.documents, length=options.length)
    with Models(options.model) as models, Progress(console=console, transient=True) as progress:
        store = Store(options.work, settings_of([task], wanted, models))
        bar = progress.add_task("reading", total=None)
        rows = run([task], wanted, models, store, lambda done, total, what: progress.update(
            bar, completed=done, total=total, description=what))
    found = {(row["text"], row["policy"]): row for row in rows}
    out = []
    for (text, policy), row in found.items():
        if policy in bases:
            continue
        base = found.get((text, BASE if policy == FULL else f"{BASE}/{policy}"), {})
        kept = {name: row[name] for figure in FIGURES for name in (figure, f"{figure}_stderr")}
        out.append({
            "text": text, "policy": labels.get(policy, policy), **kept, "documents": row["documents"],
            "tokens": row["tokens"],
            **{f"base_{name}": base.get(name) for name in ("ratio", "context_recovered")},
        })
    return out


def checkpoints(runs: Path) -> dict[str, list[dict[str, Any]]]:
    """What `shipped_adapter.py train ep|ac` measured on held-out books at every checkpoint."""
    found = {}
    for kind in KINDS:
        path = runs / kind / "log.jsonl"
        if path.is_file():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[f"paper-{kind}"] = [line for line in lines if "context_recovered" in line]
    return found


def show(rows: list[dict[str, Any]], paper: dict[str, list[dict[str, Any]]], title: str) -> None:
    table = Table(title=title)
    for heading in ("text", "policy", "full / kept", "perplexity", "ratio", "to base", "recovered", "without adapter"):
        table.add_column(heading, justify="left" if heading in ("text", "policy") else "right")
    for row in rows:
        without = row["base_context_recovered"]
        table.add_row(
            row["text"], row["policy"], f"{row['reduction']:.1f}x", f"{row['perplexity']:.2f}", f"{row['ratio']:.3f}",
            f"{row['ratio_to_base']:.3f}", f"{row['context_recovered']:.1%} ± {row['context_recovered_stderr']:.1%}",
            "" if without is None else f"{without:.1%}",
        )
    Console().print(table)
    if paper:
        table = Table(title="The paper's anchors while they are trained: held-out books of 1,024 tokens")
        for heading in ("anchors", "tokens trained", "full / kept", "full", "anchored", "no memory", "recovered"):
            table.add_column(heading, justify="left" if heading == "anchors" else "right")
        for kind, lines in paper.items():
            for line in lines:
                table.add_row(
                    kind, f"{line['tokens']:,}", f"{line['reduction']:.1f}x", f"{line['perplexity_full']:.1f}",
                    f"{line['perplexity_anchored']:.1f}", f"{line['perplexity_no_memory']:.1f}",
                    f"{line['context_recovered']:.0%}",
                )
        Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with lm/*.test.jsonl.gz")
    parser.add_argument("--model", help="GGUF file of an exported adapter; without it what `anchorkv run` uses")
    parser.add_argument("--documents", type=int, default=2, help="of each text")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--reductions", type=float, nargs="+", default=[12, 24])
    parser.add_argument("--paper", type=Path, help="folder of the runs of shipped_adapter.py")
    parser.add_argument("--work", type=Path, default=Path(platformdirs.user_cache_path("anchorkv")) / "adapter-run")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "adapter.json")
    options = parser.parse_args()
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    paper = checkpoints(options.paper) if options.paper else before.get("paper", {})
    rows = measure(options)
    show(rows, paper, f"{options.documents} documents of {options.length:,} tokens each, scored after 512")
    settings = {name: getattr(options, name) for name in ("documents", "length", "reductions")}
    write_results(options.out, perplexity=rows, paper=paper, settings=settings)


if __name__ == "__main__":
    main()
