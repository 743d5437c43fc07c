"""A request as its caller sees it: pieces as they come, the outcome at the end, and a way to call it off.

The engine thread puts pieces in; a coroutine, or a thread, takes them out. Neither waits for the other: a caller that
never reads leaves at most one answer's pieces lying here.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Self

from anchorkv.serve.requests import Ask, Outcome, Piece

Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]


class Waking:
    """Coroutines that wait for the engine thread, which it belongs to: woken together, by one call for each loop.

    Woken one by one they would take Python's lock from the engine thread between any two tokens that it draws.
    """

    def __init__(self) -> None:
        self._due: list[Waiter] = []

    def add(self, waiters: Sequence[Waiter]) -> None:
        self._due += waiters

    def now(self) -> None:
        """Wake all that were added."""
        due, self._due = self._due, []
        for loop in {loop for loop, _ in due}:
            try:
                loop.call_soon_threadsafe(_resolve, [future for its, future in due if its is loop])
            except RuntimeError:  # the caller's loop is closed: nobody waits any more
                continue


def _resolve(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


class Handle:
    """Iterate over it (async) for `Piece`s; `await outcome()`; `cancel()`. `async with` cancels what is unfinished."""

    def __init__(self, ask: Ask, waking: Waking, wake: Callable[[], None] = lambda: None) -> None:
        """wake: has the engine thread look at once whether it was cancelled."""
        self.ask = ask
        self.cancelled = False
        self._waking, self._wake = waking, wake
        self._changed = threading.Condition()
        self._pieces: deque[Piece] = deque()
        self._outcome: Outcome | None = None
        self._waiters: list[Waiter] = []

    # --- the caller's side -------------------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        while True:
            with self._changed:
                if self._pieces:
                    return self._pieces.popleft()
                if self._outcome is not None:
                    raise StopAsyncIteration
                waiter = self._waiter()
            await waiter

    async def outcome(self) -> Outcome:
        """How it ended. Pieces that nobody took stay where they are."""
        while True:
            with self._changed:
                if self._outcome is not None:
                    return self._outcome
                waiter = self._waiter()
            await waiter

    def result(self, timeout: float | None = None) -> Outcome:
        """`outcome` for threads. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._outcome is not None, timeout):
                raise TimeoutError(f"The request {self.ask.id} did not end within {timeout} seconds.")
        return self.done()

    def done(self) -> Outcome:
        """The outcome of a request that has ended. Raises RuntimeError for one that has not."""
        if self._outcome is None:
            raise RuntimeError(f"The request {self.ask.id} has not ended yet.")
        return self._outcome

    @property
    def ended(self) -> bool:
        return self._outcome is not None

    def cancel(self) -> None:
        """Stop it; its cells are freed before the next step. Does nothing when it has ended."""
        self.cancelled = True
        self._wake()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self.ended:
            self.cancel()

    def _waiter(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiters.append((loop, future))
        return future

    # --- the engine thread's side; `Waking.now` is for the engine thread to call ---------------------------------

    def put(self, piece: Piece) -> None:
        with self._changed:
            self._pieces.append(piece)
            self._notify()

    def end(self, outcome: Outcome) -> None:
        with self._changed:
            self._outcome = outcome
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        waiters, self._waiters = self._waiters, []
        self._waking.add(waiters)
