"""The rows of DATA/qa/BENCHMARK/SPLIT.jsonl[.gz] as the task files of this folder want them. Needs no lm-eval."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchorkv.errors import ConfigError, DataError
from anchorkv.evaluate.rows import Row, Rows, find
from anchorkv.evaluate.run import seed_of

BENCHMARKS = (
    "openbookqa", "winogrande", "arc_easy", "arc_challenge", "piqa", "hellaswag", "sciq", "boolq",
)
"""Those of AnLLM (arXiv 2402.07616)."""
DATA = "ANCHORKV_DATA"
"""The environment variable that names the data folder to lm-eval alone."""
GAP = "_"
"""What WinoGrande's choices fill."""
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {"boolq": {"passage": str}}


@dataclass
class Questions(Rows):
    """The questions of one split. A row: question, choices, answer (index of the right one), and what else the
    benchmark has: BoolQ a passage, SciQ a support that may be empty, WinoGrande a gap "_" in its question."""

    benchmark: str = ""

    def _parse(self, line: str) -> tuple[Row, str]:
        row, problem = super()._parse(line)
        return row, problem or self._fault(row)

    def _fault(self, row: Row) -> str:
        """What is wrong with a row that has all fields; "" for nothing."""
        choices, answer = row["choices"], row["answer"]
        if not all(isinstance(choice, str) and choice.strip() for choice in choices):
            return "one of the 'choices' is no text, or empty"
        if len(choices) < 2:
            return "there is one choice, which is no question"
        if not 0 <= answer < len(choices):
            return f"the answer is {answer}, and the {len(choices)} choices are counted from 0"
        if not isinstance(row.get("support", ""), str):
            return "the field 'support' is no text"
        if self.benchmark == "winogrande" and row["question"].count(GAP) != 1:
            return f"the question has no one gap '{GAP}'"
        return ""


def read(data: Path, benchmark: str, split: str, skip_bad: bool = False) -> tuple[list[Row], list[str]]:
    """All good rows of a split as its task file wants them, and what was wrong with those passed over.

    Raises DataError when the file is missing, damaged, or has a bad row and skip_bad is false.
    """
    fields: dict[str, type | tuple[type, ...]] = {"question": str, "choices": list, "answer": int}
    fields |= _FIELDS.get(benchmark, {})
    rows = Questions(find(data, f"qa/{benchmark}/{split}.jsonl"), fields, skip_bad, benchmark=benchmark)
    return [_wanted(benchmark, row) for row in rows], rows.bad


def _wanted(benchmark: str, row: Row) -> Row:
    """The same fields in every row of a benchmark, named as its task file names them."""
    kept: Row = {name: row[name] for name in ("question", "choices", "answer")}
    if benchmark == "winogrande":
        before, after = row["question"].split(GAP)
        # Partial evaluation (Trinh and Le, arXiv 1806.02847): each choice in its place, what follows is scored.
        kept |= {"filled": [before + choice for choice in row["choices"]], "ending": after.strip()}
    elif benchmark == "sciq":
        kept["support"] = row.get("support", "")
    elif benchmark == "boolq":  # as SuperGLUE has it: the article's title goes first, the question has no mark
        title = f"{row['title']} -- " if row.get("title") else ""
        kept |= {"passage": title + row["passage"], "question": row["question"].removesuffix("?")}
    return kept


def chosen(rows: Sequence[Row], benchmark: str, seed: int, limit: int | None = None) -> list[Row]:
    """The first `limit` of `rows` shuffled, which are fairer than the file's first: neighbours are alike there."""
    order = np.random.default_rng(seed_of("qa", benchmark, seed)).permutation(len(rows))
    return [rows[at] for at in order[:limit].tolist()]


def splits(questions: Sequence[Row], demonstrations: Sequence[Row]) -> Any:
    """What lm-eval reads. Raises ConfigError when the library `datasets` is missing."""
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("The benchmarks need the library datasets: pip install 'anchorkv[eval]'.")
    import datasets

    return datasets.DatasetDict({
        "test": datasets.Dataset.from_list(list(questions)), "train": datasets.Dataset.from_list(list(demonstrations)),
    })


def dataset(
    benchmark: str, data: str = "", seed: int = 0, skip_bad_rows: bool = False, **_: Any
) -> Any:
    """What a task file's `custom_dataset` calls: the shuffled test split, and the train split as it is.

    data, seed, skip_bad_rows: of lm-eval's --metadata; data without it out of the environment.
    Raises DataError when no folder is named, or as `read` does.
    """
    folder = data or os.environ.get(DATA, "")
    if not folder:
        raise DataError(
            f"Name the folder that holds qa/{benchmark} with --metadata data=FOLDER, or in the environment ({DATA})."
        )
    questions, _bad = read(Path(folder), benchmark, "test", skip_bad_rows)
    demonstrations, _bad = read(Path(folder), benchmark, "train", skip_bad_rows)
    return splits(chosen(questions, benchmark, int(seed)), demonstrations)
