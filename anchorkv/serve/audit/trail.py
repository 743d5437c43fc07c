"""What the server appends to: the database, and a spool for the time that it is away."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Self

from anchorkv.serve.audit.errors import AuditConflict, AuditError, AuditUnavailable
from anchorkv.serve.audit.record import Record, Sealed, canonical
from anchorkv.serve.audit.spool import Spool
from anchorkv.serve.audit.store import AuditStore, Receipt

_BATCH = 100
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spooled:
    """The record is on this machine's disk and will be in the database once that is back."""

    id: str


class AuditTrail:
    """An acknowledged record is in the database or in the spool. Use it from as many threads as you like.

    While records wait in the spool, new ones queue behind them: one process's records keep their order, and nobody
    waits for a database that is known to be away.
    """

    def __init__(self, store: AuditStore, spool: Spool | None = None, *, retry_seconds: float = 1.0) -> None:
        """spool: without one, a record is refused while the database is away. The trail closes both."""
        self.store, self.spool, self.retry_seconds = store, spool, retry_seconds
        self.trouble = ""
        """Why records wait in the spool, one sentence; "" when none do."""
        self._turn, self._replaying = threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._replay_on, name="audit-spool", daemon=True)
        self._thread.start()

    def append(self, record: Record) -> Receipt | Spooled:
        """Raises AuditError for a record that cannot be stored, AuditUnavailable when nothing takes it: then the answer
        must not be acknowledged."""
        sealed = self.store.sealed(record)
        with self._turn:
            if not self.waiting:
                try:
                    return self.store.append_all([sealed])[0]
                except AuditUnavailable as error:
                    if self.spool is None:
                        raise
                    self.trouble = str(error)
                    _log.warning("Audit records go to the spool: %s", error)
            if self.spool is not None:
                self.spool.append(sealed)
        return Spooled(record.id)

    @property
    def waiting(self) -> int:
        """Records in the spool."""
        return self.spool.count if self.spool is not None else 0

    def replay(self) -> int:
        """Move waiting records into the database, in order; returns how many. Raises AuditUnavailable while it is away.

        Happens by itself every `retry_seconds`.
        """
        moved = 0
        with self._replaying:
            while self.spool is not None and self.waiting:
                with self._turn:
                    records, at = self.spool.waiting(_BATCH)
                self._store(records)
                with self._turn:
                    self.spool.done(at)
                    self.trouble = self.trouble if self.waiting else ""
                moved += len(records)
        return moved

    def _store(self, records: list[Sealed]) -> None:
        try:
            self.store.append_all(records)
        except AuditConflict as error:
            if len(records) > 1:  # one of them is at fault: it must not hold up the others
                for record in records:
                    self._store([record])
            elif self.spool is not None:
                _log.error("An audit record was put aside in %s: %s", self.spool.damaged_path, error)
                self.spool.put_aside(canonical(records[0].as_dict()).encode())

    def _replay_on(self) -> None:
        while not self._closing.wait(self.retry_seconds):
            try:
                moved = self.replay()
            except AuditError as error:
                self.trouble = str(error)
            except Exception:  # the thread must live on, whatever it was
                _log.exception("Replaying the audit spool failed; it is tried again.")
            else:
                if moved:
                    _log.info("%d audit records went from the spool to the database.", moved)

    def close(self) -> None:
        """What still waits stays in the spool for the next start."""
        self._closing.set()
        self._thread.join()
        if self.spool is not None:
            self.spool.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
