"""A request as its caller sees it: pieces as they come, the outcome at the end, and a way to call it off.

The engine thread puts pieces in; a coroutine, or a thread, takes them out. Neither waits for the other: a caller that
never reads leaves at most one answer's pieces lying here.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Self

from anchorkv.serve.requests import Ask, Outcome, Piece


class Handle:
    """Iterate over it (async) for `Piece`s; `await outcome()`; `cancel()`. `async with` cancels what is unfinished."""

    def __init__(self, ask: Ask, wake: Callable[[], None] = lambda: None) -> None:
        self.ask = ask
        self.cancelled = False
        self._wake = wake
        self._changed = threading.Condition()
        self._pieces: deque[Piece] = deque()
        self._outcome: Outcome | None = None
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

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

    # --- the engine thread's side ------------------------------------------------------------------------------

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
        for loop, future in waiters:
            try:
                loop.call_soon_threadsafe(_resolve, future)
            except RuntimeError:  # the caller's loop is closed: nobody waits any more
                continue


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
