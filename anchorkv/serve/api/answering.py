"""Several answers at once: all of them when they are whole, or in pieces as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from anchorkv.errors import AnchorKVError
from anchorkv.serve.api.errors import body_of
from anchorkv.serve.exchange import Exchange
from anchorkv.serve.refusals import Refused, refusal
from anchorkv.serve.requests import Piece
from anchorkv.serve.seams import Answered

log = logging.getLogger("anchorkv.serve")
T = TypeVar("T")
QUIET_SECONDS = 15.0
"""A stream that has nothing to say for so long says so, or proxies would close it while a long prompt is read."""

STREAMED: dict[int | str, dict[str, Any]] = {200: {
    "description": "The answer; with `stream`, server-sent events.",
    "content": {"text/event-stream": {}},
}}
"""For the OpenAPI description, which has no words for the parts of a stream."""


@dataclass(frozen=True)
class Whole:
    """One answer."""

    answered: Answered
    pieces: list[Piece]

    @property
    def finish(self) -> Literal["stop", "length"]:
        return "length" if self.answered.outcome.finish == "length" else "stop"


@dataclass(frozen=True)
class Part:
    """Of answer `index`: a piece, or how it ended."""

    index: int
    what: Piece | Answered


async def answers(exchanges: Sequence[Exchange]) -> list[Whole]:
    """Raises Refused when one of them has none."""
    found = []
    for exchange in exchanges:
        pieces = [piece async for piece in exchange.pieces()]
        found.append(Whole(await exchange.answered(), pieces))
    return found


async def parts(exchanges: Sequence[Exchange]) -> AsyncGenerator[Part | None]:
    """All of them, mixed as they are written; None where nothing came for a while. Raises Refused."""
    queue: asyncio.Queue[Part | BaseException] = asyncio.Queue()

    async def pump(index: int, exchange: Exchange) -> None:
        try:
            async for piece in exchange.pieces():
                queue.put_nowait(Part(index, piece))
            queue.put_nowait(Part(index, await exchange.answered()))
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(index, exchange)) for index, exchange in enumerate(exchanges)]
    try:
        left = len(tasks)
        while left:
            try:
                part = await asyncio.wait_for(queue.get(), QUIET_SECONDS)
            except TimeoutError:
                yield None
                continue
            if isinstance(part, BaseException):
                raise part
            left -= isinstance(part.what, Answered)
            yield part
    finally:
        for task in tasks:
            task.cancel()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """`work`, called off when the client hangs up. Raises what it raises."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "The client hung up.", code="client_gone")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        with contextlib.suppress(BaseException):
            await asyncio.wait({task, gone})


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events, `[DONE]` at the end. Whatever becomes of it, `stack` is closed.

    An error after the start comes as an event in OpenAI's form, and then no `[DONE]`.
    """

    def __init__(
        self, exchanges: Sequence[Exchange], stack: AsyncExitStack, event: Callable[[Part], list[dict[str, Any]]],
        last: Callable[[], list[dict[str, Any]]], first: list[dict[str, Any]], headers: dict[str, str],
    ) -> None:
        """event: what is sent for a part; first, last: before and after all of them."""
        self._stack, events = stack, _events(exchanges, event, last, first)
        stack.push_async_callback(events.aclose)  # it may have been left between two events, where nothing else ends it
        headers = {**headers, "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stack.aclose()


async def _events(
    exchanges: Sequence[Exchange], event: Callable[[Part], list[dict[str, Any]]],
    last: Callable[[], list[dict[str, Any]]], first: list[dict[str, Any]],
) -> AsyncGenerator[bytes]:
    try:
        yield b"".join(map(_data, first))
        async with contextlib.aclosing(parts(exchanges)) as mixed:
            async for part in mixed:
                yield b": still working\n\n" if part is None else b"".join(map(_data, event(part)))
        yield b"".join(map(_data, last())) + b"data: [DONE]\n\n"
    except AnchorKVError as error:
        found = refusal(error)
        body = body_of(found)
        if found.retry_after is not None:
            body["error"]["retry_after"] = math.ceil(found.retry_after)
        yield _data(body)
    except Exception:
        log.exception("a stream failed")
        yield _data(body_of(Refused(500, "The server failed; the fault is in its log.", code="internal_error")))


def _data(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
