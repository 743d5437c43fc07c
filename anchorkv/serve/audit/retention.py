"""Retention: which records are old enough to lose their content. `AuditStore.retain` takes it away.

Records are retired from the oldest on, up to a sequence number, so that a clock that once ran behind makes nobody's
record old before its time. A clock that ran ahead holds retention up at the record that it stamped: `notes` says so,
and `through` goes past it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select

from anchorkv.serve.audit.errors import AuditError
from anchorkv.serve.audit.models import RecordRow
from anchorkv.serve.audit.record import EVERY_TENANT, RETENTION, microseconds, moment


@dataclass(frozen=True, kw_only=True)
class Retire:
    """What to retire: the records from before a time, or those up to a sequence number."""

    tenant: str
    """Or EVERY_TENANT."""
    before: datetime | None = None
    through: int | None = None
    reason: str = ""
    by: str = ""
    dry_run: bool = False
    most: int | None = None
    """Of the oldest, at most so many at once; None: all of them."""

    def __post_init__(self) -> None:
        if (self.before is None) == (self.through is None):
            raise AuditError("Say what to retire: records before a time, or through a sequence number; one of the two.")
        if self.before is not None and self.before > datetime.now(UTC):
            raise AuditError(f"Records from before {self.before:%Y-%m-%d} cannot be retired yet: that time is to come.")


@dataclass(frozen=True)
class Retired:
    """What was retired, or would be in a dry run. `through` 0: nothing is old enough."""

    tenant: str
    through: int
    records: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"tenant": self.tenant, "through": self.through, "records": self.records, "notes": list(self.notes)}


def new_id() -> str:
    return f"retention-{uuid.uuid4().hex}"


def plan(connection: Connection, retire: Retire) -> Retired:
    """Raises AuditError where the whole trail would be retired by time: then a clock is wrong, or nothing is in use."""
    mine = _of(retire.tenant)
    newest = connection.execute(select(func.max(RecordRow.sequence)).where(*mine)).scalar() or 0
    notes: tuple[str, ...] = ()
    if retire.before is None:
        through = min(retire.through or 0, newest)
    else:
        time = microseconds(retire.before)
        young = select(RecordRow.sequence, RecordRow.time).where(*mine, RecordRow.time >= time)
        first = connection.execute(young.order_by(RecordRow.sequence).limit(1)).one_or_none()
        if first is None and newest:
            raise AuditError(
                f"Every record is from before {retire.before:%Y-%m-%d %H:%M} UTC, the newest too; check the clock, or "
                f"name the last record to retire with --through {newest}."
            )
        through = first.sequence - 1 if first is not None else 0
        if first is not None and first.time > microseconds(datetime.now(UTC)):
            notes = (
                f"Record {first.sequence} is stamped {_shown(first.time)}, which is to come: a clock ran ahead. It and "
                "what follows stay; name the last record to retire with --through.",
            )
    found = Retired(retire.tenant, through, 0, notes)
    if retire.most is not None:
        wanted = select(RecordRow.sequence).where(*covered(found)).order_by(RecordRow.sequence)
        last = connection.execute(wanted.offset(retire.most - 1).limit(1)).scalar()
        through = through if last is None else last
        found = Retired(retire.tenant, through, 0, notes)
    count = connection.execute(select(func.count()).select_from(RecordRow).where(*covered(found))).scalar() or 0
    return Retired(retire.tenant, through, count, notes)


def covered(retired: Retired) -> list[ColumnElement[bool]]:
    """Conditions for the records that still have a content to be taken away."""
    return [*_of(retired.tenant), RecordRow.sequence <= retired.through, RecordRow.content.is_not(None)]


def _of(tenant: str) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = [RecordRow.kind != RETENTION]
    return found if tenant == EVERY_TENANT else [*found, RecordRow.tenant == tenant]


def _shown(time: int) -> str:
    try:
        return f"{moment(time):%Y-%m-%d %H:%M} UTC"
    except OverflowError:
        return f"{time} µs after 1970"
