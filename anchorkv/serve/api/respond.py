"""What both routes that write do: ask, wait for the answers or stream them, and put anchorkv's figures beside them.

A `Form` is what differs between a chat and a completion: how an answer, or a piece of one, is written in OpenAI's JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import JSONResponse, Response

from anchorkv.serve.api import answering, replies
from anchorkv.serve.api.asks import wish_of
from anchorkv.serve.api.formats import ChatRequest, CompletionRequest, Wishes
from anchorkv.serve.auth import Principal
from anchorkv.serve.requests import Ask, Outcome, Piece
from anchorkv.serve.service import ModelCard, Service


class Form(Protocol):
    """Of one request; each method gives a part of a choice."""

    kind: str
    """OpenAI's name of the whole reply."""
    chunk_kind: str
    """OpenAI's name of an event of a stream."""

    def whole(self, one: answering.Whole) -> dict[str, Any]: ...

    def opening(self) -> dict[str, Any] | None:
        """What every answer of a stream begins with, if with anything."""

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Of answer `index`; asked in the order in which they are written."""

    def ending(self) -> dict[str, Any]: ...


async def respond(
    form: Form, body: ChatRequest | CompletionRequest, asks: Sequence[Ask], prompts: int, request: Request,
    service: Service, caller: Principal,
) -> Response:
    """Every answer to `asks`, which are made of so many prompts: whole, or as server-sent events. Raises Refused."""
    wishes = body.anchorkv or Wishes()
    async with AsyncExitStack() as stack:
        asking = service.asking(caller, asks, wish_of(wishes), quality=wishes.quality, shown=bool(body.stream))
        exchanges = (await answering.unless_gone(request, stack.enter_async_context(asking))).exchanges
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            chunks = _Chunks(form, asks[0].id, service.card, prompts, usage, wishes.explain)
            headers = replies.early_headers(asks[0].id, exchanges[0].plan)
            return answering.EventStream(
                exchanges, stack.pop_all(), chunks.of, chunks.last, chunks.first(len(asks)), headers,
            )
        found = await answering.unless_gone(request, answering.answers(exchanges))
    figures = [replies.figures_of(one.answered, wishes.explain) for one in found]
    choices = [
        {"index": i, **form.whole(one), "finish_reason": one.finish, "anchorkv": figures[i]}
        for i, one in enumerate(found)
    ]
    outcomes = [one.answered.outcome for one in found]
    return JSONResponse(
        {
            **replies.head(asks[0].id, service.card, form.kind), "choices": choices,
            "usage": replies.usage_of(outcomes, prompts), "anchorkv": figures[0],
        },
        headers=replies.headers_of(found[0].answered),
    )


class _Chunks:
    """The events of one stream."""

    def __init__(self, form: Form, number: str, card: ModelCard, prompts: int, usage: bool, explain: bool) -> None:
        self._head = replies.head(number, card, form.chunk_kind)
        self._form, self._prompts, self._usage, self._explain = form, prompts, usage, explain
        self._outcomes: dict[int, Outcome] = {}
        self._figures: dict[int, dict[str, Any]] = {}

    def first(self, count: int) -> list[dict[str, Any]]:
        opening = self._form.opening()
        return [] if opening is None else [self._chunk(index, opening) for index in range(count)]

    def of(self, part: answering.Part) -> list[dict[str, Any]]:
        if isinstance(part.what, Piece):
            if not part.what.text and part.what.logprob is None:
                return []
            return [self._chunk(part.index, self._form.piece(part.index, part.what))]
        answered = part.what
        self._outcomes[part.index] = answered.outcome
        self._figures[part.index] = replies.figures_of(answered, self._explain)
        chunk = self._chunk(part.index, self._form.ending(), answering.Whole(answered, []).finish)
        return [{**chunk, "anchorkv": self._figures[part.index]}]

    def last(self) -> list[dict[str, Any]]:
        if not self._usage:
            return []
        usage = replies.usage_of([self._outcomes[index] for index in sorted(self._outcomes)], self._prompts)
        return [{**self._head, "choices": [], "usage": usage, "anchorkv": self._figures[0]}]

    def _chunk(self, index: int, said: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, **said, "finish_reason": finish}
        return {**self._head, "choices": [choice], **({"usage": None} if self._usage else {})}
