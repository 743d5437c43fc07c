"""GET /v1/dashboard: everything that the dashboard shows, in one reply."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from anchorkv.poc.results import Thresholds
from anchorkv.serve.api import health
from anchorkv.serve.api.callers import OperatorOf, ServiceOf
from anchorkv.serve.api.errors import responses
from anchorkv.serve.audit.errors import AuditError
from anchorkv.serve.pages.recent import Recent
from anchorkv.serve.series import LEAST

router = APIRouter(tags=["operation"])
_OF_WATCH = ("counts", "waiting", "share", "estimates", "breakers", "alarm_counts", "fallback")
_ALARMS = 20


class DashboardReply(BaseModel):
    """The KPIs of a proof of concept, as this server sees them."""

    load: health.LoadReply
    answers: dict[str, Any] | None
    """Figures of the newest answers; None while the audit trail cannot be read."""
    watch: dict[str, Any] | None
    """Estimates, breakers and alarms; None where nothing is watched."""
    thresholds: Thresholds
    least_checks: float
    """Below so many checks the watch judges no quality."""
    expected_reduction: float | None
    """What the proof of concept measured, where a rollout plan is run."""


@router.get(
    "/v1/dashboard", response_model=DashboardReply, operation_id="dashboard", responses=responses(401, 403),
)
async def dashboard(request: Request, service: ServiceOf, caller: OperatorOf) -> Any:
    """Memory, speed, quality, fallbacks and sessions: of the tenant, or of all for its operators."""
    state, rollout = request.app.state, service.policies.rollout
    if not hasattr(state, "recent"):
        state.recent = Recent(service.trail.store)
    recent: Recent = state.recent
    try:
        answers = await asyncio.to_thread(recent.figures, caller.tenant)
    except AuditError:  # `load` says what the trouble is
        answers = None
    return {
        "load": await health.load(service, caller), "answers": answers,
        "watch": None if service.safeguard is None else _watched(await health.watch(service, caller)),
        "thresholds": Thresholds.model_validate({}) if rollout is None else rollout.thresholds, "least_checks": LEAST,
        "expected_reduction": None if rollout is None else rollout.watch.reduction,
    }


def _watched(status: dict[str, Any]) -> dict[str, Any]:
    """Without single checks and the canary's questions."""
    found = {name: status[name] for name in _OF_WATCH if name in status}
    found["alarms"] = status["alarms"][-_ALARMS:]
    if "canary" in status:
        found["canary"] = {name: value for name, value in status["canary"].items() if name != "results"}
    return found
