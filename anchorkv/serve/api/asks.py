"""From OpenAI's requests to what the engine room takes."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from typing import Any

from anchorkv.engines.base import ModelInfo
from anchorkv.sampling import Sampling
from anchorkv.serve.api.formats import ChatRequest, CompletionRequest, ResponseFormat, Wishes
from anchorkv.serve.auth import Principal
from anchorkv.serve.policies import Wish
from anchorkv.serve.refusals import Refused, bad
from anchorkv.serve.requests import Ask, Message, new_id
from anchorkv.serve.service import Service

_SEEDS = 2**63


def chat_asks(request: ChatRequest, service: Service, caller: Principal) -> list[Ask]:
    """One for each of the `n` answers. Raises Refused, ConfigError."""
    wishes = request.anchorkv or Wishes()
    most = request.max_completion_tokens or request.max_tokens
    # Templates know no developer; OpenAI's say that it is what used to be the system.
    messages = tuple(
        Message("system" if message.role == "developer" else message.role, message.text)
        for message in request.messages
    )
    first = Ask(
        id=new_id("chatcmpl"), messages=messages, document=wishes.document,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        json_schema=_schema(request.response_format), **_common(request, service, caller, most),
    )
    return _numbered([first], request.n or 1)


def completion_asks(request: CompletionRequest, service: Service, caller: Principal) -> list[Ask]:
    """`n` for each prompt, in the order of the prompts. Raises Refused, ConfigError."""
    if request.anchorkv is not None and request.anchorkv.document is not None:
        raise bad("A document is asked by /v1/chat/completions, not by a plain text.", "anchorkv.document")
    common = _common(request, service, caller, request.max_tokens)
    asks, number = [], new_id("cmpl")
    for prompt in request.prompts:
        if isinstance(prompt, tuple):
            _check_tokens(prompt, service.card.info, "prompt")
        given: dict[str, Any] = {"text": prompt} if isinstance(prompt, str) else {"tokens": prompt}
        schema = _schema(request.response_format)
        asks.append(Ask(id=number, logprobs=request.logprobs, json_schema=schema, **given, **common))
    return _numbered(asks, request.n or 1)


def wish_of(wishes: Wishes | None) -> Wish:
    """What a request says of the policy."""
    found = wishes or Wishes()
    return Wish(found.policy, found.reduction, found.recall, found.area)


def check_model(name: str | None, service: Service) -> None:
    """Raises Refused (404) for a model that is not served here."""
    if name is not None and name != service.card.name:
        raise Refused(
            404, f"There is no model {name!r} here; this server runs {service.card.name!r}.", param="model",
            code="model_not_found",
        )


def _common(
    request: ChatRequest | CompletionRequest, service: Service, caller: Principal, most: int | None
) -> dict[str, Any]:
    bias = []
    for key, value in (request.logit_bias or {}).items():
        if not key.isdecimal() or len(key) > 9:
            raise bad(f"logit_bias has the key {key[:40]!r}, which is no token id; use ids.", "logit_bias")
        bias.append((int(key), value))
    _check_tokens([token for token, _ in bias], service.card.info, "logit_bias")
    seed = secrets.randbelow(2**53) if request.seed is None else request.seed
    return {
        "tenant": caller.tenant, "policy": service.policies.default.config, "stop": request.stops,
        "sampling": Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            # 0 means the likeliest token, which is what any share as small gives.
            top_p=max(1e-9, 1.0 if request.top_p is None else request.top_p),
            top_k=request.top_k or 0, seed=seed % _SEEDS,
        ),
        "presence_penalty": request.presence_penalty or 0.0, "frequency_penalty": request.frequency_penalty or 0.0,
        "logit_bias": tuple(bias), "max_tokens": most or service.bounds.default_tokens,
        "ignore_end": request.ignore_eos, "attention": (request.anchorkv or Wishes()).attention,
    }


def _check_tokens(tokens: list[int] | tuple[int, ...], info: ModelInfo, param: str) -> None:
    wrong = next((token for token in tokens if token >= info.vocabulary), None)
    if wrong is not None:
        raise bad(f"The model has no token {wrong}; its ids are below {info.vocabulary}.", param)


def _numbered(asks: list[Ask], n: int) -> list[Ask]:
    """The first keeps its id, which is the reply's; the others' are made of it. Their seeds differ."""
    out: list[Ask] = []
    for ask in asks:
        for i in range(n):
            number = ask.id if not out else f"{ask.id}-{len(out)}"
            sampling = replace(ask.sampling, seed=(ask.sampling.seed + i) % _SEEDS)
            out.append(replace(ask, id=number, sampling=sampling))
    return out


def _schema(wanted: ResponseFormat | None) -> str | None:
    if wanted is None or wanted.type == "text":
        return None
    return "{}" if wanted.json_schema is None else json.dumps(wanted.json_schema.schema_)
