"""Run a recorded request again and compare. Knows no engine: who has one gives a `Replayer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from anchorkv.serve.audit.chain import Entry
from anchorkv.serve.audit.errors import AuditError
from anchorkv.serve.audit.record import ANSWER, canonical, digest


@dataclass(frozen=True)
class Replayed:
    """What the request gave now."""

    model_fingerprint: str
    adapter: str
    policy_config: Mapping[str, Any]
    text: str
    tokens: tuple[int, ...]
    """Ids written."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Under the names that records use (`kept_cells`, `completion_tokens` …)."""


class Replayer(Protocol):
    """Answers a stored request as the server would."""

    def replay(self, request: Mapping[str, Any], policy: Mapping[str, Any]) -> Replayed:
        """request, policy: as the record has them. Raises AnchorKVError for what cannot be run again."""


@dataclass(frozen=True)
class Comparison:
    """One thing that was recorded, and what it is now."""

    name: str
    recorded: Any
    now: Any

    @property
    def same(self) -> bool:
        return bool(canonical(self.recorded) == canonical(self.now))

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "recorded": self.recorded, "now": self.now, "same": self.same}


FIGURES = ("prompt_tokens", "completion_tokens", "kept_cells", "full_cells")
"""Those that are the same each time; seconds are not, nor is what was cached."""


def check(entry: Entry) -> None:
    """Raises AuditError where the record cannot be run again, in one sentence that says why."""
    if entry.kind != ANSWER:
        raise AuditError(f"Record '{entry.id}' is of kind {entry.kind}; only an answer can be run again.")
    if entry.retired:
        raise AuditError(f"The content of record '{entry.id}' was retired; its request is gone.")
    if not isinstance(entry.body().get("request"), dict):
        raise AuditError(
            f"Record '{entry.id}' holds hashes and no text, so its request cannot be run again; the server keeps text "
            "only where its operator says so."
        )


def replay(entry: Entry, replayer: Replayer) -> list[Comparison]:
    """Fingerprints, policy, text, tokens, segments, cells: recorded against now. Raises AuditError as `check` does."""
    check(entry)
    body = entry.body()
    config = body.get("policy_config") or {}
    now = replayer.replay(body["request"], config)
    found = [
        Comparison("model_fingerprint", body.get("model_fingerprint"), now.model_fingerprint),
        Comparison("adapter", body.get("adapter"), now.adapter),
        *(
            Comparison(f"policy.{name}", config.get(name), now.policy_config.get(name))
            for name in sorted({*config, *now.policy_config})
        ),
        Comparison("answer_hash", body.get("answer_hash"), digest(now.text)),
    ]
    if body.get("answer") is not None:
        found.append(Comparison("answer", body["answer"], now.text))
    if body.get("answer_tokens") is not None:
        found.append(Comparison("answer_tokens", body["answer_tokens"], now.tokens))
    found += _segments(body.get("segments") or (), now.figures.get("segments") or ())
    figures = body.get("figures") or {}
    shared = [name for name in FIGURES if name in figures and name in now.figures]
    return found + [Comparison(name, figures[name], now.figures[name]) for name in shared]


_ANCHORS = ("start", "stop", "kept", "recalled", "anchor_positions")


def _segments(then: Sequence[Any], now: Sequence[Any]) -> list[Comparison]:
    """How many there are, and those that lie elsewhere or left other anchors."""
    if not then:  # a record of a time before segments were kept, or of another program
        return []
    found = [Comparison("segments", len(then), len(now))]
    for number, (recorded, again) in enumerate(zip(then, now, strict=False)):
        # An older record may not say where the anchors are; it is compared by what it says.
        names = [name for name in _ANCHORS if name in recorded]
        item = Comparison(f"segment {number}", *({name: it.get(name) for name in names} for it in (recorded, again)))
        if not item.same:
            found.append(item)
    return found
