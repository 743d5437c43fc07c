"""Limits of tenants: what is let in, what waits and how long, on a clock that the test turns."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from anchorkv.serve.limits import Limiter, TenantLimits, TokenBucket
from anchorkv.serve.refusals import Refused


@dataclass(frozen=True)
class Caller:
    tenant: str


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


BANK, INN = Caller("bank"), Caller("inn")
amounts = st.floats(0.01, 40)


def limiter(clock: Clock, cells: int | None = None, **limits: Any) -> Limiter:
    return Limiter(TenantLimits(**limits), cells=cells, clock=clock)


def refused(limits: Limiter, *arguments: Any, **more: Any) -> Refused:
    with pytest.raises(Refused) as error:
        limits.enter(*arguments, **more)
    return error.value


# --- the bucket ----------------------------------------------------------------------------------------------------


@given(
    rate=st.floats(1, 1000), steps=st.lists(st.tuples(st.floats(0, 100), amounts), max_size=40),
)
def test_never_more_than_the_rate_and_one_allowance(rate: float, steps: list[tuple[float, float]]) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, clock, capacity=30)
    taken, began = 0.0, clock.now
    for seconds, amount in steps:
        clock.now += seconds
        if bucket.wait(amount) == 0:
            bucket.take(amount)
            taken += amount
        assert taken <= 30 + rate / 60 * (clock.now - began) + 1e-6
        assert -1e-6 <= bucket.level <= 30


@given(rate=st.floats(1, 1000), first=st.floats(0.01, 30), amount=st.floats(0.01, 30))
def test_who_waits_as_long_as_told_is_let_in_and_not_much_sooner(rate: float, first: float, amount: float) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, clock, capacity=30)
    bucket.take(first)
    wait = bucket.wait(amount)
    if wait > 0.01:  # shorter ones are lost in rounding
        clock.now += wait * 0.9
        assert bucket.wait(amount) > 0
        wait *= 0.1
    clock.now += wait
    assert bucket.wait(amount) == 0


@given(st.lists(st.floats(-1e6, 1e6, allow_nan=False), max_size=30))
def test_a_clock_that_jumps_grants_at_most_one_allowance_at_once(jumps: list[float]) -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    for jump in jumps:
        clock.now += jump
        assert 0 <= bucket.level <= 60  # a jump back takes nothing away
        bucket.take(bucket.level)
        assert bucket.wait(1) == pytest.approx(1.0)


def test_the_machines_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limiter(TenantLimits(requests_per_minute=1))
    limits.enter(BANK, 1)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert 55 < refused(limits, BANK, 1).retry_after <= 60  # type: ignore[operator]


def test_what_can_never_be_waits_for_ever() -> None:
    assert TokenBucket(60, Clock(), capacity=5).wait(6) == float("inf")


# --- requests ------------------------------------------------------------------------------------------------------


def test_requests_a_minute() -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=2)
    for _ in range(2):
        limits.enter(BANK, 1).close()
    error = refused(limits, BANK, 1)
    assert (error.status, error.code, error.retry_after) == (429, "rate_limit_exceeded", pytest.approx(30))
    assert str(error) == "Your 2 requests a minute are used; try again in 30 s."
    limits.enter(INN, 1)  # another tenant has its own
    clock.now += 30
    limits.enter(BANK, 1)


def test_tokens_a_minute_are_counted_as_used() -> None:
    limits = limiter(Clock(), tokens_per_minute=100)
    with limits.enter(BANK, 90) as lease:
        assert refused(limits, BANK, 20).retry_after == pytest.approx(6)
        lease.settle(30)
        limits.enter(BANK, 70)
    assert limits.usage("bank").tokens_left == 0


def test_more_than_was_estimated_is_paid_later() -> None:
    clock = Clock()
    limits = limiter(clock, tokens_per_minute=60)
    with limits.enter(BANK, 60) as lease:
        lease.settle(90)
    assert refused(limits, BANK, 1).retry_after == pytest.approx(31)
    clock.now += 31
    limits.enter(BANK, 1)


def test_a_lease_that_is_not_settled_counts_whole_and_twice_settled_once() -> None:
    limits = limiter(Clock(), tokens_per_minute=100)
    limits.enter(BANK, 40).close()
    assert limits.usage("bank").tokens_left == 60
    lease = limits.enter(BANK, 60)
    lease.settle(10)
    lease.settle(20)
    assert limits.usage("bank").tokens_left == 40


def test_answers_at_once() -> None:
    clock = Clock()
    limits = limiter(clock, concurrent=3)
    first = limits.enter(BANK, 1, answers=2)
    error = refused(limits, BANK, 1, answers=2)
    assert error.status == 429
    assert 1 <= error.retry_after <= 60  # type: ignore[operator]
    second = limits.enter(BANK, 1)
    first.close()
    first.close()  # closing twice gives back once
    with limits.enter(BANK, 1, answers=2):
        assert limits.usage("bank").running == 3
    second.close()
    assert limits.usage("bank").running == 0


def test_the_wait_follows_from_how_long_requests_take() -> None:
    clock = Clock()
    limits = limiter(clock, concurrent=1)
    for _ in range(40):
        with limits.enter(BANK, 1):
            clock.now += 20
    with limits.enter(BANK, 1):
        assert refused(limits, BANK, 1).retry_after == pytest.approx(20, abs=0.1)


def test_cells_are_shared() -> None:
    limits = Limiter(TenantLimits(cells_share=0.5), {"inn": TenantLimits(cells_share=1)}, cells=1000, clock=Clock())
    lease = limits.enter(BANK, 1, cells=400)
    assert refused(limits, BANK, 1, cells=101).status == 429
    for _ in range(3):  # who may have all cells is not turned away: the engine room has a queue
        limits.enter(INN, 1, cells=1000)
    lease.close()
    limits.enter(BANK, 1, cells=500)


@pytest.mark.parametrize(("limits", "asked", "said"), [
    ({"tokens_per_minute": 100}, {"tokens": 101}, "may take 101 tokens, and you have 100 a minute"),
    ({"concurrent": 2}, {"answers": 3}, "asks for 3 answers, and you may have 2 at once"),
    ({"cells_share": 0.5}, {"cells": 501}, "may need 501 KV cells, and you may hold 500"),
])
def test_what_could_never_be_is_told_so(limits: dict[str, Any], asked: dict[str, Any], said: str) -> None:
    error = refused(limiter(Clock(), cells=1000, **limits), BANK, **{"tokens": 1, **asked})
    assert (error.status, error.retry_after) == (400, None)
    assert said in str(error)


def test_a_refusal_takes_nothing() -> None:
    limits = limiter(Clock(), requests_per_minute=5, tokens_per_minute=100, concurrent=1)
    lease = limits.enter(BANK, 10)
    for _ in range(10):
        refused(limits, BANK, 10)
    lease.close()
    usage = limits.usage("bank")
    assert (usage.requests_left, usage.tokens_left, usage.running) == (4, 90, 0)
    assert usage.requests_reset == pytest.approx(12)


@given(st.lists(st.tuples(st.sampled_from(["enter", "close", "wait"]), st.integers(1, 60), st.integers(1, 3))))
def test_nothing_is_ever_exceeded_or_lost(steps: list[tuple[str, int, int]]) -> None:
    clock = Clock()
    limits = limiter(clock, cells=100, tokens_per_minute=120, concurrent=4, cells_share=0.8)
    running: list[Any] = []
    refusals: list[Refused] = []
    for what, amount, answers in steps:
        if what == "wait":
            clock.now += amount
        elif what == "close" and running:
            running.pop(amount % len(running)).close()
        elif what == "enter":
            try:
                running.append(limits.enter(BANK, amount, answers=answers, cells=amount))
            except Refused as error:
                refusals.append(error)
        usage = limits.usage("bank")
        assert usage.running == sum(lease.answers for lease in running) <= 4
        assert usage.cells == sum(lease.cells for lease in running) <= 80
    assert all(error.status == 429 and error.retry_after and error.retry_after > 0 for error in refusals)
    for lease in running:
        lease.close()
    clock.now += 60
    usage = limits.usage("bank")
    assert (usage.running, usage.cells, usage.tokens_left) == (0, 0, 120)


def test_many_threads() -> None:
    limits = Limiter(TenantLimits(concurrent=3))
    most, refusals = [], []

    def work() -> None:
        for _ in range(200):
            try:
                with limits.enter(BANK, 1):
                    most.append(limits.usage("bank").running)
                    time.sleep(0)
            except Refused as error:
                refusals.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) <= 3
    assert len(most) + len(refusals) == 1600
    assert limits.usage("bank").running == 0


# --- documents -----------------------------------------------------------------------------------------------------


def test_stored_bytes() -> None:
    limits, there = limiter(Clock(), document_bytes="1KiB"), [600]
    with limits.storing(BANK, 424, lambda: there[0]):
        with pytest.raises(Refused, match="has 1 bytes, and 0 of 1,024 are left") as error, limits.storing(
            BANK, 1, lambda: there[0]
        ):
            pass
        assert error.value.status == 403
    there[0] = 1023
    with limits.storing(BANK, 1, lambda: there[0]):
        pass
    with limits.storing(INN, 1024, lambda: 0):  # another tenant has its own
        pass


def test_a_failed_upload_leaves_its_room() -> None:
    limits = limiter(Clock(), document_bytes=100)
    with pytest.raises(OSError, match="full"), limits.storing(BANK, 100, lambda: 0):
        raise OSError("full")
    with limits.storing(BANK, 100, lambda: 0):
        pass


def test_without_limits_everything_is_let_in() -> None:
    limits = Limiter()
    for _ in range(1000):
        limits.enter(BANK, 10**9, answers=50, cells=10**9)
    with limits.storing(BANK, 10**15, lambda: 10**15):
        assert limits.usage("bank").running == 50_000


def test_a_tenants_own_go_before_the_others() -> None:
    special = {"bank": TenantLimits(concurrent=9, tokens_per_minute=None)}
    limits = Limiter(TenantLimits(concurrent=2, tokens_per_minute=5, requests_per_minute=7), special)
    found = limits.limits("bank")
    assert (found.concurrent, found.tokens_per_minute, found.requests_per_minute) == (9, None, 7)
    assert limits.limits("inn").concurrent == 2


@pytest.mark.parametrize("wrong", [
    {"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"cells_share": 0}, {"cells_share": 1.1},
    {"document_bytes": "many"}, {"concurent": 3},
])
def test_limits_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TenantLimits(**wrong)
