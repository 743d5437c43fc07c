"""Which policy a request runs with: the operator's, the area's, or what its caller wishes and the operator allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anchorkv.config import AnchorConfig, RecallMode, preset
from anchorkv.evaluate.ways import FULL
from anchorkv.poc.rollout import Rollout
from anchorkv.scorers import SCORERS
from anchorkv.serve.refusals import bad, forbidden
from anchorkv.serve.settings_groups import PolicyBounds

CUSTOM = "custom"
"""Name of a policy that the caller made or changed."""


@dataclass(frozen=True)
class Wish:
    """What a caller says of the policy. policy: a name or the options of one."""

    policy: str | Mapping[str, Any] | None = None
    reduction: float | None = None
    recall: RecallMode | None = None
    area: str | None = None

    @property
    def empty(self) -> bool:
        return self == Wish()


@dataclass(frozen=True)
class Chosen:
    """A policy and what to call it."""

    name: str
    config: AnchorConfig


@dataclass(frozen=True)
class Policies:
    """What the operator offers."""

    default: Chosen
    named: Mapping[str, AnchorConfig]
    """Those that a caller may ask for, "full" among them where it is allowed."""
    bounds: PolicyBounds
    rollout: Rollout | None = None
    """Where given, an area has a policy of its own."""

    @classmethod
    def of(cls, chosen: Rollout | AnchorConfig, name: str, bounds: PolicyBounds) -> Policies:
        """chosen: what the server runs with, called `name` where it is no rollout plan."""
        named = {policy: preset(policy) for policy in bounds.policies}
        if bounds.full:
            named[FULL] = preset(FULL)
        if isinstance(chosen, AnchorConfig):
            return cls(Chosen(name, chosen), named, bounds)
        named = {**named, **chosen.policies}
        return cls(Chosen(chosen.policy, chosen.config(chosen.policy, chosen.recall)), named, bounds, chosen)

    def choose(self, wish: Wish, document: Chosen | None = None) -> Chosen:
        """document: what the document in question was read with, and is asked with unless wished otherwise.

        Raises Refused: 400 for what does not exist, 403 for what the operator does not allow.
        """
        found = self._base(wish, document)
        if wish.reduction is not None:
            found = self._reduced(found, wish.reduction)
        if wish.recall is not None and wish.recall != found.config.recall:
            if wish.recall not in self.bounds.recall:
                raise forbidden(f"This server allows recall {' or '.join(self.bounds.recall)}.", "anchorkv.recall")
            found = Chosen(_changed(found.name, f"recall={wish.recall}"), found.config.replace(recall=wish.recall))
        return found

    def names(self) -> list[str]:
        """Those that a caller may name."""
        return list(dict.fromkeys([self.default.name, *self.named]))

    def areas(self) -> list[str]:
        return list(self.rollout.areas) if self.rollout is not None else []

    def name_of(self, config: AnchorConfig) -> str:
        """What `config` is called here, "custom" where it has no name."""
        known = {self.default.name: self.default.config, **self.named}
        return next((name for name, policy in known.items() if policy == config), CUSTOM)

    def _base(self, wish: Wish, document: Chosen | None) -> Chosen:
        if isinstance(wish.policy, str):
            return self._named(wish.policy)
        if wish.policy is not None:
            return self._given(wish.policy)
        if wish.area is not None:
            return self._area(wish.area)
        return document or self.default

    def _named(self, name: str) -> Chosen:
        if name == self.default.name:
            return self.default
        if name not in self.named:
            known = ", ".join(self.names())
            raise bad(f"There is no policy {name!r} here; choose one of {known}.", "anchorkv.policy", "unknown_policy")
        return Chosen(name, self.named[name])

    def _given(self, options: Mapping[str, Any]) -> Chosen:
        if not self.bounds.custom:
            raise forbidden(
                f"This server takes no policies of callers; name one of {', '.join(self.names())}.", "anchorkv.policy",
            )
        config = AnchorConfig(**{str(name): value for name, value in options.items()})
        if config.scorer not in ("default", self.default.config.scorer, *SCORERS):  # never a path that a caller names
            raise bad(f"There is no scorer {config.scorer!r} here; use 'default'.", "anchorkv.policy")
        return Chosen(CUSTOM, config)

    def _area(self, area: str) -> Chosen:
        if self.rollout is None:
            raise bad("This server runs no rollout plan, so it knows no areas; leave 'area' out.", "anchorkv.area")
        if area not in self.rollout.areas:
            known = ", ".join(self.areas()) or "none"
            raise bad(f"There is no area {area!r} in the rollout plan; it has: {known}.", "anchorkv.area")
        config = self.rollout.policy_for({"area": area})
        return Chosen(FULL if config == preset(FULL) else self.rollout.areas[area].policy, config)

    def _reduced(self, found: Chosen, reduction: float) -> Chosen:
        if self.bounds.reductions is None:
            raise forbidden("This server lets nobody change the reduction; leave it out.", "anchorkv.reduction")
        low, high = self.bounds.reductions
        if not low <= reduction <= high:
            raise forbidden(
                f"This server allows a reduction from {low:g} to {high:g} (got {reduction:g}).", "anchorkv.reduction",
            )
        if "SEL" not in found.config.anchors:
            raise bad(
                f"The policy {found.name!r} selects no anchors, so it takes no reduction; leave it out.",
                "anchorkv.reduction",
            )
        return Chosen(_changed(found.name, f"reduction={reduction:g}"), found.config.replace(reduction=reduction))


def _changed(name: str, change: str) -> str:
    return f"{name}, {change}"
