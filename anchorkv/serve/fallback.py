"""The fallback ladder: anchors, anchors with recall, a milder reduction, the full cache.

Before an answer is written: the caller's wish for quality, the declared rules, and the circuit breakers. After: an
answer that the model is unsure of is written once more, one step up. In a dry run nothing but the record changes.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from anchorkv.config import AnchorConfig
from anchorkv.errors import AnchorKVError
from anchorkv.evaluate.ways import FULL
from anchorkv.poc.results import FallbackRule
from anchorkv.poc.rollout import Rollout
from anchorkv.poc.rules import condition, holds
from anchorkv.serve.breaker import Breaker, Breakers
from anchorkv.serve.policies import Chosen
from anchorkv.serve.requests import Ask, Outcome
from anchorkv.serve.rungs import rungs
from anchorkv.serve.seams import Plan, Question, Step
from anchorkv.serve.settings_groups import FallbackSettings

log = logging.getLogger("anchorkv.serve")
Then = Literal["recall", "milder", "full"]
MOST_AGAIN = 2
"""How often an answer is written anew, at most."""
THEN: Mapping[str, Then] = {"loss_gap_grew": "recall", "agreement_fell": "full", "canary_failed": "full"}
"""Where an open breaker leads, unless a rule on the watched figure says otherwise."""
_WATCHED = {"watch.loss_gap": "loss_gap_grew", "watch.agreement": "agreement_fell"}


class _Walk:
    """The way up for one request: from `at` of `steps` to safer ones."""

    def __init__(self, ladder: FallbackLadder, ask: Ask, policy: Chosen) -> None:
        self._ladder, self._ask = ladder, ask
        self.rungs = [policy, *ladder.rungs(policy)]
        self.at = 0
        self.taken: list[Step] = []

    @property
    def policy(self) -> Chosen:
        return self.rungs[self.at]

    @property
    def top(self) -> int:
        return len(self.rungs) - 1

    def target(self, then: Then) -> int:
        """The rung that `then` means, counted from where the walk began."""
        if then == "full":
            return self.top
        base = self.rungs[0].config
        for index, rung in enumerate(self.rungs[1:], start=1):
            if then == "recall" or _without_recall(rung.config) != _without_recall(base):
                return index
        return self.top

    def climb(self, target: int, code: str, reason: str, because: str = "") -> bool:
        """Go up to `target`, or as far as the cells allow; the step says why. Whether it went up at all."""
        if target <= self.at:
            return False
        fitting = (i for i in range(target, self.at, -1) if self._ladder.fits(self._ask, self.rungs[i].config))
        reached = next(fitting, self.at)
        if reached < target:
            wanted = "The full cache" if self.rungs[target].name == FULL else f"The policy '{self.rungs[target].name}'"
            rest = f"the best that fits is '{self.rungs[reached].name}'" if reached > self.at else "no safer step does"
            reason = f"{reason} {wanted} does not fit in the KV cells; {rest}."
        self.taken.append(Step(
            self.policy.name, self.rungs[reached].name, reason, code, because, self._ladder.settings.dry_run,
            reached < target,
        ))
        moved, self.at = reached > self.at, reached
        return moved


class FallbackLadder:
    """A `seams.Ladder`. Thread-safe."""

    def __init__(
        self, settings: FallbackSettings, breakers: Breakers, model: str, *, rollout: Rollout | None = None,
        fits: Callable[[Ask, AnchorConfig], bool] = lambda ask, policy: True,
        facts: Callable[[Ask, bool], Mapping[str, Any]] = lambda ask, features: {}, lowest: float | None = None,
    ) -> None:
        """model: fingerprint of the weights, as the watch has it. fits: `rungs.Room`. facts: `textfacts.TextFacts`.
        lowest: log-probability below which no token of an answer may be."""
        self.settings, self.breakers, self.model, self.rollout = settings, breakers, model, rollout
        self.rules: tuple[FallbackRule, ...] = (*(rollout.rules if rollout is not None else ()), *settings.rules)
        self._own_fits, self._facts, self._lowest = fits, facts, lowest
        self._request_rules = [rule for rule in self.rules if condition(rule.when)[0] not in _WATCHED]
        names = {condition(rule.when)[0] for rule in self._request_rules}
        self._asks_text, self._asks_features = names != {"area"}, any(name.startswith("features.") for name in names)
        watched = {_WATCHED[name]: rule.then for rule in self.rules if (name := condition(rule.when)[0]) in _WATCHED}
        self._then: dict[str, Then] = {**THEN, **watched}
        self.rungs = lru_cache(256)(lambda policy: rungs(policy, rollout))
        self._lock = threading.Lock()
        self.counts: Counter[tuple[str, str, str, str, bool]] = Counter()
        """Steps by (code, because, policy before, policy after, dry run)."""

    # --- before writing ----------------------------------------------------------------------------------------

    def before(self, question: Question) -> Plan:
        """With which policy to begin. Counts over the text where a rule asks for it, so call it off the event loop."""
        walk = _Walk(self, question.ask, question.policy)
        if question.quality == "high":
            walk.climb(walk.top, "quality_high", "The caller asked for high quality.")
        if self.settings.enabled:
            for rule in self._holding(question) if walk.at < walk.top else ():
                walk.climb(walk.target(rule.then), "rule", _sentence(rule), rule.because)
            if self.settings.breaker:
                self._pass_breakers(walk, question)
        return self._planned(walk, question.policy)

    def _pass_breakers(self, walk: _Walk, question: Question) -> None:
        """Up to the first rung that no breaker keeps from this request; where two are kept from it, milder ones are not
        tried one after the other, but the full cache answers."""
        kind, tenant, kept = question.area or "", question.caller.tenant, 0
        while walk.at < walk.top:
            breaker = self.breakers.blocking(tenant, self.model, walk.policy, kind)
            if breaker is None:
                return
            kept += 1
            target = walk.top if kept > 1 else max(walk.at + 1, walk.target(self._then.get(breaker.code, "recall")))
            if not walk.climb(target, "breaker", _opened(breaker), breaker.code):
                return

    def _holding(self, question: Question) -> list[FallbackRule]:
        """Rules that hold, the mildest first."""
        facts: dict[str, Any] = {"area": question.area} if question.area is not None else {}
        if self._request_rules and self._asks_text:
            try:
                facts |= self._facts(question.ask, self._asks_features)
            except AnchorKVError as error:  # the request itself will say what is wrong
                log.debug("the text of %s cannot be looked at: %s", question.ask.id, error)
        found = [rule for rule in self._request_rules if holds(rule.when, facts)]
        return sorted(found, key=lambda rule: ("recall", "milder", "full").index(rule.then))

    def _planned(self, walk: _Walk, policy: Chosen) -> Plan:
        self._count(walk.taken)
        wished = [step for step in walk.taken if step.code == "quality_high"]
        if not self.settings.dry_run:
            return Plan(walk.policy, tuple(walk.taken))
        # What a caller asks for is no experiment of the operator's: it is done in a dry run as well.
        steps = tuple(replace(step, dry_run=False) if step in wished else step for step in walk.taken)
        done = next((rung for rung in walk.rungs if wished and rung.name == wished[-1].after), policy)
        return Plan(done, steps)

    # --- after writing -----------------------------------------------------------------------------------------

    def after(self, question: Question, plan: Plan, outcome: Outcome) -> Plan | None:
        """One step up where the model is unsure of its answer; None when the answer stands."""
        reason = self._unsure(outcome)
        again = sum(step.code == "low_confidence" for step in plan.steps)
        if reason is None or self.settings.dry_run or again >= MOST_AGAIN:
            return None
        walk = self._up(question, plan, reason)
        if walk is None or walk.at == 0:
            return None
        self._count(walk.taken)
        return Plan(walk.policy, (*plan.steps, *walk.taken))

    def remarks(self, question: Question, plan: Plan, outcome: Outcome, shown: bool = False) -> tuple[Step, ...]:
        """What the record should say of the answer that stands, beside `plan.steps`: an unsure answer that was shown
        already, that no safer step fits, or that a dry run would have had written anew."""
        reason = self._unsure(outcome)
        if reason is None:
            return ()
        if shown:
            found: tuple[Step, ...] = (Step(
                plan.policy.name, plan.policy.name, f"{reason} It had been shown already.", "low_confidence", "",
                self.settings.dry_run,
            ),)
        else:
            walk = self._up(question, plan, reason)
            found = () if walk is None else tuple(walk.taken)
            if walk is not None and walk.at and not self.settings.dry_run:
                found = ()  # written anew as often as it may be
        self._count(found)
        return found

    def _up(self, question: Question, plan: Plan, reason: str) -> _Walk | None:
        """The next step that no breaker keeps from this request; None where there is none above."""
        walk = _Walk(self, question.ask, plan.policy)
        target = 1
        while target < walk.top and self.settings.breaker and self.breakers.blocking(
            question.caller.tenant, self.model, walk.rungs[target], question.area or ""
        ):
            target += 1
        if target > walk.top:
            return None
        walk.climb(target, "low_confidence", reason)
        return walk

    def _unsure(self, outcome: Outcome) -> str | None:
        if not self.settings.enabled or outcome.finish not in ("stop", "length"):
            return None
        mean, limit = outcome.answer_logprob, self.settings.least_logprob
        if mean is not None and limit is not None and mean < limit:
            return f"The answer's mean log-probability is {mean:.2f} a token, below {limit:g}."
        worst, lowest = outcome.lowest_logprob, self._lowest
        if worst is not None and lowest is not None and worst < lowest:
            return f"A token of the answer has a log-probability of {worst:.2f}, below {lowest:g}."
        return None

    # --- inside ------------------------------------------------------------------------------------------------

    def fits(self, ask: Ask, policy: AnchorConfig) -> bool:
        """Whether the request could ever run under `policy`; what cannot be said is left to the engine room."""
        try:
            return self._own_fits(ask, policy)
        except AnchorKVError:
            return True

    def _count(self, steps: Sequence[Step]) -> None:
        with self._lock:
            for step in steps:
                self.counts[step.code, step.because, step.before, step.after, step.dry_run] += 1


def _without_recall(config: AnchorConfig) -> str:
    return config.model_dump_json(exclude={"recall", "recall_cells"})


def _sentence(rule: FallbackRule) -> str:
    return f"The rule '{rule.when}' holds."


def _opened(breaker: Breaker) -> str:
    state = "is being probed" if breaker.state == "half_open" else "is out of use"
    return f"The policy '{breaker.policy.name}' {state}. {breaker.sentence}"
