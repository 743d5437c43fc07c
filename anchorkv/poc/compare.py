"""Two runs side by side: before and after training on one's own texts, two models, two policies.

Areas and figures that only one of the runs has are shown as such; what makes the runs incomparable is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from anchorkv.errors import SavedStateError
from anchorkv.evaluate.ways import FULL
from anchorkv.poc.files import REPORT
from anchorkv.poc.results import AreaResult, Figure, Part, PocReport, VerdictKind, WayResult

Show = Literal["times", "share", "number", "cells"]
CLEAR = 2.0
"""Standard errors beyond which a difference is taken for one."""


class Row(Part):
    """One figure of one area in both runs."""

    figure: str
    show: Show
    better: Literal["more", "less"]
    a: Figure
    b: Figure
    difference: float | None = Field(None, description="b - a")
    clear: bool | None = Field(None, description="beyond two standard errors of both; None: unknown")


class AreaComparison(Part):
    """name: "" for all areas together. verdicts, ways: of run a and b; None: the run has no such area."""

    name: str
    verdicts: tuple[VerdictKind | None, VerdictKind | None]
    ways: tuple[str | None, str | None]
    rows: tuple[Row, ...]


class Comparison(Part):
    """What two runs have in common and what differs."""

    a: dict[str, Any]
    b: dict[str, Any]
    notes: tuple[str, ...]
    areas: tuple[AreaComparison, ...]


_FIGURES: tuple[tuple[str, Show, Literal["more", "less"], Callable[[WayResult, WayResult], Figure]], ...] = (
    ("cells, full per kept", "times", "more", lambda way, full: way.reduction),
    ("cells at the peak", "cells", "less", lambda way, full: way.cells.peak_cells),
    ("perplexity, full cache", "number", "less", lambda way, full: full.perplexity),
    ("perplexity, anchors", "number", "less", lambda way, full: way.perplexity),
    ("perplexity ratio", "times", "less", lambda way, full: way.perplexity_ratio),
    ("context recovered", "share", "more", lambda way, full: way.context_recovered),
    ("right, full cache", "share", "more", lambda way, full: full.answering.correct),
    ("right, anchors", "share", "more", lambda way, full: way.answering.correct),
    ("right, of the full cache's", "share", "more", lambda way, full: way.answering.share_of_full),
    ("answers as the full cache's", "share", "more", lambda way, full: way.answering.agreement),
    ("writing, against full", "times", "more", lambda way, full: way.speed.decode_ratio),
    ("reading, against full", "times", "more", lambda way, full: way.speed.prefill_ratio),
    ("first token, against full", "times", "more", lambda way, full: way.speed.first_token_ratio),
)


def read(path: Path) -> PocReport:
    """The report in a report.json or in a run's folder. Raises SavedStateError when there is none, or it is damaged."""
    path = path.expanduser()
    file = path / REPORT if path.is_dir() else path
    try:
        return PocReport.from_json(file.read_text(encoding="utf-8"), str(file))
    except FileNotFoundError:
        raise SavedStateError(f"There is no report at {file}; name the report.json of a run, or its folder.") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise SavedStateError(f"The report {file} cannot be read ({why}); name the report.json of a run.") from None


def compare(a: PocReport, b: PocReport) -> Comparison:
    """The way that each run's own verdict is about, area by area, those of `a` first."""
    sides: tuple[dict[str, AreaResult], ...] = tuple(
        {"": run.overall, **{area.name: area for area in run.areas}} for run in (a, b)
    )
    names = dict.fromkeys([*sides[0], *sides[1]])
    areas = tuple(_area(name, sides[0].get(name), sides[1].get(name)) for name in names)
    return Comparison(a=_about(a), b=_about(b), notes=tuple(_notes(a, b)), areas=areas)


def _about(run: PocReport) -> dict[str, Any]:
    return {
        "title": run.title, "created": run.created, "model": run.model.name, "weights": run.model.weights,
        "adapter": run.model.adapter, "fingerprint": run.model.fingerprint, "documents": len(run.documents),
        "policies": list(run.policies),
    }


def _notes(a: PocReport, b: PocReport) -> Iterator[str]:
    """What keeps the figures from being about the same thing, a sentence each."""
    ours, theirs = ({document.sha256 for document in run.documents} for run in (a, b))
    if ours != theirs:
        yield f"The runs read other documents: {len(ours & theirs)} are in both, {len(ours ^ theirs)} in one alone."
    questions = [(run.overall.questions, run.own_questions) for run in (a, b)]
    if questions[0] != questions[1]:
        yield f"The runs asked other questions ({questions[0][0]} and {questions[1][0]})."
    if a.thresholds != b.thresholds:
        yield "The verdicts follow from other thresholds."
    if a.model.fingerprint == b.model.fingerprint and a.policies == b.policies:
        yield "Both runs have the same model and the same policies."
    machines = [run.environment.get("hardware", {}).get("processor") for run in (a, b)]
    if machines[0] != machines[1] or a.threads != b.threads:
        yield "The runs were timed on other machines or threads; of speed only the ratios to the full cache compare."


def _area(name: str, a: AreaResult | None, b: AreaResult | None) -> AreaComparison:
    ours, theirs = (_ways(area) for area in (a, b))
    rows = [
        _row(figure, show, better, *(of(*ways) if ways else Figure() for ways in (ours, theirs)))
        for figure, show, better, of in _FIGURES
    ]
    return AreaComparison(
        name=name, verdicts=(a.verdict.kind if a else None, b.verdict.kind if b else None),
        ways=tuple(f"{ways[0].policy}, recall {ways[0].recall}" if ways else None for ways in (ours, theirs)),  # type: ignore[arg-type]
        rows=tuple(row for row in rows if row.a.value is not None or row.b.value is not None),
    )


def _ways(area: AreaResult | None) -> tuple[WayResult, WayResult] | None:
    """The chosen way and the full cache."""
    if area is None:
        return None
    wanted = (area.verdict.policy, area.verdict.recall)
    found = [way for way in area.ways if (way.policy, way.recall) == wanted and way.policy != FULL]
    return (found[0], area.ways[0]) if found else None


def _row(figure: str, show: Show, better: Literal["more", "less"], a: Figure, b: Figure) -> Row:
    if a.value is None or b.value is None:
        return Row(figure=figure, show=show, better=better, a=a, b=b, difference=None, clear=None)
    difference = b.value - a.value
    clear = None
    if a.stderr is not None and b.stderr is not None:
        clear = abs(difference) > CLEAR * math.hypot(a.stderr, b.stderr)
    return Row(figure=figure, show=show, better=better, a=a, b=b, difference=difference, clear=clear)
