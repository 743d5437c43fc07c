"""When not to trust anchors: rules proposed from what was measured, and what a running service should watch.

A rule's condition is `NAME OPERATOR VALUE`, the value in JSON. Names: `area`, `tokens` (of a document), `features.X`
(a share of results.Features), `watch.loss_gap`, `watch.agreement`. What `because` can be is listed in BECAUSE.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from pydantic import Field

from anchorkv.errors import ConfigError
from anchorkv.poc.results import AreaResult, DocumentResult, FallbackRule, Part, Thresholds, WayResult
from anchorkv.poc.verdict import QUALITY

FEATURES = (
    "numbers", "names", "code", "tables", "repeated_names", "rare_words", "returning_terms", "returning_phrases",
    "japanese",
)
"""Those that a rule may follow from: shares, so that a limit between two areas means something."""
BECAUSE = (
    "fails_memory", "fails_speed", "fails_quality", "fails_perplexity", "fails_agreement", "needs_recall",
    "milder_passes", "like_failing_areas", "short_text", "loss_gap_grew", "agreement_fell",
)
ERRORS = 3.0
"""A watched figure is out of what was measured when it is so many standard errors away."""
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}
_CONDITION = re.compile(r"(area|tokens|features\.[a-z_]+|watch\.[a-z_]+) (==|<=|>=|<|>) (.+)")


class Watch(Part):
    """What a service compares its own sample with; outside of it, it falls back."""

    loss_gap: float = Field(description="expected: nats a token that the anchored side loses against the full cache")
    loss_gap_limit: float = Field(description="above this the text is unlike what was measured")
    agreement: float | None = Field(None, description="expected share of answers that say what the full cache's say")
    agreement_floor: float = Field(description="below this")
    reduction: float | None = Field(None, description="expected cells of the full cache per cell kept")


def watch(way: WayResult | None, thresholds: Thresholds) -> Watch:
    """From what was measured of the chosen way, with the thresholds where nothing was or its error is unknown."""
    limit = math.log(thresholds.perplexity_ratio)
    ratio = way.perplexity_ratio if way else None
    agreement = way.answering.agreement if way else None
    gap = math.log(ratio.value) if ratio and ratio.value else 0.0
    if ratio and ratio.value and ratio.stderr is not None:
        limit = gap + ERRORS * ratio.stderr / ratio.value  # the error of a logarithm is the relative one
    floor = thresholds.agreement
    if agreement and agreement.value is not None and agreement.stderr:
        # A few questions leave an error so large that nothing would ever be below it.
        least = min(thresholds.agreement / 2, agreement.value)
        floor = max(least, agreement.value - ERRORS * agreement.stderr)
    return Watch(
        loss_gap=gap, loss_gap_limit=max(gap, limit), agreement=agreement.value if agreement else None,
        agreement_floor=floor, reduction=way.reduction.value if way else None,
    )


def rules(
    overall: AreaResult, areas: Sequence[AreaResult], documents: Sequence[DocumentResult], thresholds: Thresholds
) -> tuple[FallbackRule, ...]:
    """What the data speak for: areas of their own, texts like those that failed, texts too short, and the watch."""
    chosen = chosen_way(overall)
    found = [rule for area in areas if (rule := _of_area(area, overall)) is not None]
    found += _of_features(areas)
    found += _of_length(documents, chosen, thresholds)
    seen = watch(chosen, thresholds)
    if chosen is not None and any(area.verdict.kind.startswith("adopt") for area in (overall, *areas)):
        then = "full" if chosen.recall == "on" else "recall"
        found.append(_rule("watch.loss_gap", ">", seen.loss_gap_limit, then, "loss_gap_grew", seen.loss_gap))
        found.append(
            _rule("watch.agreement", "<", seen.agreement_floor, "full", "agreement_fell", seen.agreement)
        )
    return tuple(found)


def chosen_way(area: AreaResult) -> WayResult | None:
    """The way that an area's verdict is about, None where only the full cache was measured."""
    wanted = area.verdict.policy, area.verdict.recall
    return next((way for way in area.ways[1:] if (way.policy, way.recall) == wanted), None)


