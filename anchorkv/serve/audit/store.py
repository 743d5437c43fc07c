"""The audit trail in a database: append, look up, verify, retire. Safe to use from many threads and processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

import platformdirs
from sqlalchemy import ColumnElement, Connection, insert, select, update
from sqlalchemy.exc import DBAPIError

from anchorkv.serve.audit import chain, retention
from anchorkv.serve.audit.chain import Entry, Head, Report
from anchorkv.serve.audit.database import Database, database_url
from anchorkv.serve.audit.errors import AuditConflict, AuditError, AuditUnavailable
from anchorkv.serve.audit.models import HeadRow, RecordRow
from anchorkv.serve.audit.record import EVERY_TENANT, RETENTION, Record, Sealed, microseconds, seal
from anchorkv.serve.audit.upgrade import check, upgrade

_CHUNK = 500


def default_database() -> Path:
    """Where the trail is kept when nothing else is said."""
    return platformdirs.user_data_path("anchorkv") / "audit.db"


@dataclass(frozen=True)
class Receipt:
    """The database holds the record under this number and hash."""

    id: str
    sequence: int
    hash: str


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which records. `tenant` must be said: a tenant's name, or EVERY_TENANT for who may see all."""

    tenant: str
    since: datetime | None = None
    until: datetime | None = None
    """Not included."""
    model: str | None = None
    policy: str | None = None
    fallback: bool | None = None
    """Whether there was a fallback step."""
    kind: str | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        row = RecordRow
        found: list[ColumnElement[bool]] = [] if self.tenant == EVERY_TENANT else [row.tenant == self.tenant]
        if self.since is not None:
            found.append(row.time >= microseconds(self.since))
        if self.until is not None:
            found.append(row.time < microseconds(self.until))
        for column, value in ((row.model, self.model), (row.policy, self.policy), (row.kind, self.kind)):
            if value is not None:
                found.append(column == value)
        if self.fallback is not None:
            found.append(row.fallback > 0 if self.fallback else row.fallback == 0)
        return found


