"""The newest answers of a tenant, from the audit trail, as the figures that a proof of concept reports."""

from __future__ import annotations

import statistics
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anchorkv.evaluate.ways import FULL
from anchorkv.serve.audit.chain import Entry
from anchorkv.serve.audit.record import ANSWER, moment
from anchorkv.serve.audit.store import AuditStore, Filter
from anchorkv.serve.estimates import Rolling

MOST = 200
"""Newest answers that figures are made of."""
ENOUGH = 5
"""Answers on each side, below which their speeds are not compared."""
CONFIDENCE = 0.95
_PAGE = 50


@dataclass(frozen=True)
class Row:
    """Of one answer."""

    time: int
    policy: str
    kept: float
    peak: float
    full: float
    kv_bytes: float
    speed: float | None
    """Tokens a second while it was written; None for an answer of one token."""
    first_token: float
    steps: tuple[tuple[str, str, str, bool], ...]
    """Policy before, policy after, reason, and whether the step was only noted."""

    @classmethod
    def of(cls, entry: Entry) -> Row | None:
        """None where the record says nothing: retention took its content away, or no cell was ever held."""
        body = entry.body()
        figures = body.get("figures", {})
        if not figures.get("full_cells"):
            return None
        seconds, written = figures["decode_seconds"], figures["completion_tokens"]
        return cls(
            entry.time, entry.policy, figures["kept_cells"], figures["peak_cells"], figures["full_cells"],
            figures["kv_bytes"], (written - 1) / seconds if written > 1 and seconds > 0 else None,
            figures["first_token_seconds"], tuple(_step(step) for step in body.get("fallback", ())),
        )


def _step(step: Mapping[str, Any]) -> tuple[str, str, str, bool]:
    return step["before"], step["after"], step["reason"], bool(step.get("dry_run"))


class Recent:
    """Thread-safe. Each record is read once, however often figures are asked for."""

    def __init__(self, store: AuditStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._rows: dict[str, deque[Row]] = {}
        self._last: dict[str, int] = {}

    def figures(self, tenant: str) -> dict[str, Any]:
        """JSON-able. tenant: EVERY_TENANT for all. Raises AuditError, AuditUnavailable."""
        with self._lock:
            rows = self._rows.setdefault(tenant, deque(maxlen=MOST))
            for entry in self._new(tenant):
                self._last[tenant] = entry.sequence
                if (row := Row.of(entry)) is not None:
                    rows.append(row)
            found = list(rows)
        return summary(found)

    def _new(self, tenant: str) -> Iterable[Entry]:
        """Records that were not seen yet, the oldest first."""
        wanted = Filter(tenant=tenant, kind=ANSWER)
        if tenant not in self._last:
            yield from reversed(self._store.query(wanted, limit=MOST))
            return
        while chunk := self._store.query(wanted, limit=_PAGE, after=self._last[tenant]):
            yield from chunk


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """JSON-able; figures that nothing is known of are None."""
    if not rows:
        return {"count": 0}
    kept, full = sum(row.kept for row in rows), sum(row.full for row in rows)
    by_full = [row.speed for row in rows if row.speed and row.policy == FULL]
    by_anchors = [row.speed for row in rows if row.speed and row.policy != FULL]
    stepped = [row for row in rows if any(not dry for *_, dry in row.steps)]
    share = Rolling(weight=len(rows), mean=len(stepped) / len(rows)).share_bounds(0.0, CONFIDENCE)
    reasons = Counter(step for row in rows for step in row.steps)
    firsts = sorted(row.first_token for row in rows)
    return {
        "count": len(rows), "since": moment(rows[0].time).isoformat(timespec="seconds"),
        "reduction": full / max(1.0, kept), "kept_cells": kept / len(rows), "full_cells": full / len(rows),
        "peak_cells": sum(row.peak for row in rows) / len(rows),
        "kv_bytes": sum(row.kv_bytes for row in rows) / len(rows),
        "speed": _median(by_anchors), "speed_count": len(by_anchors), "full_speed": _median(by_full),
        "full_speed_count": len(by_full),
        "speed_ratio": statistics.median(by_anchors) / statistics.median(by_full)
        if min(len(by_anchors), len(by_full)) >= ENOUGH else None,
        "first_token": _median(firsts), "first_token_p95": firsts[int(0.95 * (len(firsts) - 1))],
        "fallback": {**share.as_dict(), "confidence": CONFIDENCE} if share else None, "fallback_count": len(stepped),
        "steps": [
            {"before": before, "after": after, "reason": reason, "dry_run": dry, "count": count}
            for (before, after, reason, dry), count in reasons.most_common(20)
        ],
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
