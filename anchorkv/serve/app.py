"""The ASGI application over a service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

import anchorkv
from anchorkv.serve.api import audit, chat, completions, documents, errors, health, models
from anchorkv.serve.api.guard import Guard
from anchorkv.serve.logs import RequestIds
from anchorkv.serve.pages import routes as pages
from anchorkv.serve.service import Service
from anchorkv.serve.settings import LOOPBACK_HOSTS

ROUTERS = (chat.router, completions.router, models.router, documents.router, audit.router, health.router, pages.router)


def make_app(service: Service, hosts: Sequence[str] = LOOPBACK_HOSTS) -> FastAPI:
    """The application; it starts the service, and at its end closes it. hosts: as `Guard` takes them."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="anchorkv", version=anchorkv.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        summary="Language models whose KV cache keeps each sentence's anchors: OpenAI's API, documents, audit.",
        redirect_slashes=False,
    )
    app.state.service = service
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    bounds = service.bounds
    app.add_middleware(
        Guard, hosts=hosts, body_bytes=bounds.bytes, upload_bytes=bounds.upload_bytes,
        seconds=bounds.read_seconds,
    )
    app.add_middleware(RequestIds)
    _describe(app)
    return app


def _describe(app: FastAPI) -> None:
    """Make the OpenAPI description whole: every error that can come, and no other."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        fresh = app.openapi_schema is None
        found = described()
        if fresh:
            for path in found["paths"].values():
                for operation in path.values():
                    errors.describe(operation)
            schemas = found["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas |= _defined()
        return found

    app.openapi = openapi  # type: ignore[method-assign]


def _defined() -> dict[str, Any]:
    """Schemas that no route names by its type, for it reads its body itself."""
    whole = documents.DocumentRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    parts: dict[str, Any] = whole.pop("$defs", {})
    return {**parts, "DocumentRequest": whole}
