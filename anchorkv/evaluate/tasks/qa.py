"""The paper's eight benchmarks (AnLLM, arXiv 2402.07616, table 1) through lm-eval's own code: accuracy, the cells that
demonstrations keep, and the time they save. Every way answers the same questions after the same demonstrations.

`acceleration_reread` is the paper's comparison: a full cache that reads the demonstrations again for every question.
`acceleration_shared` is the harder one: a full cache that reads them once too. Both count all reading and scoring, the
demonstrations' one reading in equal parts to the questions of the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from anchorkv.config import preset
from anchorkv.errors import ConfigError, DataError
from anchorkv.evaluate.harness_tasks.benchmark import BENCHMARKS, chosen, read, splits
from anchorkv.evaluate.run import Item, Models, Record, Row, good
from anchorkv.evaluate.statistics import Estimate, bootstrap, difference, mean, verdict
from anchorkv.evaluate.ways import BASE, FULL, WINDOW, Way
from anchorkv.models import Model

AVERAGE = "average"
"""Where a row names its benchmark: the mean of all."""
TASK_FILES = Path(__file__).parents[1] / "harness_tasks"
_AVERAGED = (
    "accuracy", "accuracy_norm", "difference", "difference_norm", "demonstration_reduction", "acceleration_reread",
    "acceleration_shared",
)


@dataclass(frozen=True)
class QA:
    """Multiple choice out of DATA/qa. Raises ConfigError for options that fit nothing."""

    name: ClassVar[str] = "qa"
    policies: ClassVar[tuple[str, ...]] = (FULL, WINDOW, "default", "default:reduction=24")
    columns: ClassVar[tuple[tuple[str, str, object], ...]] = (
        ("benchmark", "benchmark", ""), ("shots", "shots", ""), ("policy", "policy", ""),
        ("accuracy", "accuracy", ".1%"), ("to full", "difference", "+.1%"),
        ("cells fewer", "demonstration_reduction", ".1%"), ("× re-reading", "acceleration_reread", ".2f"),
        ("× sharing", "acceleration_shared", ".2f"),
    )

    data: Path | None = None
    """Folder with qa/BENCHMARK/{train,test}.jsonl or .jsonl.gz (`harness_tasks/benchmark.py` says what a row has)."""
    limit: int | None = None
    """Questions of each benchmark, the first of the shuffled test split; None: all."""
    seed: int = 0
    """Of the shuffle, and of the bootstrap."""
    skip_bad_rows: bool = False
    shots: tuple[int, ...] = (0, 5)
    """Demonstrations before each question: the first rows of the train split."""
    benchmarks: tuple[str, ...] = BENCHMARKS
    reread_questions: int = 10
    """The full cache re-reads its demonstrations for so many of the questions (it is slow); 0: for none."""

    bad_rows: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    """What was wrong with the rows passed over."""
    _rows: dict[str, tuple[list[Row], list[Row]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.benchmarks) - set(BENCHMARKS))
        if unknown or not self.benchmarks:
            what = f"There is no benchmark '{unknown[0]}'" if unknown else "No benchmark is named"
            raise ConfigError(f"{what}; choose among {', '.join(BENCHMARKS)}.")
        if not self.shots or min(self.shots) < 0:
            raise ConfigError(f"shots must name numbers of demonstrations, 0 or more (got {list(self.shots)}).")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"{self.limit} questions are none; ask for at least one.")

    # --- what is asked -------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Raises ConfigError when lm-eval is missing, and as `items` does."""
        rows = {benchmark: self._read(benchmark) for benchmark in self.benchmarks}
        return {
            "lm_eval": lm_eval_version(), "reread_questions": self.reread_questions,
            "questions": {benchmark: _digest(questions) for benchmark, (questions, _) in rows.items()},
            "demonstrations": {benchmark: _digest(shown) for benchmark, (_, shown) in rows.items()},
        }

    def items(self) -> list[Item]:
        """Raises DataError when the data are missing or bad, or have fewer demonstrations than asked for."""
        found = []
        for benchmark in self.benchmarks:
            have = len(self._read(benchmark)[1])
            for shots in dict.fromkeys(self.shots):
                if shots > have:
                    raise DataError(f"The train split of {benchmark} has {have} rows; ask for as many shots at most.")
                found.append(Item(f"{benchmark}/{shots}-shot", {"benchmark": benchmark, "shots": shots}))
        return found

    def _read(self, benchmark: str) -> tuple[list[Row], list[Row]]:
        """(questions, rows to demonstrate with), as the benchmark's task file wants them."""
        if self.data is None:
            raise DataError("The benchmarks need data: name the folder that holds qa/BENCHMARK/*.jsonl with --data.")
        if benchmark not in self._rows:
            tests, bad_tests = read(self.data, benchmark, "test", self.skip_bad_rows)
            shown, bad_shown = read(self.data, benchmark, "train", self.skip_bad_rows)
            self.bad_rows.extend(bad_tests + bad_shown)
            self._rows[benchmark] = chosen(tests, benchmark, self.seed, self.limit), shown[: max(1, *self.shots)]
        return self._rows[benchmark]

    def notes(self, models: Models, ways: Sequence[Way]) -> list[str]:
        """What a user should know before anything is measured, a sentence each."""
        return [
            f"{benchmark} has {have} of the {self.limit} questions asked for."
            for benchmark in self.benchmarks
            if self.limit is not None and (have := len(self._read(benchmark)[0])) < self.limit
        ]

    # --- measuring -----------------------------------------------------------------------------------------------

    def ways(self, ways: Sequence[Way]) -> list[Way]:
        """Those asked for, and the full cache of the model without its adapter where a policy is to be set against."""
        alone = any(not way.adapter for way in ways) and all(way.name != BASE for way in ways)
        return [*ways, *([Way(BASE, preset(FULL), adapter=False)] if alone else [])]

    def measure(self, models: Models, way: Way, item: Item) -> Record:
        """By question, in the questions' order: `correct` (and `correct_norm`, by the choices' length, where the
        benchmark has it) and `times` [s]. What demonstrations took and kept once; `reread_times` [s] of the first
        questions where a full cache reads them again each time. Raises ConfigError when lm-eval is missing."""
        if not way.adapter and models.name is not None:
            return {"skipped": "only the built-in model has an adapter that can be left out"}
        model = models.of(way)
        record = {**item.fields, **self._answers(model, way, item)}
        if way.policy == preset(FULL) and item.fields["shots"] and self.reread_questions:
            again = self._answers(model, way, item, reread=True)
            record |= {"reread_times": again["times"], "reread_correct": again["correct"]}
        return record

    def _answers(self, model: Model, way: Way, item: Item, reread: bool = False) -> Record:
        lm_eval_version()
        with _quiet():
            from lm_eval.evaluator import evaluate
            from lm_eval.tasks import TaskManager

            from anchorkv.evaluate.harness import AnchorLM

            # What `simple_evaluate` does, less the report of the machine that takes it longer than some questions do.
            task = TaskManager(include_defaults=False).load([self._config(item)])
            limit = self.reread_questions if reread else None
            with contextlib.closing(AnchorLM(way.name, model=model, reread=reread, greedy=False, quiet=True)) as lm:
                found = evaluate(lm=lm, task_dict=task, limit=limit, bootstrap_iters=0, log_samples=True)
                return _record(found["samples"], lm)

    def _config(self, item: Item) -> dict[str, Any]:
        """The benchmark's task file, on the questions chosen."""
        from lm_eval.tasks._yaml_loader import load_yaml

        benchmark, shots = item.fields["benchmark"], item.fields["shots"]
        data = splits(*self._read(benchmark))
        config: dict[str, Any] = load_yaml(TASK_FILES / f"{benchmark}.yaml")
        return {**config, "num_fewshot": shots, "custom_dataset": lambda **_: data}

    # --- results -------------------------------------------------------------------------------------------------

    def rows(self, records: Sequence[Record], ways: Sequence[Way]) -> list[Row]:
        """By benchmark, shots and policy, and for each shots the average of the benchmarks that all ways answered.

        `difference` is that of the accuracy to the full cache of the same weights, question by question.
        """
        found = []
        for shots in dict.fromkeys(self.shots):
            rows = [
                row for benchmark in self.benchmarks for way in ways
                if (row := self._row(records, way, f"{benchmark}/{shots}-shot"))
            ]
            found += [*rows, *_averages(rows, ways)]
        return found

    def _row(self, records: Sequence[Record], way: Way, item: str) -> Row:
        """{} where nothing was measured."""
        mine, full = (good(records, one).get(item) for one in (way, _full_of(way)))
        if mine is None or "correct" not in mine:
            return {}
        n = len(mine["correct"])
        row: Row = {
            "policy": way.name, "benchmark": mine["benchmark"], "shots": mine["shots"], "questions": n,
            **_figure("accuracy", mean(mine["correct"])),
        }
        if "correct_norm" in mine:
            row |= _figure("accuracy_norm", mean(mine["correct_norm"]))
        if full is not None and "correct" in full:
            gain = difference(mine["correct"], full["correct"])
            row |= {**_figure("difference", gain), "verdict": verdict(gain)}
            if "correct_norm" in mine:
                row |= _figure("difference_norm", difference(mine["correct_norm"], full["correct_norm"]))
        if mine["demonstration_tokens"]:
            row["demonstration_reduction"] = 1 - mine["demonstration_cells"] / mine["demonstration_tokens"]
        row |= {name: mine[name] for name in (
            "demonstration_tokens", "demonstration_cells", "demonstration_seconds", "context_reduction",
            "prompt_tokens", "longest", "beyond_window",
        )}
        row |= _figure("seconds_per_question", mean(mine["times"]))
        return row | self._accelerations(mine, full)

    def _accelerations(self, mine: Record, full: Record | None) -> Row:
        found: Row = {}
        for name, theirs in (
            ("acceleration_reread", full and full.get("reread_times")),
            ("acceleration_shared", full and mine["shots"] and _whole_times(full)),
        ):
            if theirs:
                ours = np.asarray(_whole_times(mine))[: len(theirs)]
                others = np.asarray(theirs)

                def ratio(drawn: Any, ours: Any = ours, others: Any = others) -> float:
                    return float(others[drawn].sum() / ours[drawn].sum())

                error = bootstrap(ratio, len(ours), self.seed)
                found |= _figure(name, Estimate(ratio(slice(None)), error, len(ours)))
        return found

    def figures(self, records: Sequence[Record], ways: Sequence[Way]) -> str:
        """For the line under the progress bar: the accuracy of all questions so far."""
        parts = []
        for way in ways:
            answers = [one for record in good(records, way).values() for one in record.get("correct", ())]
            parts += [f"{way.name} {np.mean(answers):.1%}"] if answers else []
        return ", ".join(parts)


