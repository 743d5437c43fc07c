"""/v1/audit: the records of answers, for auditors and operators, each of its own tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel

from anchorkv.serve.api.callers import AuditorOf, OperatorOf, ServiceOf
from anchorkv.serve.api.errors import responses
from anchorkv.serve.audit.chain import Entry
from anchorkv.serve.audit.errors import AuditError, AuditUnavailable
from anchorkv.serve.audit.store import Filter
from anchorkv.serve.refusals import Refused

router = APIRouter(tags=["audit"])
Word = Annotated[str | None, Query(max_length=200)]


class RecordReply(BaseModel):
    """One record: what `anchorkv audit show --json` prints."""

    model_config = {"extra": "allow"}

    id: str
    sequence: int


class RecordList(BaseModel):
    """Records, the newest first; `next`: give it as `before` for older ones."""

    object: Literal["list"] = "list"
    data: list[RecordReply]
    next: int | None


class VerifyReply(BaseModel):
    """What `anchorkv audit verify --json` prints."""

    model_config = {"extra": "allow"}

    sound: bool


@router.get(
    "/v1/audit", response_model=RecordList, operation_id="audit_list", responses=responses(400, 401, 403, 503),
)
async def list_records(
    service: ServiceOf, caller: AuditorOf, since: datetime | None = None, until: datetime | None = None,
    model: Word = None, policy: Word = None, kind: Word = None, fallback: bool | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50, before: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
    brief: bool = False,
) -> Any:
    """List records of the tenant. Times without a zone are UTC. brief: figures alone, no segments and no texts."""
    wanted = Filter(
        tenant=caller.tenant, since=_utc(since), until=_utc(until), model=model, policy=policy, fallback=fallback,
        kind=kind,
    )
    found: Sequence[Entry] = await _ask(lambda: service.trail.store.query(wanted, limit=limit, before=before))
    last = found[-1].sequence if len(found) == limit else None
    return {"object": "list", "data": [entry.brief() if brief else entry.as_dict() for entry in found], "next": last}


@router.get(
    "/v1/audit/verify", response_model=VerifyReply, operation_id="audit_verify", responses=responses(401, 403, 503),
)
async def verify(service: ServiceOf, caller: OperatorOf) -> Any:
    """Check the whole chain, of all tenants: that no record was changed, removed or put in."""
    report = await _ask(service.trail.store.verify)
    return {**report.as_dict(), "waiting": service.trail.waiting, "trouble": service.trail.trouble}


@router.get(
    "/v1/audit/{number}", response_model=RecordReply, operation_id="audit_record",
    responses=responses(400, 401, 403, 404, 503),
)
async def record(
    number: Annotated[str, Path(min_length=1, max_length=200)], service: ServiceOf, caller: AuditorOf
) -> Any:
    """One record of the tenant."""
    found = await _ask(lambda: service.trail.store.get(number, tenant=caller.tenant))
    return found.as_dict()


async def _ask(action: Any) -> Any:
    """`action` in a worker thread. Raises Refused."""
    try:
        return await asyncio.to_thread(action)
    except AuditUnavailable as error:
        raise Refused(503, str(error), code="no_audit", retry_after=5.0) from None
    except AuditError as error:
        raise Refused(404, str(error), code="not_found") from None


def _utc(time: datetime | None) -> datetime | None:
    return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time
