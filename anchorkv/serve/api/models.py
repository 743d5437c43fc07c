"""GET /v1/models: the one model there is, and which policies a caller may name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel

from anchorkv.serve.api.asks import check_model
from anchorkv.serve.api.callers import AnyoneOf, ServiceOf
from anchorkv.serve.api.errors import responses
from anchorkv.serve.service import Service

router = APIRouter(tags=["OpenAI"])


class ModelFacts(BaseModel):
    """What anchorkv knows of the model."""

    architecture: str
    weights: str
    window: int
    vocabulary: int
    fingerprint: str
    adapter: str | None
    policy: str
    policies: list[str]
    areas: list[str]
    most_tokens: int


class ModelReply(BaseModel):
    """A model, as OpenAI lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    anchorkv: ModelFacts


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelReply]


@router.get("/v1/models", response_model=ModelList, operation_id="models", responses=responses(401, 403))
async def models(service: ServiceOf, caller: AnyoneOf) -> Any:
    """List what is served."""
    return {"object": "list", "data": [_model(service)]}


@router.get(
    "/v1/models/{model:path}", response_model=ModelReply, operation_id="model", responses=responses(400, 401, 403, 404),
)
async def model(
    model: Annotated[str, Path(min_length=1, max_length=200)], service: ServiceOf, caller: AnyoneOf
) -> Any:
    """One model."""
    check_model(model, service)
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    card, info = service.card, service.card.info
    facts = {
        "architecture": info.architecture, "weights": info.weights, "window": info.window,
        "vocabulary": info.vocabulary, "fingerprint": info.fingerprint, "adapter": card.adapter or None,
        "policy": service.policies.default.name, "policies": service.policies.names(),
        "areas": service.policies.areas(), "most_tokens": service.bounds.max_tokens,
    }
    return {"id": card.name, "object": "model", "created": card.created, "owned_by": "anchorkv", "anchorkv": facts}
