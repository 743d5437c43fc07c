"""POST /v1/completions."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from anchorkv.serve.api import answering, replies
from anchorkv.serve.api.asks import check_model, completion_asks, wish_of
from anchorkv.serve.api.callers import ServiceOf, UserOf
from anchorkv.serve.api.errors import responses
from anchorkv.serve.api.formats import CompletionRequest, Wishes
from anchorkv.serve.requests import Outcome, Piece
from anchorkv.serve.service import ModelCard

router = APIRouter(tags=["OpenAI"])


@router.post(
    "/v1/completions", response_model=replies.TextReply, operation_id="complete",
    responses=answering.STREAMED | responses(400, 401, 403, 404, 413, 429, 503, 504),
)
async def complete(body: CompletionRequest, request: Request, service: ServiceOf, caller: UserOf) -> Response:
    """Continue one text or several. With `stream`, server-sent events that end in `[DONE]`."""
    check_model(body.model, service)
    wishes = body.anchorkv or Wishes()
    asks, prompts = completion_asks(body, service, caller), len(body.prompts)
    async with AsyncExitStack() as stack:
        asking = service.asking(caller, asks, wish_of(wishes), quality=wishes.quality, shown=bool(body.stream))
        exchanges = (await answering.unless_gone(request, stack.enter_async_context(asking))).exchanges
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            chunks = _Chunks(asks[0].id, service.card, prompts, usage, wishes.explain)
            headers = replies.early_headers(asks[0].id, exchanges[0].plan)
            return answering.EventStream(exchanges, stack.pop_all(), chunks.of, chunks.last, [], headers)
        found = await answering.unless_gone(request, answering.answers(exchanges))
    figures = [replies.figures_of(one.answered, wishes.explain) for one in found]
    choices = [
        {
            "index": i, "text": one.answered.outcome.text, "logprobs": replies.text_logprobs(one.pieces),
            "finish_reason": one.finish, "anchorkv": figures[i],
        }
        for i, one in enumerate(found)
    ]
    outcomes = [one.answered.outcome for one in found]
    return JSONResponse(
        {
            **replies.head(asks[0].id, service.card, "text_completion"), "choices": choices,
            "usage": replies.usage_of(outcomes, prompts), "anchorkv": figures[0],
        },
        headers=replies.headers_of(found[0].answered),
    )


class _Chunks:
    """The events of one stream."""

    def __init__(self, number: str, card: ModelCard, prompts: int, usage: bool, explain: bool) -> None:
        self._head = replies.head(number, card, "text_completion")
        self._prompts, self._usage, self._explain = prompts, usage, explain
        self._outcomes: dict[int, Outcome] = {}
        self._figures: dict[int, dict[str, Any]] = {}
        self._shown: dict[int, int] = {}

    def of(self, part: answering.Part) -> list[dict[str, Any]]:
        if isinstance(part.what, Piece):
            piece = part.what
            if not piece.text and piece.logprob is None:
                return []
            logprobs = replies.text_logprobs([piece], self._shown.get(part.index, 0))
            self._shown[part.index] = self._shown.get(part.index, 0) + len(piece.token_text)
            return [self._chunk(part.index, piece.text, logprobs=logprobs)]
        answered = part.what
        self._outcomes[part.index] = answered.outcome
        self._figures[part.index] = replies.figures_of(answered, self._explain)
        chunk = self._chunk(part.index, "", finish=answering.Whole(answered, []).finish)
        return [{**chunk, "anchorkv": self._figures[part.index]}]

    def last(self) -> list[dict[str, Any]]:
        if not self._usage:
            return []
        usage = replies.usage_of([self._outcomes[i] for i in sorted(self._outcomes)], self._prompts)
        return [{**self._head, "choices": [], "usage": usage, "anchorkv": self._figures[0]}]

    def _chunk(self, index: int, text: str, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "choices": [choice], **({"usage": None} if self._usage else {})}
