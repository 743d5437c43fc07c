"""The verdict on an area: which policy with which recall reaches all thresholds. Pure functions of what was measured.

A threshold is passed when the value reaches it, however large the value's standard error; the reason carries both, so
that a report can call a narrow one narrow.
"""

from __future__ import annotations

from collections.abc import Sequence

from anchorkv.poc.results import Figure, Kpi, Reason, Thresholds, Verdict, VerdictKind, WayResult

MILDEST = ("off", "auto", "on")
"""Recall modes, the one that costs least first."""
QUALITY: tuple[Kpi, ...] = ("quality", "perplexity", "agreement")
"""What tells whether answers hold."""
NEEDED: tuple[Kpi, ...] = ("memory", "quality")
"""Without these an area is never adopted: perplexity alone does not tell whether answers hold."""


def verdict(ways: Sequence[WayResult], thresholds: Thresholds, questions: int) -> Verdict:
    """ways: of one area, the full cache first. questions: asked in it.

    adopt: all KPIs pass without recall, or with recall that had nothing to bring back. adopt_with_recall: they pass
    with recall alone. do_not_use: some KPI is missed in every way. not_enough_data: none is missed, but too little
    could be judged, as when the full cache itself answers nothing. The mildest recall that passes is taken, and of
    several policies the one that keeps fewest cells; where nothing passes, the one that fails least.
    """
    tried = [(way, reasons(way, thresholds, questions)) for way in ways[1:]]
    if not tried:
        return Verdict(kind="not_enough_data", policy=ways[0].policy, recall="off", reasons=())
    passing = [(way, why) for way, why in tried if passes(why)]
    if passing:
        way, why = min(passing, key=lambda found: (_mildness(found[0]), -_reduction(found[0])))
        kind: VerdictKind = "adopt" if _mildness(way) == 0 else "adopt_with_recall"
    else:
        way, why = min(tried, key=lambda found: (failed(found[1]), _mildness(found[0]), -_reduction(found[0])))
        kind = "do_not_use" if failed(why) else "not_enough_data"
    return Verdict(kind=kind, policy=way.policy, recall=way.recall, reasons=why)


def reasons(way: WayResult, thresholds: Thresholds, questions: int) -> tuple[Reason, ...]:
    """A comparison for each KPI, in a fixed order, and for each part of speed besides writing that fails its limit.

    Perplexity is that of a text read on, where nothing is asked and so nothing recalled: of ways without recall alone.
    """
    answering, speed, enough = way.answering, way.speed, questions >= thresholds.min_questions
    found = [
        _at_least("memory", way.reduction, thresholds.memory_reduction),
        _at_least("speed", speed.decode_ratio, thresholds.speed_ratio),
        _at_least("quality", answering.share_of_full, thresholds.quality_share, enough),
        *([_at_most("perplexity", way.perplexity_ratio, thresholds.perplexity_ratio)] if way.recall == "off" else []),
        _at_least("agreement", answering.agreement, thresholds.agreement, enough),
    ]
    slower = {"prefill": speed.prefill_ratio, "first_token": speed.first_token_ratio}
    for part, figure in slower.items():
        reason = _at_least("speed", figure, thresholds.speed_ratio)
        if reason.passed is False:
            found.append(reason.model_copy(update={"part": part}))
    return tuple(found)


def passes(found: Sequence[Reason]) -> bool:
    """Whether no KPI fails, and those that are needed were judged."""
    judged = {reason.kpi for reason in found if reason.passed}
    return judged.issuperset(NEEDED) and failed(found) == 0


def failed(found: Sequence[Reason]) -> int:
    """KPIs that are missed."""
    return sum(reason.passed is False and not reason.part for reason in found)


def _at_least(kpi: Kpi, figure: Figure, limit: float, enough: bool = True) -> Reason:
    passed = figure.value >= limit if enough and figure.value is not None else None
    return Reason(kpi=kpi, value=figure.value, stderr=figure.stderr, limit=limit, passed=passed)


def _at_most(kpi: Kpi, figure: Figure, limit: float) -> Reason:
    passed = None if figure.value is None else figure.value <= limit
    return Reason(kpi=kpi, value=figure.value, stderr=figure.stderr, limit=limit, passed=passed)


def _mildness(way: WayResult) -> int:
    """0 for no recall: off, or nothing brought back."""
    return 0 if way.answering.recalled_cells.value == 0 else MILDEST.index(way.recall)


def _reduction(way: WayResult) -> float:
    return way.reduction.value or 0.0
