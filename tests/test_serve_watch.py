"""The watch: bounds that hold, drift found soon and not for nothing, a fair share, nothing forgotten over a restart."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from watch_world import (
    DROPS_FACTS,
    FACTS,
    FULL_POLICY,
    KEEPS_FACTS,
    KIND,
    POLICY,
    Clock,
    FactEngine,
    World,
    answered_by,
    ask_of,
    findings_of,
    serve,
    text_of,
    watch_of,
)

from anchorkv.config import AnchorConfig
from anchorkv.errors import AnchorKVError, DataError, SavedStateError
from anchorkv.poc.rules import Watch as Limits
from anchorkv.samples import questions as sample_questions
from anchorkv.serve.breaker import Breakers
from anchorkv.serve.canary import Canary, CanaryQuestion, canary_questions
from anchorkv.serve.check import CheckFailed, check, whole
from anchorkv.serve.estimates import HALF_LIFE, Rolling, Watched, mean_score, share_score
from anchorkv.serve.policies import Chosen
from anchorkv.serve.requests import Ask, Busy, Load, Message, Outcome, TooLarge
from anchorkv.serve.scheduler import Scheduler
from anchorkv.serve.series import Series
from anchorkv.serve.settings_groups import CanarySettings, WatchSettings
from anchorkv.serve.watch import MOST_WAITING, low_priority
from anchorkv.serve.watchstore import KEPT, WatchStore

LIMITS = Limits(loss_gap=0.02, loss_gap_limit=0.25, agreement=0.9, agreement_floor=0.6)


# --- estimates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [12, 40])
def test_bounds_cover_what_they_say(n: int) -> None:
    """Student's and Wilson's 95 % bounds hold the truth in about 95 of 100 cases, where nothing fades."""
    generator, hits, shares, trials = np.random.default_rng(1), 0, 0, 1500
    for _ in range(trials):
        mean, share = Rolling(), Rolling()
        for value in generator.normal(0.3, 0.5, n):
            mean.add(value, 0.0, 1e9)
        for value in generator.random(n) < 0.8:
            share.add(float(value), 0.0, 1e9)
        bounds, counted = mean.mean_bounds(0.0, 0.95), share.share_bounds(0.0, 0.95)
        assert bounds is not None
        assert counted is not None
        hits += bounds.low <= 0.3 <= bounds.high
        shares += counted.low <= 0.8 <= counted.high
    assert 0.93 <= hits / trials <= 0.97
    assert 0.92 <= shares / trials <= 0.985


def test_old_values_fade_by_count_and_by_time() -> None:
    rolling = Rolling()
    for _ in range(50):
        rolling.add(0.0, 0.0, 20)
    assert 15 < rolling.n(0.0) < 20
    assert rolling.n(HALF_LIFE) == pytest.approx(rolling.n(0.0) / 2)
    wide, narrow = rolling.share_bounds(4 * HALF_LIFE, 0.95), rolling.share_bounds(0.0, 0.95)
    assert wide is not None
    assert narrow is not None
    assert wide.high > narrow.high
    rolling.add(1.0, 4 * HALF_LIFE, 20)
    assert rolling.mean > 0.4  # the old ones together weigh about one


def test_a_clock_that_goes_back_changes_nothing() -> None:
    back, still = Rolling(), Rolling()
    for now in (100.0, 50.0, 20.0):
        back.add(1.0, now, 200)
        still.add(1.0, 100.0, 200)
    assert back.as_dict() == still.as_dict()


def test_a_change_is_what_the_estimate_is_made_of_after_an_alarm() -> None:
    watched = Watched()
    for _ in range(150):
        watched.add(1.0, share_score(True, 0.9, 0.6), 0.0, 200)
    alarms = [watched.add(0.0, share_score(False, 0.9, 0.6), 0.0, 200) for _ in range(20)]
    assert alarms.count(True) >= 1
    assert watched.rolling.mean == 0.0


def test_no_single_answer_is_an_alarm() -> None:
    watched = Watched()
    assert not watched.add(1e6, mean_score(1e6, 0.0, 0.3, 0.06), 0.0, 200)


def test_false_drift_alarms_are_rare() -> None:
    """CUSUM's bound (Lorden): at least 20,000 checks between false alarms; 40,000 checks of healthy answers."""
    generator, alarms = random.Random(7), 0
    for _ in range(20):
        series = Series()
        for _ in range(2000):
            gap = generator.gauss(LIMITS.loss_gap, 0.25)
            alarms += len(series.add(gap, generator.random() < 0.9, LIMITS, 0.0, 200))
    assert alarms <= 4


