"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from anchorkv.serve.api import answering, replies
from anchorkv.serve.api.asks import chat_asks, check_model
from anchorkv.serve.api.callers import ServiceOf, UserOf
from anchorkv.serve.api.errors import responses
from anchorkv.serve.api.formats import ChatRequest
from anchorkv.serve.api.respond import respond
from anchorkv.serve.requests import Piece

router = APIRouter(tags=["OpenAI"])


@router.post(
    "/v1/chat/completions", response_model=replies.ChatReply, operation_id="chat",
    responses=answering.STREAMED | responses(400, 401, 403, 404, 413, 429, 503, 504),
)
async def chat(body: ChatRequest, request: Request, service: ServiceOf, caller: UserOf) -> Response:
    """Answer a chat. With `stream`, server-sent events that end in `[DONE]`."""
    check_model(body.model, service)
    return await respond(_Chat(), body, chat_asks(body, service, caller), 1, request, service, caller)


class _Chat:
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def whole(self, one: answering.Whole) -> dict[str, Any]:
        message = {"role": "assistant", "content": one.answered.outcome.text, "refusal": None}
        return {"message": message, "logprobs": replies.chat_logprobs(one.pieces)}

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text}, "logprobs": replies.chat_logprobs([piece])}

    def ending(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}
