"""Quality of untrained anchors: context recovered, and the loss of gold answers with and without recall.

    python benchmarks/quality.py                              # the shipped example document
    python benchmarks/quality.py --data ../shared/data        # pg19.test books, and SQuAD among ten passages

The built-in model without its adapter; what that gains is benchmarks/adapter.py's to say. "for good": anchors that do
not age; "window": the newest text whole, as many cells.
Context recovered = (ppl no memory - ppl anchored) / (ppl no memory - ppl full cache), same weights, same tokens,
through the engine that users run (nothing is masked: the cells are gone). Writes results/quality.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from inference import ROOT, console, write_results
from rich.console import Console
from rich.progress import track
from rich.table import Table

import anchorkv
from anchorkv.config import AnchorConfig
from anchorkv.document import QUESTION, Document
from anchorkv.engines.base import SURPRISE, Engine, Output
from anchorkv.prompt import Prompt
from anchorkv.recall import RecallPlan
from anchorkv.session import Session

UNSCORED = 512
"""Tokens at the start of each text that are read but not scored: older context hardly exists there."""


def policies(reduction: float) -> dict[str, AnchorConfig]:
    base = anchorkv.preset("default").replace(reduction=reduction, recall="off", cell_budget=None)
    return {
        "full": anchorkv.preset("full"),
        "no-memory": base.replace(anchors=()),
        "default": base,
        "default 20x": base.replace(reduction=20),
        "for good": base.replace(aging=0),
        "window": newest_whole(base),
        "untrained": base.replace(scorer="landmarks"),
        "untrained 20x": base.replace(scorer="landmarks", reduction=20),
        "surprise": base.replace(scorer="surprise"),
        "frequency": base.replace(scorer="frequency"),
        "random": base.replace(scorer="random"),
        "endpoints": base.replace(anchors=("EP",), anchors_see_anchors=True),
        "sepllm": anchorkv.preset("sepllm"),
        "paper-ep": anchorkv.preset("paper-ep"),
    }


def newest_whole(policy: AnchorConfig) -> AnchorConfig:
    """The newest text whole instead of anchors, as many cells as `policy` keeps: age alone decides."""
    return policy.replace(scorer="landmarks", aging=100)


def losses(engine: Engine, config: AnchorConfig, tokens: Sequence[int]) -> tuple[np.ndarray, dict[str, Any]]:
    """-log p of every token [n] while it is read incrementally, and the accounting at the end."""
    parts: list[np.ndarray] = []

    def take(first: int, out: Output) -> None:
        if out.surprise is not None:
            parts.append(out.surprise)

    with Session(engine, config, observe=take, observe_needs=frozenset({SURPRISE})) as session:
        session.read(tokens)
        added = session.ledger.column("added")
        return np.concatenate(parts)[~added], session.accounting().as_dict()


def perplexities(engine: Engine, texts: Sequence[Sequence[int]], reduction: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, config in track(policies(reduction).items(), "perplexity", console=console, transient=True):
        per_text, kept = [], []
        for tokens in texts:
            loss, accounting = losses(engine, config, tokens)
            per_text.append(loss[UNSCORED:])
            kept.append(accounting["reduction"])
        every = np.concatenate(per_text)
        rows.append({
            "policy": name, "perplexity": float(np.exp(every.mean())), "tokens": len(every),
            "reduction": float(np.mean(kept)), "per_text": [float(np.exp(part.mean())) for part in per_text],
        })
    full, bare = rows[0], rows[1]
    for row in rows:
        row["ratio"] = row["perplexity"] / full["perplexity"]
        row["context_recovered"] = (bare["perplexity"] - row["perplexity"]) / (bare["perplexity"] - full["perplexity"])
    return rows


def squad_questions(
    data: Path, count: int, random: np.random.Generator
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """`count` SQuAD test questions, each with nine passages that do not hold its answer."""
    with gzip.open(data / "squad" / "squad_v1.test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    contexts = sorted({row["context"] for row in rows})
    for index in random.choice(len(rows), count, replace=False):
        row = rows[index]
        yield row, [context for context in random.permutation(contexts) if context != row["context"]][:9]


def answer_losses(engine: Engine, data: Path, count: int) -> list[dict[str, Any]]:
    """Mean -log p a token of the gold answer, its passage hidden among nine others."""
    random = np.random.default_rng(0)
    base = anchorkv.preset("default")
    # Each document is read once a policy; what recall does is tried on forks of it.
    readings = {
        "full": (anchorkv.preset("full"), ("off",)), "default": (base, ("off", "auto", "on")),
        "w = 0": (base.replace(recent_window=0), ("on",)),
    }
    found: dict[str, list[float]] = {}
    hit: dict[str, list[bool]] = {}
    asked = squad_questions(data, count, random)
    for row, others in track(asked, "answers among ten passages", total=count, console=console, transient=True):
        passages = [*others, row["context"]]
        random.shuffle(passages)
        for name, (config, modes) in readings.items():
            with Document.read(engine, config, "\n\n".join(passages)) as document:
                for mode in modes:
                    label = name if name == "full" else f"{name}, recall {mode}"
                    loss, brought = _answer_loss(document, mode, row)
                    found.setdefault(label, []).append(loss)
                    hit.setdefault(label, []).append(brought)
    full = np.asarray(found["full"])
    return [
        {
            "policy": name, "answer_loss": float(np.mean(values)),
            "stderr": float(np.std(values, ddof=1) / np.sqrt(len(values))),
            "ratio": float(np.mean(values) / full.mean()),
            "answer_recalled": float(np.mean(hit[name])), "questions": len(values),
        }
        for name, values in found.items()
    ]


def _answer_loss(document: Document, recall: str, row: dict[str, Any]) -> tuple[float, bool]:
    parts: list[np.ndarray] = []
    with document.session.fork() as session:
        tokenizer = session.engine.tokenizer
        session.config = session.config.replace(recall=recall)
        plan = RecallPlan(session)
        plan.update(row["question"])
        recalled = " ".join(plan.text_of(segment) for segment in session.recalled)
        asking = QUESTION.format(question=row["question"]) + Prompt.of(tokenizer).asking
        session.read(tokenizer.encode(asking, special=True))
        session.observe = lambda first, out: parts.append(out.surprise)
        session.observe_needs = frozenset({SURPRISE})
        session.read(tokenizer.encode(row["answers"][0]))
    return float(np.concatenate(parts).mean()), row["answers"][0] in recalled


def texts(engine: Engine, data: Path | None, count: int, length: int) -> list[list[int]]:
    if data is None:
        tokens = engine.tokenizer.encode((ROOT / "examples" / "english.txt").read_text(encoding="utf-8"))
        return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)][:count]
    with gzip.open(data / "lm" / "pg19.test.jsonl.gz", "rt", encoding="utf-8") as file:
        books = [json.loads(line)["text"] for line in file][:count]
    return [engine.tokenizer.encode(book[20_000 : 20_000 + 8 * length])[:length] for book in books]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with lm/pg19.test.jsonl.gz and squad/squad_v1.test.jsonl.gz")
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--reduction", type=float, default=12)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--only", choices=("perplexity", "answers"), help="the other part stays as it was measured")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "quality.json")
    options = parser.parse_args()
    model = anchorkv.load(adapter=False)
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.only else {}
    rows, answers = before.get("perplexity", []), before.get("answers", [])
    if options.only != "answers":
        read = texts(model.engine, options.data, options.texts, options.length)
        rows = perplexities(model.engine, read, options.reduction)
    if options.only != "perplexity":
        answers = answer_losses(model.engine, options.data, options.questions) if options.data else []
    table = Table(title=f"{options.texts} texts of {options.length:,} tokens, scored after {UNSCORED}")
    for heading in ("policy", "full / kept cells", "perplexity", "ratio", "context recovered"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["policy"], f"{row['reduction']:.1f}x", f"{row['perplexity']:.2f}", f"{row['ratio']:.3f}",
            f"{row['context_recovered']:.0%}",
        )
    Console().print(table)
    if answers:
        table = Table(title="gold answer's loss, its passage among ten (SQuAD)")
        for heading in ("policy", "loss", "± s.e.", "ratio to full", "answer among recalled"):
            table.add_column(heading, justify="right")
        for row in answers:
            table.add_row(
                row["policy"], f"{row['answer_loss']:.3f}", f"{row['stderr']:.3f}", f"{row['ratio']:.3f}",
                f"{row['answer_recalled']:.0%}",
            )
        Console().print(table)
    settings = vars(options) | {"data": str(bool(options.data)), "out": options.out.name}
    write_results(options.out, perplexity=rows, answers=answers, settings=settings)


if __name__ == "__main__":
    main()
