"""One token in each of several sessions: a joint decode for each context, contexts side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from anchorkv.engines.base import Engine, Output
from anchorkv.errors import AnchorKVError
from anchorkv.session import Session


class Steps:
    """Belongs to the engine thread, which `step` is called on.

    Contexts that decode at once have a part of the threads each. One after the other with all threads would take as
    long on an idle machine, but a thread that others delay then delays all, at every layer (docs/performance.md).
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        """engines: contexts of one model."""
        self._at_once = max(1, min(len(engines), engines[0].threads))
        # The engine thread takes the first one itself.
        self._pool = ThreadPoolExecutor(max(1, self._at_once - 1), thread_name_prefix="anchorkv-step")

    def close(self) -> None:
        self._pool.shutdown()

    def step(
        self, sessions: Sequence[Session], tokens: Sequence[int], make_room: Callable[[Engine], bool],
        fail: Callable[[int, AnchorKVError], None],
    ) -> None:
        """As `decode.step_together`, for sessions of several contexts, but a session that fails does so alone.

        make_room: asked for cells of a context that has none left; says whether it freed some.
        fail: told of a session that failed; it closes it, so that its cells serve the others.
        """
        joint: dict[Engine, list[int]] = {}
        for index, (session, token) in enumerate(zip(sessions, tokens, strict=True)):
            try:
                if session.begin_step(token):
                    joint.setdefault(session.engine, []).append(index)
            except AnchorKVError as error:
                fail(index, error)
        groups = [[(sessions[index], tokens[index]) for index in indices] for indices in joint.values()]
        for indices, outputs in zip(joint.values(), self._side_by_side(groups, make_room), strict=True):
            # The youngest is tried first, and gives way first, where each has to be tried alone.
            for row, index in reversed(list(enumerate(indices))):
                session = sessions[index]
                try:
                    out = outputs[row] if outputs else session.memory.decode([tokens[index]], len(session.ledger) - 1)
                    session.end_step(out)
                except AnchorKVError as error:
                    fail(index, error)

    def _side_by_side(
        self, groups: list[list[tuple[Session, int]]], make_room: Callable[[Engine], bool]
    ) -> list[list[Output]]:
        """The outputs of each group's joint decode; none of a group whose sessions have to be tried one by one."""
        parts = min(len(groups), self._at_once)
        others = [self._pool.submit(_decode, group, parts) for group in groups[1:]]
        try:
            found = [_decode(group, parts) for group in groups[:1]]
        finally:
            wait(others)  # whatever happened: no context is used twice at once
        found += [other.result() for other in others]
        for number, group in enumerate(groups):
            while found[number] is None and make_room(group[0][0].engine):
                found[number] = _decode(group, 1)
        return [outputs or [] for outputs in found]


def _decode(group: Sequence[tuple[Session, int]], parts: int) -> list[Output] | None:
    """None where it failed."""
    try:
        steps = [(session.memory, token, len(session.ledger) - 1) for session, token in group]
        return group[0][0].engine.decode_together(steps, parts)
    except AnchorKVError:
        return None