# --- which answers are checked -------------------------------------------------------------------------------------


def test_the_share_follows_what_is_known() -> None:
    clock, world = Clock(), World()
    watch, findings, _ = watch_of(world, clock)
    limits = findings.limits(KIND)
    shares = [watch.share("a", POLICY, KIND)]
    for number in range(40):
        findings.choose("a", POLICY, KIND, 0.0, 0.0)
        findings.series("a", POLICY, KIND).add(0.0, number % 20 != 0, limits, clock.now, 200)
        shares.append(watch.share("a", POLICY, KIND))
    assert shares[0] == watch.settings.most_share
    assert shares[-1] == pytest.approx(watch.settings.share)
    assert shares[20] > shares[30]
    findings.series("a", POLICY, KIND).look = 3
    assert watch.share("a", POLICY, KIND) == watch.settings.most_share
    assert watch.share("a", Chosen(POLICY.name, POLICY.config.replace(reduction=13)), KIND) == watch.settings.most_share


def test_the_share_rises_near_a_limit_and_falls_while_busy_within_its_bounds() -> None:
    clock, world, load = Clock(), World(), {"sessions": 1, "max_sessions": 4, "waiting": 0}
    watch, findings, _ = watch_of(world, clock)
    watch._load = lambda: _load(load)
    findings.choose("a", POLICY, KIND, 0.0, 0.0)
    series, limits = findings.series("a", POLICY, KIND), findings.limits(KIND)
    for number in range(60):
        series.add(0.0, number % 3 != 0, limits, clock.now, 200)
    series.look = 0
    near = watch.share("a", POLICY, KIND)
    assert watch.settings.share < near <= watch.settings.most_share
    load["sessions"] = 4
    assert watch.settings.share / 4 <= watch.share("a", POLICY, KIND) < near


def _load(given: dict[str, int]) -> Load:
    names = dict.fromkeys(Load.__dataclass_fields__, 0)
    return Load(**{**names, **given, "draining": False})  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.25, 1.0])
def test_choosing_gives_the_share(share: float) -> None:
    series, generator = Series(), random.Random(4)
    chosen = sum(series.choose(share, generator.random()) for _ in range(10_000))
    assert chosen == pytest.approx(10_000 * share, rel=0.05)


def test_what_waits_for_a_check_is_bounded_and_what_is_passed_over_counted() -> None:
    clock, world = Clock(), World()
    watch, _, _ = watch_of(world, clock, settings=WatchSettings(share=1, most_share=1))
    for number in range(100):
        watch.answered(answered_by(world, ask_of(number)))
    assert len(watch._jobs) == MOST_WAITING
    assert watch.counts["queue_full"] == 100 - MOST_WAITING
    long = answered_by(world, ask_of(1))
    watch.answered(replace(long, outcome=replace(long.outcome, prompt_tokens=10**6)))
    assert watch.counts["too_long"] == 1


def test_what_nothing_was_dropped_from_is_not_checked() -> None:
    clock, world = Clock(), World()
    watch, _, _ = watch_of(world, clock, settings=WatchSettings(share=1, most_share=1))
    watch.answered(answered_by(world, ask_of(1, policy=FULL_POLICY)))
    watch.answered(replace(found := answered_by(world, ask_of(2)), outcome=replace(found.outcome, finish="cancelled")))
    assert not watch._jobs
    assert watch.counts == {"answers": 1, "whole": 1}


@pytest.mark.parametrize(
    ("error", "counted"),
    [(TooLarge("no room"), "too_large"), (Busy("full", 1.0), "busy"), (AnchorKVError("no"), "failed"),
     (RuntimeError("a bug"), "failed")],
)
def test_the_watch_survives_every_failing_check(error: Exception, counted: str) -> None:
    async def run() -> None:
        clock, world = Clock(), World()
        watch, findings, _ = watch_of(world, clock, settings=WatchSettings(share=1, most_share=1))
        original = world.run

        async def fail(ask: Ask) -> Outcome:
            raise error

        watch.start()
        watch._run = fail
        watch.answered(answered_by(world, ask_of(1)))
        await watch.idle()
        assert watch.counts[counted] == 1
        watch._run = original
        watch.answered(answered_by(world, ask_of(2)))
        await watch.idle()
        assert watch.counts["checked"] == 1
        assert len(findings.checks) == 1
        await watch.stop()

    asyncio.run(run())


# --- one check -----------------------------------------------------------------------------------------------------


