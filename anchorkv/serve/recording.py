"""From a request and how it ended to the record that the audit trail keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from anchorkv.engines.base import ModelInfo
from anchorkv.serve.audit.record import Record, canonical, digest
from anchorkv.serve.requests import Ask, Outcome

_ELSEWHERE = ("id", "tenant", "policy")
_NO_FIGURES = ("id", "tenant", "text", "policy", "tokens", "segments", "recalled", "document", "error", "stop")


def request_of(ask: Ask, document_title: str = "", document_text: str | None = None) -> dict[str, Any]:
    """The request as it is recorded and can be run again: the fields of the `Ask`, and which document it was about."""
    found = {item.name: getattr(ask, item.name) for item in fields(Ask) if item.name not in _ELSEWHERE}
    if ask.document is not None:
        found["document_title"] = document_title
        found["document_hash"] = None if document_text is None else digest(document_text)
    return found


def record_of(
    ask: Ask, outcome: Outcome, model: ModelInfo, *, time: datetime | None = None, key: str = "", adapter: str = "",
    adapter_fingerprint: str = "", policy: str = "custom", fallback: Sequence[Any] = (), document_title: str = "",
    document_text: str | None = None, details: dict[str, Any] | None = None,
) -> Record:
    """time: when it was asked, now if None. key: the key's id. policy: its name. fallback: steps with their reasons.

    The texts are in it; the store leaves them out unless the operator keeps text.
    """
    request = request_of(ask, document_title, document_text)
    ended = {"finish": outcome.finish, "error": outcome.error, "document": outcome.document}
    facts = outcome.as_dict()
    return Record(
        id=outcome.id, tenant=outcome.tenant, time=time or datetime.now(UTC), key=key, model=model.name,
        model_fingerprint=model.fingerprint, adapter=adapter, adapter_fingerprint=adapter_fingerprint, policy=policy,
        policy_config=facts["policy"], request_hash=digest(canonical(request)), answer_hash=digest(outcome.text),
        request=request, answer=outcome.text, answer_tokens=outcome.tokens, segments=outcome.segments,
        recalled=outcome.recalled, fallback=fallback,
        figures={name: value for name, value in facts.items() if name not in _NO_FIGURES and name != "finish"},
        details={**ended, **(details or {})},
    )
