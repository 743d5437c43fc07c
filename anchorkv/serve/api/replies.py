"""What callers get, in OpenAI's formats, with anchorkv's own figures beside them."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from anchorkv.serve.requests import Outcome, Piece
from anchorkv.serve.seams import Answered, Plan
from anchorkv.serve.service import ModelCard


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Cells(_Reply):
    """KV cells at the end of the answer, by the engine's own count."""

    kept: int
    peak: int
    full: int = Field(description="what a full cache would hold")


class Recalled(_Reply):
    """A segment that was brought back for the answer."""

    number: int
    cells: int
    text: str


class FallbackStep(_Reply):
    """From one policy to a safer one, and why."""

    before: str
    after: str
    reason: str
    dry_run: bool = Field(description="it was only noted, not taken")


class Seconds(_Reply):
    """Where the time went."""

    queue: float
    prefill: float
    first_token: float
    decode: float


class Segment(_Reply):
    """A segment at the end of the answer."""

    number: int
    start: int
    stop: int
    tokens: int
    kept: int
    dropped: int
    pinned: int
    recalled: int
    why: list[str]
    text: str
    anchors: list[str] = Field(description="texts of the tokens that stayed, of a segment that is no longer whole")
    anchor_positions: list[int] = Field(description="of the same tokens, in the whole stream")
    anchor_spans: list[tuple[int, int]] = Field(
        description="where they are in text: their first character, and the one after their last"
    )


class Attention(_Reply):
    """Where the attention went while the answer was written: shares that sum to 1, as means over layers, heads and
    tokens."""

    sinks: float
    pinned: float
    anchors: float
    recalled: float
    recent: float = Field(description="what was whole while the answer was written")
    answer: float = Field(description="the answer itself")
    segments: list[float] = Field(description="of each segment, in the order of segments")


class Figures(_Reply):
    """anchorkv's own figures of one answer. `id` finds its audit record."""

    id: str
    policy: str
    reduction: float = Field(description="cells of a full cache per cell kept, as it came out")
    cells: Cells
    kv_bytes: int
    dropped: int = Field(description="cells that were freed and not brought back")
    recalled: list[Recalled]
    fallback: list[FallbackStep]
    document: str | None
    cached_tokens: int
    answer_logprob: float | None = Field(description="mean, natural logarithm")
    seconds: Seconds
    segments: list[Segment] | None = None
    attention: Attention | None = Field(default=None, description="where it was asked for and the engine tells")


class PromptDetails(_Reply):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(description="read earlier already, by another request or as a document")


class Usage(_Reply):
    """Tokens used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(_Reply):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token written."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Reply):
    """Of the tokens written."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(_Reply):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


Finish = Literal["stop", "length"]


class ChatChoice(_Reply):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    anchorkv: Figures


class ChatReply(_Reply):
    """Answers to a chat. `anchorkv`: the figures of the first."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    anchorkv: Figures


class TextLogprobs(_Reply):
    """Of the tokens written; the lists are alike in length."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(_Reply):
    """One continuation."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Finish
    anchorkv: Figures


class TextReply(_Reply):
    """Continuations of a text. `anchorkv`: the figures of the first."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str
    anchorkv: Figures


def head(number: str, card: ModelCard, kind: str) -> dict[str, Any]:
    """What every reply and every chunk of a stream begins with."""
    return {
        "id": number, "object": kind, "created": int(time.time()), "model": card.name,
        "system_fingerprint": f"fp_{card.info.fingerprint[:16]}",
    }


