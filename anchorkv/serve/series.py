"""What the watch knows of one tenant, model, policy and kind of document: two figures, their bounds, their limits."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from anchorkv.poc.rules import Watch as Limits
from anchorkv.serve.estimates import Bounds, Rolling, Watched, mean_score, share_score
from anchorkv.serve.policies import Chosen

ALL = "*"
LEAST = 9.5
"""Checks, the older ones counted in part, below which nothing is judged: about ten."""
_FEW = 3
_SPREAD, _SPREAD_N = 0.25, 8.0
"""Standard deviation of one answer's loss gap, in nats a token, until so many checks have shown another."""
_LEAST_STEP = 0.05
"""Nats; limits closer to what is expected could not be told from it."""
_CONFIDENT_N = 30
"""Answers until the mean log-probability of answers is known well enough to notice a fall."""
LOOK = 20
"""Checks at the largest share after a figure drifted or answers became less sure."""


class Key(NamedTuple):
    """`ALL` as the tenant or kind: of all of them together."""

    tenant: str
    model: str
    policy: str
    kind: str

    def text(self) -> str:
        return json.dumps(self, ensure_ascii=False)


@lru_cache(1024)
def policy_id(policy: Chosen) -> str:
    """Name, and a digest of what it says: a policy that is changed is another one."""
    return f"{policy.name[:80]}#{hashlib.sha256(policy.config.model_dump_json().encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Crossing:
    """A figure is out of bounds. `code`: one of rules.BECAUSE."""

    code: str
    sentence: str


@dataclass
class Series:
    """Estimates of one key. Decided with t bounds (loss gap) and Wilson bounds (agreement)."""

    checks: int = 0
    """Ever."""
    gap: Watched = field(default_factory=Watched)
    """Loss gap, nats a token."""
    agreement: Watched = field(default_factory=Watched)
    confidence: Watched = field(default_factory=Watched)
    """Mean log-probability of the answers, of every answer, checked or not."""
    look: int = 0
    """Checks that are wanted soon, because something fell."""
    due: float = 0.0
    """Checks that the answers since the last one have earned, and …"""
    wait: float = 0.5
    """… at how many of them the next is made."""

    def add(self, gap: float | None, agreed: bool | None, limits: Limits, now: float, window: float) -> list[str]:
        """One check. Returns the figures that drifted, by the codes of rules.BECAUSE."""
        drifted = []
        self.checks += 1
        self.look = max(0, self.look - 1)
        if gap is not None:
            limit = max(limits.loss_gap_limit, limits.loss_gap + _LEAST_STEP)
            score = mean_score(gap, limits.loss_gap, limit, self._variance())
            if self.gap.add(gap, score, now, window):
                drifted.append("loss_gap_grew")
        if agreed is not None:
            floor = limits.agreement_floor
            usual = max(limits.agreement if limits.agreement is not None else (1 + floor) / 2, floor + 0.05)
            if self.agreement.add(float(agreed), share_score(agreed, usual, floor), now, window):
                drifted.append("agreement_fell")
        if drifted:
            self.look = LOOK
        return drifted

    def choose(self, share: float, chance: float) -> bool:
        """Whether this answer is checked, at a rate of `share`; chance: a random number, 0 to 1.

        The gaps between checks vary by half either way: less than by chance alone, and nobody can time them.
        """
        self.due += share
        if share < 1 and self.due < self.wait:
            return False
        self.due, self.wait = max(0.0, self.due - self.wait), 0.5 + chance
        return True

    def written(self, logprob: float, now: float, window: float) -> None:
        """An answer was written, checked or not: when answers become less sure, look at them more closely."""
        usual, variance = self.confidence.rolling.mean, self.confidence.rolling.variance
        score = 0.0
        if self.confidence.rolling.n(now) >= _CONFIDENT_N and variance > 0:
            score = mean_score(logprob, usual, usual - math.sqrt(variance), variance)
        if self.confidence.add(logprob, score, now, window):
            self.look = LOOK

    def gap_bounds(self, now: float, confidence: float) -> Bounds | None:
        return self.gap.rolling.mean_bounds(now, confidence)

    def agreement_bounds(self, now: float, confidence: float) -> Bounds | None:
        return self.agreement.rolling.share_bounds(now, confidence)

    def crossing(self, limits: Limits, now: float, confidence: float) -> Crossing | None:
        """Which figure is out of bounds with that confidence, None while none is."""
        gap, agreement = self.gap_bounds(now, confidence), self.agreement_bounds(now, confidence)
        shown = f"({confidence:.0%} bound)"
        if gap is not None and gap.n >= LEAST and gap.low > limits.loss_gap_limit:
            return Crossing("loss_gap_grew", (
                f"Answers lose at least {gap.low:.3g} nats a token against the full cache {shown} in about {gap.n:.0f} "
                f"checks; the limit is {limits.loss_gap_limit:.3g}."
            ))
        if agreement is not None and agreement.n >= LEAST and agreement.high < limits.agreement_floor:
            return Crossing("agreement_fell", (
                f"At most {agreement.high:.0%} of answers say what the full cache says {shown} in about "
                f"{agreement.n:.0f} checks; {limits.agreement_floor:.0%} are wanted."
            ))
        return None

    def doubtful(self, limits: Limits, now: float, confidence: float) -> bool:
        """Whether a limit lies within a figure's bounds."""
        gap, agreement = self.gap_bounds(now, confidence), self.agreement_bounds(now, confidence)
        return (gap is not None and gap.low <= limits.loss_gap_limit <= gap.high) or (
            agreement is not None and agreement.low <= limits.agreement_floor <= agreement.high
        )

    def against(self, limits: Limits, now: float) -> bool:
        """Whether a figure is out of bounds as far as a few checks tell."""
        gap, agreement = self.gap.rolling, self.agreement.rolling
        return (gap.n(now) >= _FEW and gap.mean > limits.loss_gap_limit) or (
            agreement.n(now) >= _FEW and agreement.mean < limits.agreement_floor
        )

    @property
    def restless(self) -> bool:
        """Whether more checks are wanted soon."""
        return self.look > 0 or self.gap.restless or self.agreement.restless

    def n(self, now: float) -> float:
        """Checks that its figures are worth now."""
        return max(self.gap.rolling.n(now), self.agreement.rolling.n(now))

    def as_dict(self) -> dict[str, Any]:
        return {
            "checks": self.checks, "look": self.look, "gap": self.gap.as_dict(),
            "agreement": self.agreement.as_dict(), "confidence": self.confidence.as_dict(),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Series:
        """From `as_dict`. Raises KeyError, TypeError, ValueError for anything else."""
        gap, agreement, confidence = (Watched.of(state[name]) for name in ("gap", "agreement", "confidence"))
        return cls(int(state["checks"]), gap, agreement, confidence, int(state["look"]))

    def _variance(self) -> float:
        """Of one answer's loss gap: what was seen, and at first what is usual."""
        seen: Rolling = self.gap.rolling
        return (_SPREAD_N * _SPREAD**2 + seen.moment) / (_SPREAD_N + seen.weight)