def _scripted(answers: Callable[[Ask], tuple[tuple[int, ...], float]], asked: list[Ask]) -> Any:
    async def run(ask: Ask) -> Outcome:
        asked.append(ask)
        tokens, score = answers(ask)
        text = " ".join(f"word{token}" for token in tokens)
        return Outcome(ask.id, ask.tenant, "stop", text, ask.policy, tokens=tokens, answer_logprob=score)

    return run


def test_an_answer_that_the_full_cache_gives_as_well_takes_one_run() -> None:
    world, asked = World(), list[Ask]()
    ask = ask_of(1)
    outcome = replace(world.answer(ask), tokens=(1, 2), answer_logprob=-0.5)
    found = asyncio.run(check(
        ask, outcome, _scripted(lambda ask: ((1, 2), -0.4), asked), policy="anchors", kind="", gap_limit=0.2
    ))
    assert [it.policy for it in asked] == [FULL_POLICY]
    assert found.agreed is True
    assert found.loss_gap == pytest.approx(-0.1)
    assert not found.missed


def test_the_segment_that_would_have_mattered_is_found() -> None:
    """Of three dropped segments that share words with the answers, the one that makes the full cache's likelier."""
    asked: list[Ask] = []

    def answers(ask: Ask) -> tuple[tuple[int, ...], float]:
        if ask.policy == FULL_POLICY:
            return ((7, 8), -0.2) if ask.given is None else (ask.given, -4.0)
        assert ask.given == (7, 8)
        return ask.given, -0.6 if 2 in (ask.recall_segments or ()) else -3.0

    ask, world = ask_of(1), World()
    text = ("word7 stands here", "word9 stands here", "word8 and word7 stand here", "nothing of it")
    segments = tuple(replace(world.answer(ask).segments[0], number=n, text=text[n], stop=40) for n in range(4))
    outcome = replace(
        world.answer(ask), tokens=(9, 9), text="word9 word9", answer_logprob=-0.5, segments=segments, prompt_tokens=200
    )
    found = asyncio.run(check(ask, outcome, _scripted(answers, asked), policy="anchors", kind="", gap_limit=0.2))
    assert found.agreed is False
    assert found.loss_gap == pytest.approx(3.5)
    assert found.tried == 3
    assert [missed.number for missed in found.missed] == [2]
    assert found.missed[0].gain == pytest.approx(4.8)
    assert found.good(0.2) is False


def test_sampled_answers_are_judged_by_their_loss_alone() -> None:
    world, asked = World(), list[Ask]()
    ask = ask_of(1)
    ask = replace(ask, sampling=replace(ask.sampling, temperature=1.0))
    outcome = world.answer(ask)
    found = asyncio.run(check(
        ask, outcome, _scripted(lambda ask: (ask.given or (0,), -0.4), asked), policy="anchors", kind="", gap_limit=0.2
    ))
    assert found.agreed is None
    assert found.loss_gap is not None
    assert [it.given for it in asked] == [outcome.tokens]


def test_a_run_that_ends_badly_is_no_check() -> None:
    async def run(ask: Ask) -> Outcome:
        return Outcome(ask.id, ask.tenant, "error", "", ask.policy, error="the cells ran out")

    with pytest.raises(CheckFailed, match="the cells ran out"):
        asyncio.run(check(ask_of(1), World().answer(ask_of(1)), run, policy="anchors", kind="", gap_limit=0.2))


def test_checks_hold_no_text() -> None:
    async def run() -> None:
        clock, world = Clock(), World()
        world.bad = {"anchors"}
        watch, findings, ladder = watch_of(world, clock, settings=WatchSettings(share=1, most_share=1))
        watch.start()
        await serve(watch, ladder, world, clock, 1)
        shown = json.dumps(watch.status())
        assert len(findings.checks) == 1
        assert "word1" not in shown
        assert "passage" not in shown
        await watch.stop()

    asyncio.run(run())


# --- a simulated service -------------------------------------------------------------------------------------------


def test_detection_within_100_requests_and_false_alarms() -> None:
    """Four services: 2,000 healthy requests each open no breaker, and then the policy goes bad without a word."""

    async def run(seed: int) -> tuple[int, int]:
        world, clock = World(seed), Clock()
        watch, findings, ladder = watch_of(world, clock, seed=seed)
        watch.start()
        for number in range(2000):
            await serve(watch, ladder, world, clock, number)
        healthy = sum(findings.breakers.transitions.values())
        assert 40 <= watch.counts["checked"] <= 250  # about 2 %, and what the first checks and doubts cost
        world.bad = {"anchors"}
        for number in range(2000, 2100):
            await serve(watch, ladder, world, clock, number)
            if findings.breakers.transitions["closed", "open"]:
                await watch.stop()
                return healthy, number - 1999
        await watch.stop()
        return healthy, 1000

    found = [asyncio.run(run(seed)) for seed in range(4)]
    assert sum(healthy for healthy, _ in found) == 0
    assert max(requests for _, requests in found) <= 100, found


