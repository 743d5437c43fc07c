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
        groups: dict[Engine, _Group] = {}
        for index, (session, token) in enumerate(zip(sessions, tokens, strict=True)):
            groups.setdefault(session.engine, _Group(session.engine)).left.append((index, session, token))
        self._side_by_side(list(groups.values()))
        for group in groups.values():
            group.tell(fail)
            while group.left and not group.outputs and make_room(group.engine):
                group.decode(1)
            while group.left:
                group.end()
                group.tell(fail)

    def _side_by_side(self, groups: Sequence[_Group]) -> None:
        parts = min(len(groups), self._at_once)
        others = [self._pool.submit(group.run, parts) for group in groups[1:]]
        try:
            for group in groups[:1]:
                group.run(parts)
        finally:
            wait(others)  # whatever happened: no context is used twice at once
        for other in others:
            other.result()


class _Group:
    """The sessions of one context. `run` is for one thread, which no other group has to wait for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.left: list[tuple[int, Session, int]] = []
        """(index among all, session, token) of those that have not read it yet; the last one is the youngest."""
        self.outputs: list[Output] = []
        """Of the joint decode, one for each of `left`; none where it failed: then each has to be tried alone."""
        self.failed: dict[int, AnchorKVError] = {}

    def run(self, parts: int) -> None:
        for entry in list(self.left):
            index, session, token = entry
            try:
                if not session.begin_step(token):
                    self.left.remove(entry)
            except AnchorKVError as error:
                self.left.remove(entry)
                self.failed[index] = error
        self.decode(parts)
        if self.outputs:
            self.end()

    def decode(self, parts: int) -> None:
        if not self.left:
            return
        try:
            steps = [(session.memory, token, len(session.ledger) - 1) for _, session, token in self.left]
            self.outputs = self.engine.decode_together(steps, parts)
        except AnchorKVError:
            self.outputs = []

    def end(self) -> None:
        """The youngest first; no further than to one that fails, so that it can be closed before others need cells."""
        while self.left:
            index, session, token = self.left.pop()
            try:
                alone = not self.outputs
                out = session.memory.decode([token], len(session.ledger) - 1) if alone else self.outputs.pop()
                session.end_step(out)
            except AnchorKVError as error:
                self.failed[index] = error
                return

    def tell(self, fail: Callable[[int, AnchorKVError], None]) -> None:
        """`fail` of each that has failed since it was last called."""
        failed, self.failed = self.failed, {}
        for index, error in failed.items():
            fail(index, error)
