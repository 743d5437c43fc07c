"""Verdicts at the edges of their thresholds, and the rules and watch limits that follow from what was measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from anchorkv.config import RecallMode
from anchorkv.errors import ConfigError
from anchorkv.poc.results import (
    Answering,
    AreaResult,
    Cells,
    DocumentResult,
    Features,
    Figure,
    Speed,
    Suitability,
    Thresholds,
    WayResult,
)
from anchorkv.poc.rules import BECAUSE, condition, holds, rules, watch
from anchorkv.poc.verdict import passes, reasons, verdict

LIMITS = Thresholds(
    memory_reduction=5, speed_ratio=1, quality_share=0.9, perplexity_ratio=1.2, agreement=0.6, min_questions=5
)
PASSING = {"memory": 5.0, "decode": 1.0, "share": 0.9, "ratio": 1.2, "agreement": 0.6}
"""Every figure exactly at its limit."""


def fig(value: float | None, stderr: float | None = 0.01) -> Figure:
    return Figure(value=value, stderr=None if value is None else stderr, n=4)


def way(policy: str = "default", recall: RecallMode = "off", recalled: float | None = None, **given: Any) -> WayResult:
    values = {**PASSING, "prefill": 1.0, "first_token": 1.0, **given}
    one = fig(1.0)
    return WayResult(
        policy=policy, recall=recall, cells=Cells(end_cells=one, peak_cells=one, end_bytes=one, peak_bytes=one),
        reduction=fig(values["memory"]), speed=Speed(
            prefill=one, decode=one, first_token=one, prefill_ratio=fig(values["prefill"]),
            decode_ratio=fig(values["decode"]), first_token_ratio=fig(values["first_token"]),
        ),
        perplexity=one, perplexity_ratio=fig(values["ratio"]), context_recovered=one, answering=Answering(
            correct=one, share_of_full=fig(values["share"]), agreement=fig(values["agreement"]), answer_loss=one,
            recalled_cells=fig({"off": 0.0, "auto": 50.0, "on": 200.0}[recall] if recalled is None else recalled),
        ),
    )


FULL = way("full", memory=1.0)


def area(name: str, *ways: WayResult, **features: float) -> AreaResult:
    found = dict.fromkeys(set(Features.model_fields) - {"language"}, 0.01) | {"tokens": 100, **features}
    return AreaResult(
        name=name, documents=1, questions=9, tokens=100, ways=(FULL, *ways), verdict=verdict((FULL, *ways), LIMITS, 9),
        features=Features(**{**found, "language": "en"}),
        suitability=Suitability(expected_ratio=1.1, error=0.1, level="good", drivers=()),
    )


def document(curve: tuple[tuple[int, int, int], ...]) -> DocumentResult:
    return DocumentResult(id="a/1", area="a", title="1", tokens=100, sha256="0", ways=(), memory_curve=curve)


# --- verdicts ------------------------------------------------------------------------------------------------------


def test_what_reaches_every_limit_is_adopted() -> None:
    found = verdict([FULL, way()], LIMITS, 5)
    assert (found.kind, found.policy, found.recall) == ("adopt", "default", "off")
    assert [reason.kpi for reason in found.reasons] == ["memory", "speed", "quality", "perplexity", "agreement"]
    assert all(reason.passed for reason in found.reasons)
    assert found.reasons[0].stderr == 0.01


@pytest.mark.parametrize(
    ("name", "value"),
    [("memory", 4.999), ("decode", 0.999), ("share", 0.899), ("ratio", 1.201), ("agreement", 0.599)],
)
def test_just_below_one_limit_is_not_adopted_however_large_the_error(name: str, value: float) -> None:
    found = verdict([FULL, way(**{name: value})], LIMITS, 5)
    assert found.kind == "do_not_use"
    assert sum(reason.passed is False for reason in found.reasons) == 1


def test_the_mildest_recall_that_passes_is_taken() -> None:
    ways = [FULL, way(share=0.5), way(recall="auto"), way(recall="on", memory=9.0)]
    found = verdict(ways, LIMITS, 5)
    assert (found.kind, found.recall) == ("adopt_with_recall", "auto")
    assert verdict([*ways[:2], way(recall="auto", share=0.5), ways[3]], LIMITS, 5).recall == "on"
    assert verdict([FULL, way(), *ways[2:]], LIMITS, 5).kind == "adopt"


def test_recall_that_brought_nothing_back_is_no_recall() -> None:
    assert verdict([FULL, way(recall="auto", recalled=0.0)], LIMITS, 5).kind == "adopt"
    assert verdict([FULL, way(recall="auto", recalled=0.5)], LIMITS, 5).kind == "adopt_with_recall"


def test_of_policies_that_pass_the_one_that_keeps_fewest_cells_is_taken() -> None:
    ways = [FULL, way("mild", memory=6.0), way("strong", memory=12.0), way("wild", memory=24.0, share=0.1)]
    assert verdict(ways, LIMITS, 5).policy == "strong"
    mildest_first = verdict([FULL, way("strong", "auto", memory=12.0), way("mild", memory=6.0)], LIMITS, 5)
    assert (mildest_first.policy, mildest_first.kind) == ("mild", "adopt")


def test_where_nothing_passes_it_is_about_what_fails_least() -> None:
    worse = way("c", memory=2.0, decode=0.5)
    found = verdict([FULL, way("a", share=0.1, ratio=2.0), way("b", share=0.1), worse], LIMITS, 5)
    assert (found.kind, found.policy) == ("do_not_use", "b")


def test_too_few_questions_are_shown_and_not_judged() -> None:
    found = verdict([FULL, way(share=0.1, agreement=0.1)], LIMITS, 4)
    assert found.kind == "not_enough_data"  # perplexity alone does not tell whether answers hold
    judged = {reason.kpi: reason.passed for reason in found.reasons}
    assert judged == {"memory": True, "speed": True, "quality": None, "perplexity": True, "agreement": None}
    assert found.reasons[2].value == 0.1
    assert verdict([FULL, way(share=0.1, agreement=0.1)], LIMITS, 5).kind == "do_not_use"


def test_nothing_that_tells_of_quality_is_not_enough() -> None:
    assert verdict([FULL, way(ratio=None)], LIMITS, 4).kind == "not_enough_data"
    assert verdict([FULL, way(ratio=None, share=None, agreement=None)], LIMITS, 50).kind == "not_enough_data"
    assert verdict([FULL], LIMITS, 50).kind == "not_enough_data"
    assert verdict([FULL, way(ratio=None)], LIMITS, 5).kind == "adopt"


def test_what_was_not_timed_does_not_fail_but_unknown_memory_does_not_pass() -> None:
    assert verdict([FULL, way(decode=None)], LIMITS, 5).kind == "adopt"
    assert not passes(reasons(way(memory=None), LIMITS, 5))


def test_a_slower_first_token_is_told_and_does_not_decide() -> None:
    found = verdict([FULL, way(first_token=0.2, prefill=1.0)], LIMITS, 5)
    assert found.kind == "adopt"
    assert [(r.kpi, r.part, r.value, r.passed) for r in found.reasons[5:]] == [("speed", "first_token", 0.2, False)]


# --- rules ---------------------------------------------------------------------------------------------------------


def test_areas_that_differ_from_the_whole_have_rules_of_their_own() -> None:
    overall = area("", way("strong", memory=12.0), way("strong", "auto", memory=12.0), way("mild", memory=6.0))
    areas = [
        area("good", way("strong", memory=12.0)),
        area("asks", way("strong", memory=12.0, share=0.2), way("strong", "auto", memory=12.0)),
        area("hard", way("strong", memory=12.0, ratio=3.0)),
        area("dense", way("strong", memory=12.0, ratio=3.0), way("mild", memory=6.0)),
    ]
    found = {rule.when: rule for rule in rules(overall, areas, [], LIMITS)}
    assert (found['area == "asks"'].then, found['area == "asks"'].because) == ("recall", "needs_recall")
    hard = found['area == "hard"']
    assert (hard.then, hard.because, hard.evidence) == ("full", "fails_perplexity", 3.0)
    assert found['area == "dense"'].then == "milder"
    assert 'area == "good"' not in found
    assert {rule.because for rule in found.values()} <= set(BECAUSE)


def test_a_feature_that_parts_failing_areas_from_good_ones_becomes_a_rule() -> None:
    good, bad = area("prose", way(), tables=0.02), area("lists", way(ratio=3.0), tables=0.4)
    found = [rule for rule in rules(area("", way()), [good, bad], [], LIMITS) if rule.because == "like_failing_areas"]
    assert [(rule.when, rule.then) for rule in found] == [("features.tables > 0.21", "full")]
    again = area("minutes", way(ratio=3.0), returning_terms=0.3)
    found = [rule for rule in rules(area("", way()), [good, again], [], LIMITS) if rule.because == "like_failing_areas"]
    assert [rule.when for rule in found] == ["features.returning_terms > 0.155"]
    slow = area("lists", way(decode=0.1), tables=0.4)  # a table does not make it slow
    assert not [r for r in rules(area("", way()), [good, slow], [], LIMITS) if r.because == "like_failing_areas"]


def test_texts_too_short_to_save_anything_keep_the_full_cache() -> None:
    curves = [((100, 100, 90), (200, 200, 40), (400, 400, 40)), ((100, 100, 90), (300, 300, 60))]
    found = [r for r in rules(area("", way()), [], [document(c) for c in curves], LIMITS) if r.because == "short_text"]
    assert [rule.when for rule in found] == ["tokens < 250"]
    recalling = area("", way(recall="auto", recalled=40.0))
    found = [r for r in rules(recalling, [], [document(curves[0])], LIMITS) if r.because == "short_text"]
    assert [rule.when for rule in found] == ["tokens < 400"]


def test_few_questions_do_not_blind_the_watch() -> None:
    for value, stderr, floor in ((0.6, 0.19, 0.3), (0.9, 0.19, 0.33), (0.2, 0.19, 0.2)):
        one = way()
        answering = one.answering.model_copy(update={"agreement": fig(value, stderr)})
        seen = watch(one.model_copy(update={"answering": answering}), LIMITS)
        assert seen.agreement_floor == pytest.approx(floor)


def test_the_watch_is_three_errors_wide() -> None:
    seen = watch(way(ratio=1.1), LIMITS)
    assert seen.loss_gap == pytest.approx(math.log(1.1))
    assert seen.loss_gap_limit == pytest.approx(math.log(1.1) + 3 * 0.01 / 1.1)
    assert seen.agreement_floor == pytest.approx(0.57)
    blind = watch(None, LIMITS)
    assert (blind.loss_gap_limit, blind.agreement_floor) == (pytest.approx(math.log(1.2)), 0.6)


def test_conditions_hold_for_known_facts_alone() -> None:
    assert holds("features.tables > 0.2", {"features.tables": 0.3})
    assert not holds("features.tables > 0.2", {"features.tables": 0.2})
    assert not holds("features.tables > 0.2", {"features.code": 0.9})
    assert holds('area == "求人 票"', {"area": "求人 票"})
    assert not holds("tokens < 500", {"tokens": "many"})


@pytest.mark.parametrize("when", [
    "", "tokens", "tokens < many", "__import__('os')", "tokens < 5; area == \"x\"", "area > \"x\"", "area == 5",
    "tokens == true", "secrets.x > 1",
])
def test_what_is_no_condition_is_one_sentence(when: str) -> None:
    with pytest.raises(ConfigError, match="no condition of a rule"):
        condition(when)