class AuditStore:
    """One database, one chain. Nothing is connected before it is used; `open` does so at once."""

    def __init__(
        self, url: str | Path, *, timeout: float = 5.0, keep_text: bool = False, create: bool = True
    ) -> None:
        """url: a SQLite file's path, or a SQLite or PostgreSQL URL. timeout: seconds until AuditUnavailable.

        keep_text: False stores hashes in place of every text. create: False refuses a database that is not there or
        of another version, where True makes or upgrades it.
        """
        self.keep_text, self.create = keep_text, create
        self.database = Database(database_url(url), timeout)
        self._opened = threading.Lock()
        self._ready = False

    def open(self) -> Self:
        """Raises AuditError for a database that cannot be used, AuditUnavailable where it does not answer."""
        with self._opened:
            if self._ready:
                return self
            self._prepare_file()
            if self.create:
                with self.database.writing(slow=True) as connection:
                    upgrade(connection)
            else:
                with self.database.reading() as connection:
                    check(connection)
            self._ready = True
        return self

    def _prepare_file(self) -> None:
        if not self.database.sqlite:
            return
        path = Path(self.database.url.database or "")
        if not self.create:
            if not path.is_file():
                raise AuditError(f"There is no audit database at {path}; name it with --database.")
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # prompts may stand in it: for its owner alone
        except OSError as error:
            raise AuditUnavailable(f"The audit database {path} cannot be opened ({error.strerror}).") from None

    # --- writing -----------------------------------------------------------------------------------------------------

    def append(self, record: Record) -> Receipt:
        """Store one record; it is on the disk when this returns. The same id and content again is stored once.

        Raises AuditError for what cannot be stored, AuditConflict where another record has its id, AuditUnavailable
        when nothing was stored or that is not known.
        """
        return self.append_all([self.sealed(record)])[0]

    def sealed(self, record: Record) -> Sealed:
        """`record` as it will be stored. Raises AuditError."""
        return seal(record if self.keep_text else record.without_text())

    def append_all(self, records: Sequence[Sealed]) -> list[Receipt]:
        """Store several in order, all of them or none."""
        self.open()
        try:
            return self._append(records)
        except AuditUnavailable as error:
            # A pooled connection may be a dead one of a database that is back. Appending twice is harmless.
            if isinstance(error.__cause__, DBAPIError) and error.__cause__.connection_invalidated:
                return self._append(records)
            raise

    def _append(self, records: Sequence[Sealed]) -> list[Receipt]:
        with self.database.writing() as connection, self.database.deadline(connection):
            head, new = _head(connection, lock=True), []
            known = {entry.id: entry for entry in _known(connection, [record.id for record in records])}
            for record in records:
                if record.id not in known:
                    known[record.id] = Entry.follow(head, record)
                    new.append(known[record.id])
                    head = Head(known[record.id].sequence, known[record.id].hash)
                elif known[record.id].content_hash != record.content_hash:
                    raise AuditConflict(f"There is another audit record of the id '{record.id}'; ids must be unique.")
            _write(connection, new, head)
        return [Receipt(entry.id, entry.sequence, entry.hash) for entry in (known[record.id] for record in records)]

    def retain(self, retire: retention.Retire) -> retention.Retired:
        """Take the content of old records away; their hashes stay, and a record says who did it and why.

        Raises AuditError when the request makes no sense.
        """
        self.open()
        with self.database.writing(slow=True) as connection:
            plan = retention.plan(connection, retire)
            if retire.dry_run or not plan.records:
                return plan
            head = _head(connection, lock=True)
            record = Record(
                id=retention.new_id(), tenant=retire.tenant, kind=RETENTION,
                details={"by": retire.by, "reason": retire.reason, "records": plan.records},
            )
            entry = Entry.follow(head, seal(record, through=plan.through))
            _write(connection, [entry], Head(entry.sequence, entry.hash))
            connection.execute(update(RecordRow).where(*retention.covered(plan)).values(content=None))
        if self.database.sqlite:
            self.database.checkpoint()
        return plan

    # --- reading -----------------------------------------------------------------------------------------------------

    def head(self) -> Head:
        """The newest record's number and hash, to be noted where this database's owner cannot change it."""
        self.open()
        with self.database.reading() as connection, self.database.deadline(connection):
            return _head(connection)

    def get(self, id: str, *, tenant: str) -> Entry:
        """Raises AuditError where `tenant` has no such record, be it another tenant's or nobody's."""
        self.open()
        with self.database.reading() as connection, self.database.deadline(connection):
            wanted = [RecordRow.id == id, *Filter(tenant=tenant).conditions()]
            found = connection.execute(select(RecordRow).where(*wanted)).one_or_none()
        if found is None:
            raise AuditError(f"There is no audit record of the id '{id}'.")
        return Entry(**found._mapping)

    def query(
        self, wanted: Filter, *, limit: int = 100, before: int | None = None, after: int | None = None
    ) -> list[Entry]:
        """At most `limit` records, the newest first; with `after`, the oldest first.

        before, after: sequence numbers to go on from, not included.
        """
        self.open()
        column = RecordRow.sequence
        conditions = wanted.conditions()
        if before is not None:
            conditions.append(column < before)
        if after is not None:
            conditions.append(column > after)
        order = column.desc() if after is None else column
        with self.database.reading() as connection, self.database.deadline(connection):
            rows = connection.execute(select(RecordRow).where(*conditions).order_by(order).limit(limit))
            return [Entry(**row._mapping) for row in rows]

    def entries(self, wanted: Filter) -> Iterator[Entry]:
        """All of them, the oldest first; any number, for only a chunk is held at a time."""
        at = 0
        while chunk := self.query(wanted, limit=_CHUNK, after=at):
            yield from chunk
            at = chunk[-1].sequence

    def verify(self, noted: Sequence[Head] = ()) -> Report:
        """Check every record against the chain. noted: heads that were written down elsewhere."""
        self.open()
        with self.database.reading() as connection:
            row = connection.execute(select(HeadRow)).one_or_none()
            if row is None:
                report = Report()
                report.note(0, "the head is missing, and with it the beginning of the chain")
                return report
            through = select(RecordRow).where(RecordRow.through.is_not(None))
            retentions = [Entry(**found._mapping) for found in connection.execute(through)]
            return chain.verify(_walk(connection), row.origin, Head(row.sequence, row.hash), retentions, noted)

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _head(connection: Connection, lock: bool = False) -> Head:
    query = select(HeadRow.sequence, HeadRow.hash)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise AuditUnavailable("The audit trail has lost its head; `anchorkv audit verify` says what is damaged.")
    return Head(row.sequence, row.hash)


def _known(connection: Connection, ids: Sequence[str]) -> Iterator[Entry]:
    for row in connection.execute(select(RecordRow).where(RecordRow.id.in_(ids))):
        yield Entry(**row._mapping)


def _write(connection: Connection, entries: Sequence[Entry], head: Head) -> None:
    if not entries:
        return
    try:
        connection.execute(insert(RecordRow), [entry.columns() for entry in entries])
        connection.execute(update(HeadRow).values(sequence=head.sequence, hash=head.hash))
    except DBAPIError as error:
        if "the newest" not in str(error.orig):
            raise
        # The triggers refuse, for the newest record is not the one that the head names.
        raise AuditUnavailable(
            "The audit chain is damaged at its end, so nothing can follow it; `anchorkv audit verify` says where."
        ) from None


def _walk(connection: Connection) -> Iterator[Entry]:
    at: int | None = None
    while True:
        query = select(RecordRow).order_by(RecordRow.sequence).limit(_CHUNK)
        rows = connection.execute(query if at is None else query.where(RecordRow.sequence > at)).all()
        yield from (Entry(**row._mapping) for row in rows)
        if len(rows) < _CHUNK:
            return
        at = rows[-1].sequence
