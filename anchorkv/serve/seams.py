"""Where the fallback ladder and those who look on join the life of a request: two small protocols and what they see."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, Protocol

from anchorkv.config import preset
from anchorkv.evaluate.ways import FULL
from anchorkv.serve.auth import Principal
from anchorkv.serve.policies import Chosen
from anchorkv.serve.refusals import Refused
from anchorkv.serve.requests import Ask, Outcome

Quality = Literal["high", "normal"]


@dataclass(frozen=True)
class Step:
    """One step of the fallback ladder: from one policy to a safer one, and why."""

    before: str
    after: str
    reason: str
    code: str = ""
    """What kind of reason: "quality_high", "rule", "breaker", "low_confidence", "refused" (a safer step came to
    nothing), "unseen" (the ladder failed)."""
    because: str = ""
    """Of a rule or a breaker: what it follows from (rules.BECAUSE, "operator", "canary_failed")."""
    dry_run: bool = False
    """It was not taken, only noted."""
    stopped: bool = False
    """The step that was wanted does not fit in the KV cells; this is the best that does."""


@dataclass(frozen=True)
class Plan:
    """How a request is to be answered."""

    policy: Chosen
    steps: tuple[Step, ...] = ()
    hold: bool = False
    """Show nothing of the answer before `Ladder.after` has seen it whole."""


@dataclass(frozen=True)
class Question:
    """What is known of a request before it runs."""

    caller: Principal
    ask: Ask
    """With the policy that was chosen for it."""
    policy: Chosen
    quality: Quality = "normal"
    area: str | None = None
    asked: datetime = field(default_factory=lambda: datetime.now(UTC))


class Ladder(Protocol):
    """Anchors, anchors and recall, a milder reduction, the full cache: which of them answers."""

    def before(self, question: Question) -> Plan:
        """With which policy to begin. Called in a worker thread: it may look at the whole text."""

    def after(self, question: Question, plan: Plan, outcome: Outcome) -> Plan | None:
        """With which policy to answer once more, None when the answer stands. Asked only where nothing was shown."""

    def remarks(self, question: Question, plan: Plan, outcome: Outcome, shown: bool) -> tuple[Step, ...]:
        """What the record should say of the answer that stands, beside `plan.steps`."""


@dataclass(frozen=True)
class Answered:
    """An answer that has ended, by itself or not, and is recorded."""

    question: Question
    plan: Plan
    ask: Ask
    """As it ran last."""
    outcome: Outcome
    earlier: Sequence[Outcome] = ()
    """Answers that the ladder did not let stand."""


class Observer(Protocol):
    """Watch, metrics, logs. Called on the event loop: it must not wait for anything, nor raise."""

    def answered(self, answered: Answered) -> None: ...

    def refused(self, caller: Principal | None, refused: Refused) -> None: ...


class Exposition(Protocol):
    """Figures for who scrapes them."""

    logs: logging.Handler
    """Counts what is logged."""

    def text(self) -> bytes:
        """In Prometheus' text format. Called in a worker thread."""


class DirectLadder:
    """No ladder: who asks for high quality gets the full cache, everybody else the policy that was chosen."""

    def before(self, question: Question) -> Plan:
        full = preset(FULL)
        if question.quality != "high" or question.policy.config == full:
            return Plan(question.policy)
        step = Step(question.policy.name, FULL, "the caller asked for high quality", "quality_high")
        return Plan(Chosen(FULL, full), (step,))

    def after(self, question: Question, plan: Plan, outcome: Outcome) -> Plan | None:
        return None

    def remarks(self, question: Question, plan: Plan, outcome: Outcome, shown: bool) -> tuple[Step, ...]:
        return ()
