"""A process that appends records: audit_worker.py URL PREFIX COUNT [SPOOL]; prints each id once it is acknowledged."""

from __future__ import annotations

import sys
from itertools import count, islice

from audit_records import record

from anchorkv.serve.audit.spool import Spool
from anchorkv.serve.audit.store import AuditStore
from anchorkv.serve.audit.trail import AuditTrail


def main(url: str, prefix: str, most: int, spool: str | None = None) -> None:
    store = AuditStore(url, timeout=30)
    trail = AuditTrail(store, Spool(spool) if spool else None)
    for number in islice(count(), most):
        trail.append(record(number, tenant=prefix, id=f"{prefix}-{number}"))
        print(f"{prefix}-{number}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