def holds(when: str, facts: Mapping[str, Any]) -> bool:
    """Whether a condition holds; of what `facts` does not tell, nothing does. Raises ConfigError for no condition."""
    name, compare, value = condition(when)
    known = facts.get(name)
    return known is not None and isinstance(known, str) == isinstance(value, str) and bool(compare(known, value))


def condition(when: str) -> tuple[str, Callable[[Any, Any], bool], str | float]:
    """Name, operator and value of a rule's `when`. Raises ConfigError, one sentence, for anything else."""
    found = _CONDITION.fullmatch(when)
    try:
        value = json.loads(found[3]) if found else None
    except ValueError:
        value = None
    text = found is not None and found[1] == "area"
    kinds = str if text else (int, float)
    if found is None or not isinstance(value, kinds) or isinstance(value, bool) or (text and found[2] != "=="):
        raise ConfigError(
            f"{when!r} is no condition of a rule; write NAME OPERATOR VALUE, such as features.tables > 0.2."
        )
    return found[1], _OPERATORS[found[2]], value


def _of_area(area: AreaResult, overall: AreaResult) -> FallbackRule | None:
    verdict = area.verdict
    if verdict.kind == "do_not_use":
        missed = next(reason for reason in verdict.reasons if reason.passed is False and not reason.part)
        return _rule("area", "==", area.name, "full", f"fails_{missed.kpi}", missed.value)
    if verdict.kind == "adopt_with_recall" and overall.verdict.kind != "adopt_with_recall":
        return _rule("area", "==", area.name, "recall", "needs_recall", _share(area))
    if verdict.kind.startswith("adopt") and verdict.policy != overall.verdict.policy:
        mine, theirs = chosen_way(area), chosen_way(overall)
        if mine and theirs and (mine.reduction.value or 0) < (theirs.reduction.value or 0):
            return _rule("area", "==", area.name, "milder", "milder_passes", mine.reduction.value)
    return None


def _share(area: AreaResult) -> float | None:
    way = chosen_way(area)
    return way.answering.share_of_full.value if way else None


def _of_features(areas: Sequence[AreaResult]) -> list[FallbackRule]:
    """The feature that parts the areas whose quality failed from all that passed most clearly, if one does."""
    bad = [area for area in areas if area.verdict.kind == "do_not_use" and _quality_failed(area)]
    good = [area for area in areas if area.verdict.kind.startswith("adopt")]
    best: tuple[float, str, float] | None = None
    for name in FEATURES if bad and good else ():
        low = max(getattr(area.features, name) for area in good)
        high = min(getattr(area.features, name) for area in bad)
        if high > 2 * low and high > 0.02 and (best is None or high - low > best[0]):
            best = high - low, name, (low + high) / 2
    return [_rule(f"features.{best[1]}", ">", best[2], "full", "like_failing_areas", best[2])] if best else []


def _quality_failed(area: AreaResult) -> bool:
    return any(reason.kpi in QUALITY and reason.passed is False for reason in area.verdict.reasons)


def _of_length(
    documents: Sequence[DocumentResult], chosen: WayResult | None, thresholds: Thresholds
) -> list[FallbackRule]:
    """Texts so short that even at the threshold's reduction nothing is saved: the median length at which the memory
    curves reach it, recalled cells counted."""
    recalled = (chosen.answering.recalled_cells.value or 0.0) if chosen else 0.0
    reached = []
    for document in documents:
        wanted = thresholds.memory_reduction
        enough = [full for _, full, kept in document.memory_curve if full >= wanted * (kept + recalled)]
        reached += enough[:1]
    if not reached:
        return []
    length = round(median(reached))
    return [_rule("tokens", "<", length, "full", "short_text", float(length))]


def _rule(name: str, sign: str, value: str | float, then: Any, because: str, evidence: float | None) -> FallbackRule:
    shown = json.dumps(value if isinstance(value, str | int) else float(f"{value:.3g}"), ensure_ascii=False)
    return FallbackRule(when=f"{name} {sign} {shown}", then=then, because=because, evidence=evidence)
