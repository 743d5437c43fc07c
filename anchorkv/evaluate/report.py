"""What an evaluation leaves behind: results.json with all that figures depend on, and a table a task.

A task may say how its table looks, by an attribute `columns` of (heading, field, format). format: what follows the
colon of an f-string (".3f"), a whole template ("{:.1f}×") or a function of the value. Rows with a true `detail` are for
results.json and pictures alone. What was wrong with the rows of data that it passed over stands in its `bad_rows`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from anchorkv.errors import SavedStateError
from anchorkv.evaluate.run import Record, Row, Task
from anchorkv.evaluate.statistics import Estimate, verdict
from anchorkv.evaluate.ways import Way

RESULTS = "results.json"
DIFFERENCE, VERDICT = "difference", "verdict"
"""The fields of a row that hold its paired difference from the full cache, more is better, and what that says."""
STDERR = "_stderr"
Format = str | Callable[[Any], str]
_COLOURS = {"better": "green", "worse": "red", "tie": "yellow"}


@dataclass(frozen=True)
class Job:
    """One task, the ways that it compares, and all that it measured."""

    task: Task
    ways: Sequence[Way]
    records: Sequence[Record]
    rows: Sequence[Row]

    @property
    def failures(self) -> list[Record]:
        """Task, way, item and the sentence, of every measurement that failed."""
        return [{key: r[key] for key in ("task", "way", "item", "error")} for r in self.records if "error" in r]

    @property
    def bad_rows(self) -> list[str]:
        """What was wrong with the rows of data that were passed over."""
        return list(getattr(self.task, "bad_rows", ()))


def results(jobs: Sequence[Job], settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """All of a run, JSON-able: what is not a number is null. more: environment, models, notes …"""
    compared = {way.name: way for job in jobs for way in job.task.ways(job.ways)}
    whole = {
        **more,
        "settings": settings,
        "tasks": {job.task.name: _options(job.task) for job in jobs},
        "policies": {
            name: {"adapter": way.adapter, "policy": way.policy.model_dump(mode="json")}
            for name, way in compared.items()
        },
        "measurements": sum(len(job.records) for job in jobs),
        "rows": [row for job in jobs for row in job.rows],
        "failures": [failure for job in jobs for failure in job.failures],
        "bad_rows": {job.task.name: {"count": len(job.bad_rows), "rows": job.bad_rows} for job in jobs},
    }
    return {key: _plain(value) for key, value in whole.items()}


def save(found: dict[str, Any], folder: Path) -> Path:
    """`found` as FOLDER/results.json, whole or not at all. Raises SavedStateError when it cannot be written."""
    path, partial = folder / RESULTS, folder / f"{RESULTS}.partial"
    try:
        partial.write_text(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise SavedStateError(f"{path} cannot be written ({error.strerror}); choose another --out.") from None
    return path


def table(job: Job, width: int = 120) -> Group:
    """The task's figures with ± their standard errors, and whether each way differs from the full cache; several tables
    one below the other where `width` characters are too few for one."""
    rows = [row for row in job.rows if not row.get("detail")]
    columns = list(getattr(job.task, "columns", None) or columns_of(rows))
    if any(verdict_of(row) for row in rows) and all(name != VERDICT for _, name, _ in columns):
        columns.append(("than full", VERDICT, ""))
    found = [_column(rows, *column) for column in columns]
    keys = [column for column in found if column.key]
    parts = [list(keys)]
    for column in [column for column in found if not column.key]:
        if _needs([*parts[-1], column]) > width and parts[-1] != keys:
            parts.append(list(keys))
        parts[-1].append(column)
    beyond = any(row.get("beyond_window") for row in rows)
    said = [Text("† longer than the model was trained for", style="dim")] if beyond else []
    return Group(Text(job.task.name, style="bold"), *(_drawn(part, width) for part in parts), *said)


@dataclass(frozen=True)
class _Column:
    """One column of a table. `key`: it tells rows apart, so it stands in every part of a table that was parted."""

    heading: str
    cells: list[Text]
    words: bool
    key: bool

    @property
    def _texts(self) -> list[str]:
        return [self.heading, *(cell.plain for cell in self.cells)]

    @property
    def narrowest(self) -> int:
        """Characters of its longest word."""
        return max((len(word) for text in self._texts for word in text.split()), default=1)

    @property
    def widest(self) -> int:
        return max(map(len, self._texts))


def _column(rows: Sequence[Row], heading: str, name: str, form: Format) -> _Column:
    words = name == VERDICT or any(isinstance(row.get(name), str) for row in rows)
    cells = [verdict_of(row) if name == VERDICT else cell_of(row, name, form) for row in rows]
    for row, cell in zip(rows, cells, strict=True):
        if name == "policy" and row.get("beyond_window"):
            cell.append(" †", style="yellow")
    figure = any(isinstance(row.get(name), float) or f"{name}{STDERR}" in row for row in rows)
    return _Column(heading, cells, words, key=name != VERDICT and not figure and form == "")


def _needs(columns: Sequence[_Column], space: int = 1) -> int:
    """Characters that a table of these columns takes when everything is broken at its spaces."""
    return sum(column.narrowest + space for column in columns) + 1


def _drawn(columns: Sequence[_Column], width: int) -> Table:
    """Within `width`, as many columns as possible are not broken; rich would narrow all of them alike."""
    space = 2 if _needs(columns, 2) <= width else 1
    left = width - _needs(columns, space)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, space - 1, 0, 0))
    for column in columns:
        more = column.widest - column.narrowest
        left -= (given := more if more <= left else 0)
        drawn.add_column(
            column.heading, justify="left" if column.words else "right", overflow="fold",
            width=column.narrowest + given,
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        drawn.add_row(*cells)
    return drawn


def live(task: Task, records: Sequence[Record], ways: Sequence[Way]) -> str:
    """What the task can say so far, by its method `figures`; "" where it has none."""
    figures: Callable[..., str] | None = getattr(task, "figures", None)
    return figures(records, ways) if figures and records else ""


def columns_of(rows: Sequence[Row]) -> list[tuple[str, str, Format]]:
    """Words and numbers of the rows, in their order."""
    names = dict.fromkeys(name for row in rows for name in row)
    plain = [
        name for name in names if name not in ("task", DIFFERENCE, VERDICT) and not name.endswith(STDERR)
        and any(isinstance(row.get(name), str | int | float) and not isinstance(row[name], bool) for row in rows)
    ]
    return [(name.replace("_", " "), name, "") for name in plain]


def cell_of(row: Row, name: str, form: Format) -> Text:
    value = row.get(name)
    if isinstance(value, bool):
        return Text("yes" if value else "")
    if isinstance(value, str):
        # A narrow table may part "default:reduction=24" there.
        return Text(value.replace(":", ": ") if name == "policy" else value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Text("–", style="dim")
    error = row.get(f"{name}{STDERR}")
    if callable(form):
        return Text(form(value))
    before, spec, after = _template(form)
    spec = spec or (".3f" if isinstance(value, float) else ",")
    if not error or math.isnan(error):  # of a single measurement, or of what is so by definition
        return Text(f"{before}{value:{spec}}{after}")
    # Where a table is narrow, the error moves to a line of its own.
    return Text.assemble(f"{before}{value:{spec}}", (f" ±{error:{spec.removeprefix('+')}}", "dim"), after)


def _template(form: str) -> tuple[str, str, str]:
    """What stands before the number, how it is written, and what stands behind it."""
    if "{" not in form:
        return "", form, ""
    before, _, rest = form.partition("{")
    spec, _, after = rest.partition("}")
    return before, spec.removeprefix(":"), after


def verdict_of(row: Row) -> Text:
    """ "better", "worse" or "tie" by the paired difference; "" for the full cache itself, and where it is unknown."""
    value, error = row.get(DIFFERENCE), row.get(f"{DIFFERENCE}{STDERR}")
    if value == error == 0:
        return Text("")
    said = row.get(VERDICT, "")
    if not said and value is not None and error is not None and not (math.isnan(value) or math.isnan(error)):
        said = verdict(Estimate(value, error, 0))
    return Text(said, style=_COLOURS.get(said, ""))


def _options(task: Task) -> dict[str, Any]:
    if not is_dataclass(task):
        return {}
    return {f.name: getattr(task, f.name) for f in fields(task) if f.init and f.name != "name"}


def _plain(value: Any) -> Any:
    """`value` as JSON has it: paths are text, NaN and infinities null."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "item"):  # a number of numpy's
        return _plain(value.item())
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    return value if isinstance(value, str | int | float | None) else str(value)