def test_nothing_depends_on_how_sure_a_bad_policy_is_of_itself() -> None:
    """A new policy is looked at closely from its first request on."""

    async def run(seed: int) -> int:
        world, clock = World(seed), Clock()
        world.bad, world.bad_logprob = {"anchors"}, -0.31
        watch, findings, ladder = watch_of(world, clock, seed=seed)
        watch.start()
        for number in range(100):
            await serve(watch, ladder, world, clock, number)
            if findings.breakers.transitions["closed", "open"]:
                break
        await watch.stop()
        return number + 1

    assert max(asyncio.run(run(seed)) for seed in range(6)) <= 60


def test_one_tenant_cannot_open_the_breaker_of_a_kind() -> None:
    async def run(tenants: tuple[str, ...]) -> set[tuple[str, str]]:
        world, clock = World(1), Clock()
        world.bad = {"anchors"}
        watch, findings, ladder = watch_of(world, clock, settings=WatchSettings(share=1, most_share=1))
        ladder.settings = ladder.settings.model_copy(update={"breaker": False})
        watch.start()
        for number in range(40):
            await serve(watch, ladder, world, clock, number, tenant=tenants[number % len(tenants)])
        await watch.stop()
        return {(key.tenant, key.kind) for key, breaker in findings.breakers.all() if breaker.state != "closed"}

    assert asyncio.run(run(("a",))) == {("a", "*")}
    assert asyncio.run(run(("a", "b"))) == {("a", "*"), ("b", "*"), ("*", KIND)}


# --- over a restart ------------------------------------------------------------------------------------------------


def test_state_survives_a_restart_and_a_kill(tmp_path: Path) -> None:
    """Without `stop`: what was checked is on the disk as soon as it is checked."""

    async def run() -> Any:
        world, clock = World(3), Clock()
        world.bad = {"anchors"}
        watch, findings, ladder = watch_of(world, clock, store=WatchStore(tmp_path / "watch.db"))
        watch.start()
        for number in range(60):
            await serve(watch, ladder, world, clock, number)
        return findings

    before = asyncio.run(run())
    clock = Clock()
    clock.now = 5.0  # a monotonic clock begins anew
    after = findings_of(clock, WatchStore(tmp_path / "watch.db"))
    shown = after.estimates()
    assert [row["checks"] for row in shown] == [row["checks"] for row in before.estimates()]
    assert shown[0]["agreement"]["value"] == pytest.approx(before.estimates()[0]["agreement"]["value"])
    assert [alarm.code for alarm in after.alarms] == [alarm.code for alarm in before.alarms]
    [(_, breaker)] = after.breakers.all()
    assert breaker.state == "open"
    [saved] = WatchStore(tmp_path / "watch.db").load("breaker").values()
    clock.now += 60 - saved["waited"] - 0.1
    assert after.breakers.all()[0][1].state == "open"
    clock.now += 0.2
    assert after.breakers.all()[0][1].state == "half_open"


def test_a_damaged_file_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "watch.db"
    path.write_bytes(b"no database at all" * 100)
    store = WatchStore(path)
    assert store.load("series") == {}
    assert (tmp_path / "watch.db.damaged").is_file()
    assert "set aside" in caplog.text


def test_a_damaged_entry_is_passed_over(tmp_path: Path) -> None:
    store = WatchStore(tmp_path / "watch.db")
    store.save("series", {"no key": {}, json.dumps(["a", "m", "p", "k"]): {"checks": "many"}})
    store.save("breaker", {json.dumps(["a", "m", "p", "*"]): {"state": "ajar"}})
    assert findings_of(Clock(), store).estimates() == []


def test_the_file_is_bounded(tmp_path: Path) -> None:
    store = WatchStore(tmp_path / "watch.db")
    store.save("series", {}, entries=[("check", number) for number in range(KEPT + 500)])
    assert len(store.newest("check", 10 * KEPT)) == KEPT
    assert store.newest("check", 1) == [KEPT + 499]


def test_what_cannot_be_saved_is_saved_later(tmp_path: Path) -> None:
    path = tmp_path / "watch.db"
    store, clock, world = WatchStore(path), Clock(), World()
    findings = findings_of(clock, store)
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    store._db.execute("PRAGMA busy_timeout = 10")
    findings.written("a", POLICY, KIND, -0.5)
    findings.save()
    with pytest.raises(SavedStateError):
        store.save("series", {"x": 1})
    other.rollback()
    findings.save()
    assert len(store.load("series")) == 1
    assert world.asked == []


