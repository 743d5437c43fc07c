"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from anchorkv.serve.api import answering, replies
from anchorkv.serve.api.asks import check_model, completion_asks
from anchorkv.serve.api.callers import ServiceOf, UserOf
from anchorkv.serve.api.errors import responses
from anchorkv.serve.api.formats import CompletionRequest
from anchorkv.serve.api.respond import respond
from anchorkv.serve.requests import Piece

router = APIRouter(tags=["OpenAI"])


@router.post(
    "/v1/completions", response_model=replies.TextReply, operation_id="complete",
    responses=answering.STREAMED | responses(400, 401, 403, 404, 413, 429, 503, 504),
)
async def complete(body: CompletionRequest, request: Request, service: ServiceOf, caller: UserOf) -> Response:
    """Continue one text or several. With `stream`, server-sent events that end in `[DONE]`."""
    check_model(body.model, service)
    asks = completion_asks(body, service, caller)
    return await respond(_Text(), body, asks, len(body.prompts), request, service, caller)


class _Text:
    kind = chunk_kind = "text_completion"

    def __init__(self) -> None:
        self._shown: dict[int, int] = {}
        """Characters of each answer's tokens that were sent."""

    def whole(self, one: answering.Whole) -> dict[str, Any]:
        return {"text": one.answered.outcome.text, "logprobs": replies.text_logprobs(one.pieces)}

    def opening(self) -> None:
        return None

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        shown = self._shown.get(index, 0)
        self._shown[index] = shown + len(piece.token_text)
        return {"text": piece.text, "logprobs": replies.text_logprobs([piece], shown)}

    def ending(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}
