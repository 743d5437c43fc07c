"""POST /v1/chat/completions."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from anchorkv.serve.api import answering, replies
from anchorkv.serve.api.asks import chat_asks, check_model, wish_of
from anchorkv.serve.api.callers import ServiceOf, UserOf
from anchorkv.serve.api.errors import responses
from anchorkv.serve.api.formats import ChatRequest, Wishes
from anchorkv.serve.requests import Outcome, Piece
from anchorkv.serve.service import ModelCard

router = APIRouter(tags=["OpenAI"])


@router.post(
    "/v1/chat/completions", response_model=replies.ChatReply, operation_id="chat",
    responses=answering.STREAMED | responses(400, 401, 403, 404, 413, 429, 503, 504),
)
async def chat(body: ChatRequest, request: Request, service: ServiceOf, caller: UserOf) -> Response:
    """Answer a chat. With `stream`, server-sent events that end in `[DONE]`."""
    check_model(body.model, service)
    wishes = body.anchorkv or Wishes()
    asks = chat_asks(body, service, caller)
    async with AsyncExitStack() as stack:
        asking = service.asking(caller, asks, wish_of(wishes), quality=wishes.quality, shown=bool(body.stream))
        exchanges = (await answering.unless_gone(request, stack.enter_async_context(asking))).exchanges
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            chunks = _Chunks(asks[0].id, service.card, len(asks), usage, wishes.explain)
            headers = replies.early_headers(asks[0].id, exchanges[0].plan)
            return answering.EventStream(
                exchanges, stack.pop_all(), chunks.of, chunks.last, chunks.first(), headers,
            )
        found = await answering.unless_gone(request, answering.answers(exchanges))
    figures = [replies.figures_of(one.answered, wishes.explain) for one in found]
    choices = [
        {
            "index": i, "message": {"role": "assistant", "content": one.answered.outcome.text, "refusal": None},
            "logprobs": replies.chat_logprobs(one.pieces), "finish_reason": one.finish, "anchorkv": figures[i],
        }
        for i, one in enumerate(found)
    ]
    outcomes = [one.answered.outcome for one in found]
    return JSONResponse(
        {
            **replies.head(asks[0].id, service.card, "chat.completion"), "choices": choices,
            "usage": replies.usage_of(outcomes, 1), "anchorkv": figures[0],
        },
        headers=replies.headers_of(found[0].answered),
    )


class _Chunks:
    """The events of one stream."""

    def __init__(self, number: str, card: ModelCard, count: int, usage: bool, explain: bool) -> None:
        self._head = replies.head(number, card, "chat.completion.chunk")
        self._count, self._usage, self._explain = count, usage, explain
        self._outcomes: dict[int, Outcome] = {}
        self._figures: dict[int, dict[str, Any]] = {}

    def first(self) -> list[dict[str, Any]]:
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(self._count)]

    def of(self, part: answering.Part) -> list[dict[str, Any]]:
        if isinstance(part.what, Piece):
            piece = part.what
            if not piece.text and piece.logprob is None:
                return []
            return [self._chunk(part.index, {"content": piece.text}, logprobs=replies.chat_logprobs([piece]))]
        answered = part.what
        self._outcomes[part.index] = answered.outcome
        self._figures[part.index] = replies.figures_of(answered, self._explain)
        chunk = self._chunk(part.index, {}, finish=answering.Whole(answered, []).finish)
        return [{**chunk, "anchorkv": self._figures[part.index]}]

    def last(self) -> list[dict[str, Any]]:
        if not self._usage:
            return []
        usage = replies.usage_of([self._outcomes[i] for i in range(self._count)], 1)
        return [{**self._head, "choices": [], "usage": usage, "anchorkv": self._figures[0]}]

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "choices": [choice], **({"usage": None} if self._usage else {})}