def figures_of(answered: Answered, explain: bool) -> dict[str, Any]:
    """`Figures`, as JSON. explain: with every segment."""
    outcome = answered.outcome
    found: dict[str, Any] = {
        "id": outcome.id, "policy": answered.plan.policy.name, "reduction": round(outcome.reduction, 3),
        "cells": {"kept": outcome.kept_cells, "peak": outcome.peak_cells, "full": outcome.full_cells},
        "kv_bytes": outcome.kv_bytes, "dropped": sum(segment.dropped for segment in outcome.segments),
        "recalled": [{"number": part.number, "cells": part.cells, "text": part.text} for part in outcome.recalled],
        "fallback": steps_of(answered.plan), "document": outcome.document, "cached_tokens": outcome.cached_tokens,
        "answer_logprob": outcome.answer_logprob,
        "seconds": {
            "queue": outcome.queue_seconds, "prefill": outcome.prefill_seconds,
            "first_token": outcome.first_token_seconds, "decode": outcome.decode_seconds,
        },
    }
    if explain:
        found["segments"] = segments_of(outcome)
    if outcome.attention is not None:
        found["attention"] = asdict(outcome.attention)
    return found


def segments_of(outcome: Outcome) -> list[dict[str, Any]]:
    """`Segment`s, as JSON."""
    return [segment_of(segment) for segment in outcome.segments]


def segment_of(segment: Any) -> dict[str, Any]:
    """A `Segment`, as JSON, of SegmentFacts."""
    return {name: _listed(getattr(segment, name)) for name in Segment.model_fields}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def steps_of(plan: Plan) -> list[dict[str, Any]]:
    """`FallbackStep`s, as JSON."""
    return [
        {"before": step.before, "after": step.after, "reason": step.reason, "dry_run": step.dry_run}
        for step in plan.steps
    ]


def headers_of(answered: Answered) -> dict[str, str]:
    """The most important figures, for who looks at headers alone."""
    outcome = answered.outcome
    return {
        **early_headers(outcome.id, answered.plan),
        "x-anchorkv-kept-cells": str(outcome.kept_cells), "x-anchorkv-full-cells": str(outcome.full_cells),
        "x-anchorkv-reduction": f"{outcome.reduction:.3f}",
        "x-anchorkv-recalled-segments": str(len(outcome.recalled)),
        "x-anchorkv-cached-tokens": str(outcome.cached_tokens),
    }


def early_headers(number: str, plan: Plan) -> dict[str, str]:
    """What is known before the answer is written, for streams."""
    return {
        "x-anchorkv-id": number, "x-anchorkv-policy": quote(plan.policy.name, safe=" ,="),
        "x-anchorkv-fallback-steps": str(len(plan.steps)),
    }


def usage_of(outcomes: list[Outcome], prompts: int) -> dict[str, Any]:
    """`Usage` of a request, as JSON: each of its `prompts` prompts counts once, however many answers it got."""
    each = len(outcomes) // prompts
    firsts = outcomes[::each]
    prompt, written = sum(o.prompt_tokens for o in firsts), sum(o.completion_tokens for o in outcomes)
    return {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(o.cached_tokens for o in firsts)},
    }


def chat_logprobs(pieces: list[Piece]) -> dict[str, Any] | None:
    """`ChatLogprobs`, as JSON; None where no piece has any."""
    written = [piece for piece in pieces if piece.logprob is not None]
    if not written:
        return None
    return {"content": [
        {**_token(piece.token_text, piece.logprob), "top_logprobs": [_token(text, value) for text, value in piece.top]}
        for piece in written
    ], "refusal": None}


def text_logprobs(pieces: list[Piece], offset: int = 0) -> dict[str, Any] | None:
    """`TextLogprobs`, as JSON; offset: characters that were shown before."""
    written = [piece for piece in pieces if piece.logprob is not None]
    if not written:
        return None
    offsets = []
    for piece in written:
        offsets.append(offset)
        offset += len(piece.token_text)
    return {
        "tokens": [piece.token_text for piece in written],
        "token_logprobs": [_finite(piece.logprob) for piece in written],
        "top_logprobs": [{text: _finite(value) for text, value in piece.top} for piece in written],
        "text_offset": offsets,
    }


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    # Of half a character no bytes are known here.
    return {"token": text, "logprob": _finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


def _finite(value: float | None) -> float:
    """As OpenAI writes what has no probability."""
    return max(-9999.0, value) if value is not None and not math.isnan(value) else -9999.0
