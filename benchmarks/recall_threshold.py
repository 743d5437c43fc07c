"""When should `auto` recall? The best segment's share of the ranker's ceiling, with and without the answer in the text.

    python benchmarks/recall_threshold.py --data ../shared/data

SQuAD questions over ten passages, and the same questions over the nine that do not hold the answer. No model is run:
only its tokenizer and the policy's segments are needed. Writes results/recall_threshold.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from inference import ROOT, write_results
from rich.console import Console
from rich.table import Table

import anchorkv
from anchorkv.engines.base import Engine
from anchorkv.evaluate.passages import SEPARATOR, question_set
from anchorkv.recall import BM25, RecallPlan
from anchorkv.train.plan import PlanningEngine, plan

PASSAGES = 10


def share(engine: Engine, text: str, question: str) -> float:
    """Best score / ceiling over the segments of `text`."""
    policy = anchorkv.preset("default").replace(scorer="landmarks", cell_budget=None)
    tokens = engine.tokenizer.encode(text)
    ledger = plan(PlanningEngine(engine.tokenizer, engine.info), policy, tokens)
    texts = [engine.tokenizer.decode(ledger.tokens[ledger.span(n)].tolist()) for n in range(ledger.segments)]
    ranker = BM25()
    ceiling = ranker.ceiling(texts, question)
    return float(ranker.scores(texts, question).max() / ceiling) if ceiling else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with squad/squad_v1.test.jsonl.gz")
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args()
    present, absent = [], []
    with anchorkv.load() as model:
        squad = question_set("squad", options.data)
        for question in squad.chosen(options.questions):
            text = squad.hidden(question, PASSAGES)
            others = [passage for passage in text.split(SEPARATOR) if passage not in question.context]
            absent.append(share(model.engine, SEPARATOR.join(others), question.text))
            present.append(share(model.engine, text, question.text))
    table = Table(title=f"share of questions that `auto` would recall for, of {options.questions}")
    found = []
    for threshold in (0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25):
        needed, needless = (float(np.mean(np.asarray(side) >= threshold)) for side in (present, absent))
        found.append({"threshold": threshold, "answer_present": needed, "answer_absent": needless})
    for heading in ("threshold", "answer in the text", "answer not in it"):
        table.add_column(heading, justify="right")
    for row in found:
        mark = " (now)" if row["threshold"] == RecallPlan.AUTO_SHARE else ""
        table.add_row(f"{row['threshold']:g}{mark}", f"{row['answer_present']:.0%}", f"{row['answer_absent']:.0%}")
    Console().print(table)
    write_results(ROOT / "results" / "recall_threshold.json", rows=found, questions=options.questions)


if __name__ == "__main__":
    main()
