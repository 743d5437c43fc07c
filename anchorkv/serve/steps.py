"""One token in each of several sessions, in one joint decode; what fails, fails alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from anchorkv.engines.base import Output
from anchorkv.errors import AnchorKVError
from anchorkv.session import Session


def step(
    sessions: Sequence[Session], tokens: Sequence[int], make_room: Callable[[], bool],
    fail: Callable[[int, AnchorKVError], None],
) -> None:
    """As `decode.step_together` for sessions of one engine, but a session that fails does so alone.

    make_room: asked for cells when there are none left; says whether it freed some.
    fail: told of a session that failed; it closes it, so that its cells serve the others.
    """
    joint = []
    for index, (session, token) in enumerate(zip(sessions, tokens, strict=True)):
        try:
            if session.begin_step(token):
                joint.append(index)
        except AnchorKVError as error:
            fail(index, error)
    outputs = _together([sessions[i] for i in joint], [tokens[i] for i in joint], make_room)
    # The youngest is tried first, and gives way first, where each has to be tried alone.
    for row, index in reversed(list(enumerate(joint))):
        session = sessions[index]
        try:
            out = outputs[row] if outputs else session.memory.decode([tokens[index]], len(session.ledger) - 1)
            session.end_step(out)
        except AnchorKVError as error:
            fail(index, error)


def _together(sessions: Sequence[Session], tokens: Sequence[int], make_room: Callable[[], bool]) -> list[Output]:
    """The joint decode's outputs; none when it failed, and each session has to be tried alone."""
    steps = [(s.memory, token, len(s.ledger) - 1) for s, token in zip(sessions, tokens, strict=True)]
    while steps:
        try:
            return sessions[0].engine.decode_together(steps)
        except AnchorKVError:
            if not make_room():
                break
    return []