def lm_eval_version() -> str:
    """Raises ConfigError when lm-eval or what it reads data with is missing."""
    if importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("datasets") is None:
        raise ConfigError("The benchmarks are measured by lm-eval; install it with pip install 'anchorkv[eval]'.")
    return importlib.metadata.version("lm_eval")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's progress bars and notes are not for the user's terminal, where the evaluation has its own."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _record(samples: dict[str, list[dict[str, Any]]], lm: Any) -> Record:
    """What lm-eval found, and what the model spent."""
    (answers,) = samples.values()
    answers = sorted(answers, key=lambda answer: answer["doc_id"])
    times = {answer["doc_id"]: 0.0 for answer in answers}
    prompts = {answer["doc_id"]: 0 for answer in answers}
    for one in lm.spent:
        times[one.question] += one.seconds
        prompts[one.question] = max(prompts[one.question], one.full)
    reads = lm.demonstrations.reads
    kept, full = sum(one.kept for one in lm.spent), sum(one.full for one in lm.spent)
    norm = {"correct_norm": [int(a["acc_norm"]) for a in answers]} if "acc_norm" in answers[0] else {}
    return {
        "correct": [int(a["acc"]) for a in answers], **norm, "times": [round(t, 5) for t in times.values()],
        "demonstration_seconds": round(sum(r.seconds for r in reads), 4),
        "demonstration_cells": max((r.accounting.kept_cells for r in reads), default=0),
        "demonstration_tokens": max((r.accounting.full_cells for r in reads), default=0),
        "context_reduction": full / kept, "prompt_tokens": float(np.mean(list(prompts.values()))),
        "longest": lm.longest, "beyond_window": lm.longest > lm.max_length,
    }


