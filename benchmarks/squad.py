"""Answers to SQuAD questions, their passage among others: full cache against anchors with recall, the same weights.

    python benchmarks/squad.py --data ../shared/data                 # ten passages, about 1,700 tokens a document
    python benchmarks/squad.py --data ../shared/data --passages 1    # the passage alone, as the data set has it

Through the chat template, greedy, token F1 and exact match as SQuAD defines them (Rajpurkar et al., arXiv 1606.05250).
Paired: every question is asked of both. Writes results/squad.json.
"""

from __future__ import annotations

import argparse
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from inference import ROOT, console, write_results
from quality import squad_questions
from rich.console import Console
from rich.progress import track
from rich.table import Table

import anchorkv
from anchorkv.document import Document
from anchorkv.models import builtin


def normal(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(answer: str, accepted: list[str]) -> float:
    """The best token F1 against any accepted answer."""
    scores = []
    for gold in accepted:
        said, wanted = Counter(normal(answer)), Counter(normal(gold))
        shared = sum((said & wanted).values())
        scores.append(2 * shared / (said.total() + wanted.total()) if shared else 0.0)
    return max(scores)


def contains(answer: str, accepted: list[str]) -> bool:
    """Whether an accepted answer stands in it, word for word: fairer to a chat model, which answers in sentences."""
    said = f" {' '.join(normal(answer))} "
    return any(f" {' '.join(normal(gold))} " in said for gold in accepted)


def measure(model: anchorkv.Model, options: argparse.Namespace, label: str) -> list[dict[str, Any]]:
    base = model.policy
    ways = {"full": anchorkv.preset("full"), "recall on": base.replace(recall="on"), "recall auto": base}
    random = np.random.default_rng(0)
    found: dict[str, list[tuple[float, bool, float]]] = {name: [] for name in ways}
    asked = squad_questions(options.data, options.questions, random)
    for row, others in track(asked, label, total=options.questions, console=console, transient=True):
        passages = [*others[: options.passages - 1], row["context"]]
        random.shuffle(passages)
        for name, policy in ways.items():
            with Document.read(model.engine, policy, "\n\n".join(passages)) as document:
                question = f"{row['question']} Answer with a few words from the text."
                answer = document.ask(question, max_tokens=options.max_tokens)
                kept = document.accounting().reduction
                found[name].append((f1(answer.text, row["answers"]), contains(answer.text, row["answers"]), kept))
    full = np.asarray([score for score, _, _ in found["full"]])
    rows = []
    for name, results in found.items():
        scores = np.asarray([score for score, _, _ in results])
        gap = scores - full
        rows.append({
            "model": label, "policy": name, "f1": float(scores.mean()), "f1_ratio": float(scores.mean() / full.mean()),
            "stderr_of_gap": float(gap.std(ddof=1) / np.sqrt(len(gap))),
            "contains_answer": float(np.mean([hit for _, hit, _ in results])),
            "reduction": float(np.mean([kept for _, _, kept in results])), "questions": len(scores),
        })
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with squad/squad_v1.test.jsonl.gz")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--passages", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--base", action="store_true", help="measure the model without its adapter too")
    parser.add_argument("--model", help="GGUF file of an exported adapter; without it what `anchorkv run` uses")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "squad.json")
    options = parser.parse_args()
    rows = []
    for label, source in {"adapter": options.model, **({"base": builtin()} if options.base else {})}.items():
        with anchorkv.load(source) as model:
            rows += measure(model, options, label)
    table = Table(title=f"{options.questions} SQuAD questions, {options.passages} passages a document")
    for heading in ("model", "policy", "full / kept", "F1", "of the full cache's", "± s.e. of the gap", "holds it"):
        table.add_column(heading, justify="left" if heading in ("model", "policy") else "right")
    for row in rows:
        table.add_row(
            row["model"], row["policy"], f"{row['reduction']:.1f}x", f"{row['f1']:.3f}", f"{row['f1_ratio']:.1%}",
            f"{row['stderr_of_gap']:.3f}", f"{row['contains_answer']:.0%}",
        )
    Console().print(table)
    settings = {**vars(options), "data": True, "out": options.out.name, "model": Path(options.model or "").name}
    write_results(options.out, answers=rows, settings=settings)


if __name__ == "__main__":
    main()
