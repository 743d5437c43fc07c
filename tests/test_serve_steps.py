"""One token in each of many sessions of several contexts: as each would alone, side by side, and failing alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fake_engine import FakeEngine

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Engine, Output
from anchorkv.errors import AnchorKVError, CapacityError, ConfigError
from anchorkv.serve.steps import Steps
from anchorkv.session import Session, next_logits

POLICY = AnchorConfig(reduction=4, max_segment=24, recall="off", scorer="frequency")
TEXTS = [b"One sentence. And", b"Another text, longer. It goes", b"A third. It", b"The last of them is here. No"]


class Context(FakeEngine):
    """Notes its joint decodes; does first what it is told to."""

    def __init__(self, before: Callable[[], None] = lambda: None, threads: int = 2) -> None:
        super().__init__()
        self.before, self.threads = before, threads
        self.decodes: list[tuple[int, int]] = []

    def decode_together(self, steps: Sequence[tuple[Any, int, int]], parts: int = 1) -> list[Output]:
        self.decodes.append((len(steps), parts))
        self.before()
        return super().decode_together(steps, parts)


def opened(contexts: Sequence[Engine], each: int = 2) -> list[Session]:
    sessions = [Session(engine, POLICY) for engine in contexts for _ in range(each)]
    for session, text in zip(sessions, TEXTS * each, strict=False):
        session.read(list(text))
    return sessions


def step(
    contexts: Sequence[Engine], sessions: Sequence[Session], make_room: Callable[[Engine], bool] = lambda _: False
) -> dict[int, AnchorKVError]:
    """Those that failed."""
    failed: dict[int, AnchorKVError] = {}
    steps = Steps(contexts)
    try:
        steps.step(sessions, list(b"abcdefgh"[: len(sessions)]), make_room, lambda i, error: failed.update({i: error}))
    finally:
        steps.close()
    return failed


@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_each_session_is_as_if_it_had_read_its_token_alone(contexts: int) -> None:
    engines = [Context(threads=4) for _ in range(contexts)]
    sessions, alone = opened(engines), opened(engines)
    assert not step(engines, sessions)
    for session, other, token in zip(sessions, alone, b"abcdefgh", strict=False):
        other.read([token])
        assert session.ledger.tokens.tolist() == other.ledger.tokens.tolist()
        assert next_logits(session).tolist() == next_logits(other).tolist()
    assert [engine.decodes for engine in engines] == [[(2, contexts)]] * contexts


def test_contexts_decode_at_once() -> None:
    meet = threading.Barrier(2, timeout=20)  # breaks, and so fails the test, unless both are there
    engines = [Context(meet.wait) for _ in range(2)]
    assert not step(engines, opened(engines))


def test_no_more_at_once_than_there_are_threads() -> None:
    running: list[int] = []
    most: list[int] = []
    go = threading.Event()

    def note() -> None:
        running.append(1)
        most.append(len(running))
        go.wait(0.05)
        running.pop()

    engines = [Context(note) for _ in range(4)]
    assert not step(engines, opened(engines, each=1))
    assert max(most) <= 2
    assert [engine.decodes for engine in engines] == [[(1, 2)]] * 4


def test_a_context_without_room_is_given_some_and_tried_again() -> None:
    full = [CapacityError("No cell is free.")]

    def fail_once() -> None:
        if full:
            raise full.pop()

    engines = [Context(), Context(fail_once)]
    asked: list[Engine] = []
    assert not step(engines, opened(engines), lambda engine: asked.append(engine) or True)
    assert asked == [engines[1]]
    assert engines[0].decodes == [(2, 2)]
    assert engines[1].decodes == [(2, 2), (2, 1)], "alone, it has all threads"


def test_sessions_that_find_no_room_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise CapacityError("No cell is free.")

    engines = [Context(), Context(never)]
    sessions = opened(engines)

    def refuse(*_: Any, **__: Any) -> Output:
        raise CapacityError("No cell is free.")

    monkeypatch.setattr(sessions[3].memory, "decode", refuse)
    failed = step(engines, sessions)
    assert list(failed) == [3]
    assert isinstance(failed[3], CapacityError)
    assert [session.ledger.tokens[-1] for session in sessions[:3]] == list(b"abc")


def test_a_session_that_cannot_begin_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [Context(), Context()]
    sessions = opened(engines)

    def refuse(_: int) -> bool:
        raise ConfigError("This token cannot be read.")

    monkeypatch.setattr(sessions[0], "begin_step", refuse)
    assert list(step(engines, sessions)) == [0]
    assert [engine.decodes for engine in engines] == [[(1, 2)], [(2, 2)]]


def test_a_fault_waits_for_the_contexts_that_still_decode() -> None:
    ended = threading.Event()

    def fault() -> None:
        raise RuntimeError("a fault of ours")

    engines = [Context(fault), Context(lambda: (threading.Event().wait(0.1), ended.set())[1])]
    with pytest.raises(RuntimeError, match="a fault of ours"):
        step(engines, opened(engines))
    assert ended.is_set()
