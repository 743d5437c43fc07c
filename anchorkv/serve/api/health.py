"""Whether the process lives, whether it takes requests, and how full it is."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from anchorkv.serve.api.callers import AnyoneOf, OperatorOf, ServiceOf
from anchorkv.serve.api.errors import responses
from anchorkv.serve.audit.record import EVERY_TENANT
from anchorkv.serve.metrics import CONTENT_TYPE
from anchorkv.serve.refusals import Refused, forbidden
from anchorkv.serve.service import Service

router = APIRouter(tags=["operation"])
_TEXT: dict[int | str, dict[str, Any]] = {200: {
    "description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}},
}}
HANGS = 120.0
"""Seconds: an engine thread that has work and finished no round for so long hangs."""


class Live(BaseModel):
    """The process answers and its engine thread runs."""

    status: Literal["live", "dead"]


class Ready(BaseModel):
    """Requests are taken."""

    status: Literal["ready", "stopping", "dead"]


class WatchReply(BaseModel):
    """What the quality watch knows."""

    model_config = {"extra": "allow"}

    model: str
    share: float


class LoadReply(BaseModel):
    """How full the engine room is."""

    model_config = {"extra": "allow"}

    cells: int
    used_cells: int
    draining: bool


@router.get("/health/live", response_model=Live, operation_id="live", responses={503: {"model": Live}})
async def live(service: ServiceOf) -> Response:
    """For whoever restarts the process."""
    alive = _alive(service)
    return JSONResponse({"status": "live" if alive else "dead"}, 200 if alive else 503)


@router.get("/health/ready", response_model=Ready, operation_id="ready", responses={503: {"model": Ready}})
async def ready(service: ServiceOf) -> Response:
    """For whoever sends requests here."""
    status = "dead" if not _alive(service) else "stopping" if service.draining else "ready"
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


@router.get("/v1/load", response_model=LoadReply, operation_id="load", responses=responses(401, 403))
async def load(service: ServiceOf, caller: AnyoneOf) -> Any:
    """Cells, sessions and rates now."""
    found = service.scheduler.load()
    return {
        **asdict(found), "kv_bytes": found.used_cells * service.card.info.cell_bytes,
        "cell_bytes": service.card.info.cell_bytes, "requests": service.running, "draining": service.draining,
        "audit_waiting": service.trail.waiting, "audit_trouble": service.trail.trouble,
    }


@router.get("/metrics", operation_id="metrics", responses=_TEXT | responses(401, 403, 404))
async def metrics(service: ServiceOf, caller: OperatorOf) -> Response:
    """For Prometheus, of all tenants together: where there are keys, for one of the tenant `*`."""
    if service.gate.keys and caller.tenant != EVERY_TENANT:
        raise forbidden(
            f"These figures are of all tenants; they need an operator's key of the tenant '{EVERY_TENANT}'."
        )
    if service.metrics is None:
        raise Refused(404, "This server counts nothing for Prometheus.", code="not_found")
    return Response(await asyncio.to_thread(service.metrics.text), media_type=CONTENT_TYPE)


@router.get(
    "/v1/watch", response_model=WatchReply, operation_id="watch", responses=responses(401, 403, 404),
)
async def watch(service: ServiceOf, caller: OperatorOf) -> Any:
    """The quality watch: estimates with their bounds, alarms, breakers; of the tenant, or of all for its operators."""
    if service.safeguard is None:
        raise Refused(404, "This server watches no quality.", code="not_found")
    all_tenants = caller.tenant == EVERY_TENANT or not service.gate.keys
    return service.safeguard.status(None if all_tenants else caller.tenant)


def _alive(service: Service) -> bool:
    load = service.scheduler.load()
    works = load.reading + load.writing + load.waiting > 0
    return service.scheduler.alive and not (works and load.last_step_age > HANGS)