def test_series_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anchorkv.serve.findings.MOST_SERIES", 50)
    findings = findings_of(Clock())
    for number in range(500):
        findings.written("a", Chosen("custom", AnchorConfig(reduction=2 + number)), KIND, -0.5)
    assert len(findings._series) == 50


# --- canary --------------------------------------------------------------------------------------------------------


def test_the_bundled_questions_are_a_canary() -> None:
    found = canary_questions(sample_questions())
    assert len(found) > 20
    assert {question.kind for question in found} >= {"contracts", "support"}
    assert all(question.text and question.answers for question in found)


def test_a_canary_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"canary\.jsonl"):
        canary_questions(tmp_path / "canary.jsonl")


class _Answers:
    """Knows all answers; the policy forgets `lost` of them, and the model `unknown`."""

    def __init__(self) -> None:
        self.lost = self.unknown = 0

    async def run(self, ask: Ask) -> Outcome:
        number = int(ask.messages[0].content.rpartition("Q")[2])
        forgets = number < self.unknown or (number < self.lost and ask.policy != FULL_POLICY)
        return Outcome(ask.id, ask.tenant, "stop", "no idea" if forgets else f"It is answer{number}.", ask.policy)


def _canary(clock: Clock, answers: _Answers) -> tuple[Canary, Breakers]:
    findings = findings_of(clock)
    questions = [CanaryQuestion(f"Q{n}", (f"answer{n}",), "A text.", KIND) for n in range(10)]
    return Canary(
        CanarySettings(every_minutes=10), questions, findings, answers.run, lambda kind: POLICY, clock=clock
    ), findings.breakers


def test_a_canary_opens_and_closes_the_breaker_of_its_policy() -> None:
    clock, answers = Clock(), _Answers()
    canary, breakers = _canary(clock, answers)
    assert canary.due()
    asyncio.run(canary.ask_all())
    assert not canary.due()
    assert breakers.blocking("a", "model-1", POLICY, KIND) is None
    answers.lost = 6
    clock.now += 600
    assert canary.due()
    asyncio.run(canary.ask_all())
    blocking = breakers.blocking("anybody", "model-1", POLICY, "")
    assert blocking is not None
    assert blocking.code == "canary_failed"
    assert canary.share() == 0.4
    clock.now += 61
    assert canary.due()  # half-open: the canary is its probe
    asyncio.run(canary.ask_all())
    assert breakers.all()[0][1].state == "open"
    answers.lost = 0
    clock.now += 121
    asyncio.run(canary.ask_all())
    assert breakers.all()[0][1].state == "closed"


def test_a_model_that_knows_nothing_is_an_alarm_that_no_fallback_mends() -> None:
    clock, answers = Clock(), _Answers()
    canary, breakers = _canary(clock, answers)
    answers.unknown = 7
    asyncio.run(canary.ask_all())
    assert [alarm.code for alarm in canary._findings.alarms] == ["canary_model"]
    assert breakers.all() == []


def test_a_clock_that_jumps_back_delays_no_canary() -> None:
    """All schedules are monotonic; the wall clock is shown and never compared."""
    clock, answers = Clock(), _Answers()
    canary, _ = _canary(clock, answers)
    asyncio.run(canary.ask_all())
    canary.at = 0.0
    clock.now += 599
    assert not canary.due()
    clock.now += 2
    assert canary.due()


# --- the real engine room ------------------------------------------------------------------------------------------


def test_checks_through_the_scheduler_find_what_was_dropped() -> None:
    """An engine that needs a fact: a policy that keeps it loses nothing; one that drops it loses the answer, and the
    segment with the fact is what it missed."""

    async def run() -> None:
        scheduler = Scheduler(FactEngine(), 5000)
        scheduler.start()
        ask_with = low_priority(scheduler)
        for policy, keeps in ((KEEPS_FACTS, True), (DROPS_FACTS, False)):
            ask = Ask(tenant="a", policy=policy, messages=(Message("user", text_of(0)),), max_tokens=8)
            outcome = await ask_with(ask)
            assert not whole(outcome)
            found = await check(ask, outcome, ask_with, policy="p", kind="", gap_limit=0.2)
            assert found.agreed is keeps
            assert (abs(found.loss_gap or 0) < 1e-3) is keeps
            fact = [segment.number for segment in outcome.segments if FACTS[0] in segment.text]
            assert [missed.number for missed in found.missed] == ([] if keeps else fact)
        scheduler.stop()

    asyncio.run(run())
