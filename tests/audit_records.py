"""Records for tests of the audit trail."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from anchorkv.config import preset
from anchorkv.serve.audit.record import Record, digest
from anchorkv.serve.requests import RecalledSegment, SegmentFacts

START = datetime(2026, 1, 1, tzinfo=UTC)
SECRET = "Anna Weber pays 9 crowns"


def record(number: int, tenant: str = "mill", **fields: Any) -> Record:
    """The answer no. `number`, asked `number` hours after START, with text in every place that may hold text."""
    given: dict[str, Any] = {
        "id": f"ask-{number}", "tenant": tenant, "time": START + timedelta(hours=number), "key": "key-1",
        "model": "tiny", "model_fingerprint": "fake-1", "adapter": "", "policy": "default",
        "policy_config": preset("default").replace(pinned=(SECRET,)).model_dump(mode="json"),
        "request_hash": digest(SECRET), "answer_hash": digest(f"{SECRET} indeed"),
        "request": {"messages": [{"role": "user", "content": SECRET}]}, "answer": f"{SECRET} indeed",
        "answer_tokens": [1, 2, 3],
        "segments": [
            SegmentFacts(0, 0, 24, 24, 4, 20, 0, 0, ("4 sinks",), text=SECRET, anchors=(SECRET,)),
            SegmentFacts(1, 24, 60, 36, 36, 0, 0, 33, ("recalled for the question",), text=SECRET),
        ],
        "recalled": [RecalledSegment(1, 33, 24, 60, text=SECRET)],
        "figures": {"prompt_tokens": 60, "completion_tokens": 3, "kept_cells": 40, "full_cells": 63, "kv_bytes": 2560},
    }
    return Record(**{**given, **fields})
