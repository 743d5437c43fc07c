"""Retention by itself: what is older than the operator wants to keep loses its content, on start and then every day."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from anchorkv.serve.audit.errors import AuditError
from anchorkv.serve.audit.record import EVERY_TENANT
from anchorkv.serve.audit.retention import Retire
from anchorkv.serve.audit.store import AuditStore

_log = logging.getLogger("anchorkv.serve")
DAY = 86_400.0
BATCH = 5000
"""Records a transaction: while it runs, answers wait for their own records to be written."""
_PAUSE = 0.2
"""Seconds between two of them, for those who wait."""


async def retire_daily(store: AuditStore, days: float, every: float = DAY, batch: int = BATCH) -> None:
    """Take away the content of records that are older than `days`, every `every` seconds, until it is called off.

    What fails is logged (and so counted), and tried again the next time.
    """
    while True:
        try:
            await _retire(store, days, batch)
        except AuditError as error:
            _log.error("Records older than %g days keep their content for now: %s", days, error)
        except Exception:  # the task must live on, whatever it was
            _log.exception("Retention failed; it is tried again.")
        await asyncio.sleep(every)


async def _retire(store: AuditStore, days: float, batch: int) -> None:
    retire = Retire(
        tenant=EVERY_TENANT, before=datetime.now(UTC) - timedelta(days=days), reason=f"older than {days:g} days",
        by="server", most=batch,
    )
    records = 0
    while (done := await asyncio.to_thread(store.retain, retire)).records:
        records += done.records
        if done.records < batch:
            break
        await asyncio.sleep(_PAUSE)
    if records:
        _log.info("The content of %d records older than %g days was taken away.", records, days)
    for note in done.notes:
        _log.warning("Retention: %s", note)
