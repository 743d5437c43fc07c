"""What a run looks like while it goes on: a bar, what is measured now, and a row an area that fills in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from anchorkv.evaluate.ways import FULL
from anchorkv.poc.figures import Found, way_results
from anchorkv.poc.results import Figure, PocReport, Verdict, WayResult
from anchorkv.poc.run import Run
from anchorkv.poc.verdict import verdict

VERDICTS = {
    "adopt": ("adopt", "green"), "adopt_with_recall": ("adopt with recall", "green"),
    "do_not_use": ("do not use", "red"), "not_enough_data": ("not enough data", "yellow"),
}
HEADINGS = ("area", "texts", "cells", "right", "perplexity", "speed", "verdict")
"""Full cells per kept one; right answers, full → anchors; perplexity and writing speed against the full cache."""
NONE = "…"
_DOING = {"document": "reading and asking", "speed": "timing", "ground": "reading without memory"}
Row = tuple[str | Text, ...]


class View:
    """Call it with the run before each job. Where there is no terminal, a line a job; with `quiet`, nothing."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self._rows: dict[str, tuple[int, Row]] = {}
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=30),
            MofNCompleteColumn(), TimeElapsedColumn(), console=console,
        )
        self._job = self._bar.add_task("Loading the model", total=None)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.quiet:
            self._live = Live(self._bar, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, run: Run) -> None:
        job = run.now
        what = f"{job.item.id}: {_DOING[job.task]}, {job.way.name}" if job else "Writing the report"
        if self._live is not None:
            self._bar.update(self._job, description=_short(what), completed=run.done, total=len(run.jobs))
            self._live.update(Group(self.table(run), self._bar), refresh=True)
        elif job and not self.quiet:
            self.console.print(
                f"[{run.done + 1}/{len(run.jobs)}] {what}", markup=False, highlight=False, soft_wrap=True
            )

    def table(self, run: Run) -> RenderableType:
        """Areas with what is known of them; a row is worked out again only when there is something new."""
        records = run.records()
        areas: dict[str, list[str]] = {}
        for item in run.items:
            areas.setdefault(item.source.area, []).append(item.id)
        found = Found(records)
        rows = []
        for area, ids in areas.items():
            known = sum(record["area"] == area for record in records)
            if self._rows.get(area, (-1, ()))[0] != known:
                self._rows[area] = known, _row(run, found, area, ids)
            rows.append(self._rows[area][1])
        return _table(rows)


def final(report: PocReport) -> Table:
    """The same table of a whole report."""
    areas = [*report.areas, *([report.overall.model_copy(update={"name": "all"})] if len(report.areas) > 1 else [])]
    return _table([_figures(area.name, f"{area.documents}", area.ways, area.verdict) for area in areas])


def _row(run: Run, found: Found, area: str, ids: list[str]) -> Row:
    done = [item for item in found.measured(run.ways) if item in ids]
    documents = f"{len(done)}/{len(ids)}"
    if not done:
        return (area, documents, *[NONE] * (len(HEADINGS) - 2))
    ways = way_results(found, done, run.ways)
    questions = sum(len(found.documents[FULL][item]["questions"]) for item in done)
    return _figures(area, documents, ways, verdict(ways, run.plan.thresholds, questions))


def _figures(area: str, documents: str, ways: Iterable[WayResult], about: Verdict) -> Row:
    ways = tuple(ways)
    way, full = _chosen(ways, about), ways[0]
    if way is None:
        return (area, documents, *[NONE] * (len(HEADINGS) - 2))
    words, style = VERDICTS[about.kind]
    words += f" ({way.recall})" if about.kind == "adopt_with_recall" else ""
    right = f"{_share(full.answering.correct)}→{_share(way.answering.correct)}"
    return (
        area, documents, _times(way.reduction, 1), right, _times(way.perplexity_ratio, 2),
        _times(way.speed.decode_ratio, 2), Text(words, style=style),
    )


def _chosen(ways: Iterable[WayResult], about: Verdict) -> WayResult | None:
    named = (way for way in ways if (way.policy, way.recall) == (about.policy, about.recall) and way.policy != FULL)
    return next(named, None)


def _table(rows: Iterable[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("area", "verdict") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def _times(figure: Figure, digits: int) -> str:
    return NONE if figure.value is None else f"{figure.value:.{digits}f}×"


def _share(figure: Figure) -> str:
    return NONE if figure.value is None else f"{figure.value:.0%}"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"…{text[-most + 1 :]}"
