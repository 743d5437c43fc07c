"""Circuit breakers: what a policy may no longer be used for, until probes show that it may again.

closed → open when the watch finds a figure out of bounds; open → half-open after a pause; half-open → closed after
good probes in a row, or open again, for twice as long, after bad ones. Probes run in the background, so that nobody is
given an answer of a policy that is under suspicion.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from anchorkv.config import AnchorConfig
from anchorkv.serve.policies import Chosen
from anchorkv.serve.series import ALL, Crossing, Key, policy_id

BreakerState = Literal["closed", "open", "half_open"]
MOST_BAD = 3
"""Bad probes after which a half-open breaker opens again."""
LONGEST = 32
"""The pause grows up to so many times the first."""
_LOST = 600.0
"""Seconds after which a probe that nobody heard of again is given up."""
_MOST = 1000
"""Breakers that are remembered; the oldest closed one makes way."""


@dataclass
class Breaker:
    """One policy for one tenant, one kind of document, or everybody."""

    policy: Chosen
    state: BreakerState = "closed"
    code: str = ""
    sentence: str = ""
    """Why it opened last."""
    trips: int = 0
    good: int = 0
    bad: int = 0
    """Probes since it became half-open; `good`: those in a row."""
    pauses: int = 1
    """How long the pause is, in first pauses."""
    canary: bool = False
    """Opened by the canary, and closed by it alone."""
    changed: float = 0.0
    """Reading of the clock when it opened."""
    probe: float | None = None
    """Reading of the clock when the probe that runs now began."""

    def as_dict(self, now: float) -> dict[str, Any]:
        """`waited`: seconds since it opened, which go on counting after a restart."""
        return {
            "policy": {"name": self.policy.name, "config": self.policy.config.model_dump(mode="json")},
            "state": self.state, "code": self.code, "sentence": self.sentence, "trips": self.trips, "good": self.good,
            "bad": self.bad, "pauses": self.pauses, "canary": self.canary, "waited": max(0.0, now - self.changed),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], now: float) -> Breaker:
        """From `as_dict`. Raises KeyError, TypeError, ValueError, ConfigError for anything else."""
        if state["state"] not in ("closed", "open", "half_open"):
            raise ValueError(f"no state of a breaker: {state['state']!r}")
        policy = Chosen(str(state["policy"]["name"]), AnchorConfig(**state["policy"]["config"]))
        return cls(
            policy, state["state"], str(state["code"]), str(state["sentence"]), int(state["trips"]), int(state["good"]),
            int(state["bad"]), int(state["pauses"]), bool(state["canary"]), now - float(state["waited"]),
        )


@dataclass
class Breakers:
    """All of them. Thread-safe."""

    pause: float = 60.0
    """Seconds until an open one is probed."""
    probes: int = 5
    """Good ones in a row that close it."""
    clock: Callable[[], float] = time.monotonic
    transitions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each (state before, state after) came."""
    on_change: list[Callable[[Key, Breaker, BreakerState], None]] = field(default_factory=list)
    """Called with the breaker and its state before."""
    _all: OrderedDict[Key, Breaker] = field(default_factory=OrderedDict)
    lock: Any = field(default_factory=threading.RLock, repr=False)
    """Also of whoever is told of changes, so that neither waits for the other."""

    def trip(self, key: Key, policy: Chosen, crossing: Crossing, *, canary: bool = False) -> None:
        """Open it; one that is open already stays as it is."""
        with self.lock:
            breaker = self._all.setdefault(key, Breaker(policy))
            if breaker.state == "closed":
                breaker.code, breaker.sentence, breaker.canary, breaker.pauses = (
                    crossing.code, crossing.sentence, canary, 1,
                )
                breaker.trips += 1
                self._open(key, breaker)
            self._trim()

    def blocking(self, tenant: str, model: str, policy: Chosen, kind: str) -> Breaker | None:
        """The breaker that keeps this policy from this request, None when all are closed."""
        with self.lock:
            for key in covering(tenant, model, policy, kind):
                breaker = self._all.get(key)
                if breaker is not None and self._now(key, breaker).state != "closed":
                    return breaker
        return None

    def probe(self, tenant: str, model: str, kind: str, names: set[str]) -> list[tuple[Key, Breaker]]:
        """Half-open breakers of one policy that wait for a probe, and that a request of this tenant and kind, to which
        policies of these names were or would have been applied, can give. They count as being probed from now on."""
        found: list[tuple[Key, Breaker]] = []
        with self.lock:
            now = self.clock()
            for key, breaker in self._all.items():
                mine = key.model == model and key.tenant in (tenant, ALL) and key.kind in (kind, ALL)
                if not mine or breaker.canary or breaker.policy.name not in names:
                    continue
                waits = breaker.probe is None or now - breaker.probe > _LOST
                if self._now(key, breaker).state == "half_open" and waits and (
                    not found or found[0][1].policy == breaker.policy
                ):
                    breaker.probe = now
                    found.append((key, breaker))
        return found

    def probed(self, key: Key, good: bool | None) -> None:
        """How a probe went; None: it could not be carried out, and says nothing."""
        with self.lock:
            breaker = self._all.get(key)
            if breaker is None:
                return
            breaker.probe = None
            if good is None or self._now(key, breaker).state != "half_open":
                return
            breaker.good, breaker.bad = (breaker.good + 1, breaker.bad) if good else (0, breaker.bad + 1)
            if breaker.good >= (1 if breaker.canary else self.probes):
                breaker.pauses = 1
                self._change(key, breaker, "closed")
            elif breaker.bad >= (1 if breaker.canary else MOST_BAD):
                breaker.pauses = min(LONGEST, breaker.pauses * 2)
                self._open(key, breaker)

    def canaries(self) -> list[Key]:
        """Half-open breakers that wait for the canary."""
        with self.lock:
            items = list(self._all.items())
            return [key for key, breaker in items if breaker.canary and self._now(key, breaker).state == "half_open"]

    def all(self) -> list[tuple[Key, Breaker]]:
        with self.lock:
            return [(key, self._now(key, breaker)) for key, breaker in list(self._all.items())]

    def states(self) -> Iterator[tuple[Key, dict[str, Any]]]:
        """As it is saved."""
        now = self.clock()
        yield from ((key, breaker.as_dict(now)) for key, breaker in self.all())

    def restore(self, key: Key, state: Mapping[str, Any]) -> None:
        """Raises as `Breaker.of`."""
        with self.lock:
            self._all[key] = Breaker.of(state, self.clock())

    # --- inside ------------------------------------------------------------------------------------------------

    def _now(self, key: Key, breaker: Breaker) -> Breaker:
        """The same; half-open once its pause is over."""
        if breaker.state == "open" and self.clock() - breaker.changed >= self.pause * breaker.pauses:
            breaker.good = breaker.bad = 0
            breaker.probe = None
            self._change(key, breaker, "half_open")
        return breaker

    def _open(self, key: Key, breaker: Breaker) -> None:
        breaker.changed, breaker.probe = self.clock(), None
        self._change(key, breaker, "open")

    def _change(self, key: Key, breaker: Breaker, state: BreakerState) -> None:
        before, breaker.state = breaker.state, state
        self.transitions[before, state] += 1
        for told in self.on_change:
            told(key, breaker, before)

    def _trim(self) -> None:
        closed = [key for key, breaker in self._all.items() if breaker.state == "closed"]
        for key in closed[: max(0, len(self._all) - _MOST)]:
            del self._all[key]
        while len(self._all) > _MOST:  # all of them open: those of long ago are found out again
            self._all.popitem(last=False)


def covering(tenant: str, model: str, policy: Chosen, kind: str) -> list[Key]:
    """Keys of the breakers that a request falls under: its tenant's, its kind's, and everybody's."""
    name = policy_id(policy)
    kinds = [Key(ALL, model, name, kind)] if kind else []
    return [Key(tenant, model, name, ALL), *kinds, Key(ALL, model, name, ALL)]
