"""The hash chain: each record's hash covers the record and the hash before it, so that no change goes unseen.

    content_hash = SHA-256(content)          hash = SHA-256(canonical JSON of all columns but `content` and `hash`)

`previous` is one of those columns. Because a hash covers the content's hash and not the content, retention can take old
content away and the chain still holds. A head row keeps the newest sequence number and hash, so that records missing
at the end are seen too. Who can write to the database may rewrite everything from some record on, or cut the end off,
and change the head to fit: no chain alone can show that. A head that was noted elsewhere (`anchorkv audit head`) does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from anchorkv.serve.audit.errors import AuditError
from anchorkv.serve.audit.record import EVERY_TENANT, RETENTION, Sealed, canonical, digest, moment

MOST_FAULTS = 100


@dataclass(frozen=True)
class Head:
    """The newest record: how many there are, and the hash that stands for all of them."""

    sequence: int
    hash: str

    def __str__(self) -> str:
        return f"{self.sequence}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """As `str` writes it. Raises AuditError."""
        sequence, _, value = text.strip().partition(":")
        if not (sequence.isascii() and sequence.isdigit()) or len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise AuditError(f"'{text}' is no head; it looks like 12:9f86d0…, as `anchorkv audit head` prints it.")
        return cls(int(sequence), value)


@dataclass(frozen=True)
class Entry:
    """A record as it is stored: a link of the chain."""

    sequence: int
    id: str
    time: int
    tenant: str
    kind: str
    model: str
    policy: str
    fallback: int
    through: int | None
    content: str | None
    """None once retention took it away."""
    content_hash: str
    previous: str
    hash: str

    @classmethod
    def follow(cls, head: Head, sealed: Sealed) -> Self:
        """The entry that `sealed` becomes after `head`."""
        entry = cls(
            sequence=head.sequence + 1, previous=head.hash, hash="", content_hash=sealed.content_hash,
            **sealed.as_dict(),
        )
        return cls(**{**entry.columns(), "hash": entry.computed_hash()})

    def columns(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def computed_hash(self) -> str:
        """What `hash` must be."""
        return digest(canonical({name: value for name, value in self.columns().items() if name not in _NOT_HASHED}))

    @property
    def retired(self) -> bool:
        return self.content is None

    def body(self) -> dict[str, Any]:
        """What the content says; {} once it is retired or where it was destroyed."""
        try:
            found = json.loads(self.content or "{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def as_dict(self) -> dict[str, Any]:
        """For people and exports: the record's own fields first, the chain's last."""
        columns = {
            "sequence": self.sequence, "id": self.id, "time": _iso(self.time), "tenant": self.tenant, "kind": self.kind,
            "model": self.model, "policy": self.policy, "fallback_steps": self.fallback, "retired": self.retired,
        }
        links = {"content_hash": self.content_hash, "previous": self.previous, "hash": self.hash}
        body = {name: value for name, value in self.body().items() if name not in {*columns, *links, "salt"}}
        return {**columns, **body, **links}

    def brief(self) -> dict[str, Any]:
        """What a list needs: no segments, texts or policy in full."""
        found = self.as_dict()
        return {
            **{name: found[name] for name in _BRIEF if name in found},
            "recalled_segments": len(found.get("recalled", ())),
        }


_BRIEF = ("sequence", "id", "time", "tenant", "kind", "model", "policy", "fallback_steps", "retired", "key", "figures")
_NOT_HASHED = ("content", "hash")


def _iso(time: int) -> str:
    try:
        return moment(time).isoformat(timespec="milliseconds")
    except OverflowError:
        return f"{time} µs"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. `sequence`: of the record it was found at."""

    sequence: int
    what: str

    def __str__(self) -> str:
        return f"record {self.sequence}: {self.what}"


@dataclass
class Report:
    """What verification found. `faults` stops at MOST_FAULTS; `damaged` counts on."""

    records: int = 0
    retired: int = 0
    head: Head = field(default_factory=lambda: Head(0, ""))
    damaged: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.damaged

    def note(self, sequence: int, what: str) -> None:
        self.damaged += 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(Fault(sequence, what))

    def as_dict(self) -> dict[str, Any]:
        faults = [{"sequence": fault.sequence, "what": fault.what} for fault in self.faults]
        return {
            "sound": self.sound, "records": self.records, "retired": self.retired, "head": str(self.head),
            "damaged": self.damaged, "faults": faults,
        }


def verify(
    entries: Iterable[Entry], origin: str, head: Head, retentions: Sequence[Entry], noted: Sequence[Head] = (),
) -> Report:
    """Walk the whole chain, oldest first, and go on behind damage.

    origin: the hash before the first record. retentions: the records that took content away. noted: heads that were
    written down elsewhere, which must still be part of the chain.
    """
    report = Report(head=head)
    expected = {item.sequence: item.hash for item in noted}
    last = Head(0, origin)
    for entry in entries:
        report.records += 1
        report.retired += entry.retired
        for what in _faults(entry, last, retentions):
            report.note(entry.sequence, what)
        if expected.pop(entry.sequence, entry.hash) != entry.hash:
            report.note(entry.sequence, "its hash is not the one that was noted: the chain was rewritten")
        last = Head(entry.sequence, entry.hash)
    if expected.pop(0, origin) != origin:
        report.note(0, "the chain does not begin as it was noted: this is another database")
    for sequence in sorted(expected):
        report.note(sequence, "it was noted, but the chain ends before it: records were cut off")
    if last.sequence < head.sequence:
        report.note(head.sequence, f"records {last.sequence + 1} to {head.sequence} are missing at the end")
    elif last != head:
        report.note(last.sequence, "it is not the record that the head names")
    return report


def _faults(entry: Entry, last: Head, retentions: Sequence[Entry]) -> Iterable[str]:
    if entry.sequence != last.sequence + 1:
        yield f"records {last.sequence + 1} to {entry.sequence - 1} before it are missing"
    if entry.previous != last.hash:
        yield "it does not follow the record before it"
    if entry.content is None:
        if not any(covers(retention, entry) for retention in retentions):
            yield "its content is gone, and no retention accounts for it"
    elif digest(entry.content) != entry.content_hash:
        yield "its content was changed"
    if entry.computed_hash() != entry.hash:
        yield "its columns or its hash were changed"


def covers(retention: Entry, entry: Entry) -> bool:
    """Whether `retention` allowed to take the content of `entry` away."""
    return (
        retention.kind == RETENTION and entry.kind != RETENTION and retention.through is not None
        and entry.sequence <= retention.through < retention.sequence
        and retention.tenant in (EVERY_TENANT, entry.tenant)
    )
