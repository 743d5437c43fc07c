"""What is recorded of one answer, and the form it is stored in: a few columns, the rest as canonical JSON."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta
from numbers import Integral, Real
from typing import Any

from anchorkv.serve.audit.errors import AuditError

ANSWER, RETENTION = "answer", "retention"
EVERY_TENANT = "*"
"""In a retention record: all tenants. No tenant may be called so."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COLUMNS = ("id", "time", "tenant", "kind", "model", "policy")
_LONGEST = 200
_WORDS = ("text", "anchors", "anchor_spans")
"""Fields of a segment that hold words of it, or tell how long they are."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answer as an auditor needs it. Values must be plain JSON, or dataclasses of it.

    `request`, `answer` and `answer_tokens` are the texts themselves: leave them None unless the operator stores text.
    """

    id: str
    """Unique in the database; nobody chooses it but the server."""
    tenant: str
    time: datetime = field(default_factory=lambda: datetime.now(UTC))
    """When it was asked. For people: the order of records is their sequence number, whatever the clock did."""
    kind: str = ANSWER
    key: str = ""
    """Id of the API key, never the key."""
    model: str = ""
    model_fingerprint: str = ""
    adapter: str = ""
    adapter_fingerprint: str = ""
    policy: str = ""
    """The policy's name; `policy_config` is what it says."""
    policy_config: Mapping[str, Any] = field(default_factory=dict)
    request_hash: str = ""
    """`digest` of the request, so that who holds the text can show that it is the one that was asked."""
    answer_hash: str = ""
    request: Mapping[str, Any] | None = None
    answer: str | None = None
    answer_tokens: Sequence[int] | None = None
    segments: Sequence[Any] = ()
    """What was kept, dropped, pinned and recalled, and why; one entry a segment."""
    recalled: Sequence[Any] = ()
    fallback: Sequence[Any] = ()
    """Fallback steps in order, each with its reason."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Tokens, cells, bytes, seconds."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else there is to say. Never text of a tenant: nothing is taken out of it."""

    def without_text(self) -> Record:
        """The same with hashes alone: no request, answer, or words of segments; pinned spans by their hashes."""
        config = dict(_plain(self.policy_config))
        if config.get("pinned"):
            config["pinned"] = [f"sha256:{digest(span)}" for span in config["pinned"]]
        return replace(
            self, request=None, answer=None, answer_tokens=None, policy_config=config,
            segments=_wordless(self.segments), recalled=_wordless(self.recalled),
        )


@dataclass(frozen=True)
class Sealed:
    """A record ready to be stored. What is sealed once is stored the same however often it is tried."""

    id: str
    time: int
    """Microseconds since 1970, UTC."""
    tenant: str
    kind: str
    model: str
    policy: str
    fallback: int
    """Number of fallback steps."""
    through: int | None
    """Retention alone: the last sequence number whose content it took away."""
    content: str
    """Canonical JSON of everything else, and a salt, so that a hash left by retention tells nothing of the text."""

    @property
    def content_hash(self) -> str:
        return digest(self.content)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def seal(record: Record, through: int | None = None) -> Sealed:
    """Raises AuditError for what JSON cannot hold, and for names that are empty, too long or hold control characters.

    through: makes it a record of retention, which takes away the content of all records up to that number.
    """
    if (record.kind == RETENTION) != (through is not None) or (record.tenant == EVERY_TENANT and through is None):
        raise AuditError(f"No tenant may be called {EVERY_TENANT!r} and no kind {RETENTION!r}: retention is so called.")
    for name in _COLUMNS:
        if name != "time":
            _check(name, getattr(record, name), may_be_empty=name in ("model", "policy"))
    content = {item.name: getattr(record, item.name) for item in fields(record) if item.name not in _COLUMNS}
    return Sealed(
        id=record.id, time=microseconds(record.time), tenant=record.tenant, kind=record.kind, model=record.model,
        policy=record.policy, fallback=len(record.fallback), through=through,
        content=canonical({**content, "salt": secrets.token_hex(16)}),
    )


def _check(name: str, text: str, may_be_empty: bool) -> None:
    if not text and not may_be_empty:
        raise AuditError(f"An audit record needs a {name}.")
    if len(text) > _LONGEST or not text.isprintable():
        raise AuditError(f"The {name} of an audit record must be printable and at most {_LONGEST} characters long.")


def _wordless(items: Sequence[Any]) -> list[Any]:
    plain = [_plain(item) for item in items]
    return [
        {key: value for key, value in item.items() if key not in _WORDS} if isinstance(item, dict) else item
        for item in plain
    ]


def canonical(value: Any) -> str:
    """The one JSON text of `value`: keys sorted, no spaces, ASCII. Raises AuditError for what JSON cannot hold."""
    try:
        return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise AuditError("An audit record is nested too deeply; give plain values.") from None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        if not math.isfinite(value):
            raise AuditError(f"An audit record holds {value}, which JSON cannot hold; leave such a figure out.")
        return float(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise AuditError("An audit record holds a mapping whose keys are not all text; JSON needs text.")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise AuditError(f"An audit record holds a {type(value).__name__}, which JSON cannot hold; give plain values.")


def digest(text: str) -> str:
    """SHA-256 in hexadecimal, of the text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def microseconds(time: datetime) -> int:
    """Since 1970, UTC. Raises AuditError for a time without a time zone."""
    if time.tzinfo is None:
        raise AuditError("The time of an audit record needs a time zone; give it in UTC.")
    return (time - _EPOCH) // timedelta(microseconds=1)


def moment(time: int) -> datetime:
    """The inverse of `microseconds`."""
    return _EPOCH + timedelta(microseconds=time)