def _full_of(way: Way) -> Way:
    """What `way` is set against: the full cache of the same weights."""
    return Way(FULL, preset(FULL)) if way.adapter or way.name == BASE else Way(BASE, preset(FULL), adapter=False)


def _whole_times(record: Record) -> list[float]:
    """Seconds of each question with its part of reading the demonstrations once."""
    part = record["demonstration_seconds"] / len(record["times"])
    return [seconds + part for seconds in record["times"]]


def _averages(rows: Sequence[Row], ways: Sequence[Way]) -> list[Row]:
    """One row a way: the mean over benchmarks, each counting the same whatever its number of questions."""
    by_way = {way.name: {row["benchmark"]: row for row in rows if row["policy"] == way.name} for way in ways}
    shared = set.intersection(*map(set, by_way.values())) if by_way else set()
    if len(shared) < 2:
        return []
    found = []
    for way in ways:
        mine = [by_way[way.name][benchmark] for benchmark in sorted(shared)]
        row: Row = {
            "policy": way.name, "benchmark": AVERAGE, "shots": mine[0]["shots"], "benchmarks": len(mine),
            "questions": sum(one["questions"] for one in mine),
            "beyond_window": any(one["beyond_window"] for one in mine),
        }
        for name in _AVERAGED:
            if all(name in one for one in mine):
                errors = [one.get(f"{name}_stderr", math.nan) for one in mine]
                error = math.sqrt(sum(e * e for e in errors)) / len(mine)
                row |= _figure(name, Estimate(float(np.mean([one[name] for one in mine])), error, len(mine)))
        if tokens := sum(one["demonstration_tokens"] for one in mine):
            row["demonstration_reduction_overall"] = 1 - sum(one["demonstration_cells"] for one in mine) / tokens
        if "difference" in row:
            row["verdict"] = verdict(Estimate(row["difference"], row["difference_stderr"], len(mine)))
        found.append(row)
    return found


def _figure(name: str, estimate: Estimate) -> Row:
    return {name: estimate.value, f"{name}_stderr": estimate.stderr}


def _digest(rows: Sequence[Row]) -> str:
    """Of what is read: other rows, or another order, would be another measurement."""
    return hashlib.sha256(json.dumps(list(rows), ensure_ascii=False).encode()).hexdigest()[:16]
