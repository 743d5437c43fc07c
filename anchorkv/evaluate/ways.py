"""The ways to be compared: a name, the policy that it means, and whether the model's adapter is on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anchorkv.config import AnchorConfig, policy_of, preset
from anchorkv.errors import ConfigError

FULL, BASE, WINDOW, NO_MEMORY = "full", "base", "window", "no-memory"


@dataclass(frozen=True)
class Way:
    """One side of a comparison. Two ways of the same `adapter` share their weights."""

    name: str
    policy: AnchorConfig
    adapter: bool = True

    @property
    def full(self) -> str:
        """Name of the full cache of the same weights: the yardstick."""
        return FULL if self.adapter else BASE

    @property
    def ground(self) -> Way:
        """The same weights, sinks, recent window and segments, and no memory beyond them: what anchors start from."""
        policy = self.policy
        name = f"{NO_MEMORY} {policy.sinks}/{policy.recent_window}/{policy.segments} {policy.min_segment}-"
        name += f"{policy.max_segment}" + ("" if self.adapter else " (base)")
        return Way(name, no_memory(policy), self.adapter)


def no_memory(policy: AnchorConfig) -> AnchorConfig:
    """`policy` without anchors and recall: sinks and the recent window alone (design.md, "no memory")."""
    return policy.replace(anchors=(), recall="off", cell_budget=None)


def newest_whole(policy: AnchorConfig) -> AnchorConfig:
    """The newest text whole instead of anchors, as many cells as `policy` keeps: age alone decides. What a user without
    anchors would do with the memory, and so what anchors have to beat."""
    return policy.replace(scorer="landmarks", aging=100)


def way(text: str, own: AnchorConfig | None = None) -> Way:
    """The way that `text` names: a policy as `config.policy_of` takes it, and besides its names "base" (the full cache
    of the model without its adapter), "window" (`newest_whole` of the default), and before any of them "base/" for the
    model without its adapter.

    own: the model's own policy, which "default" means where it has one.
    Raises ConfigError, one sentence, for what is unknown or does not fit.
    """
    name, default = text.partition(":")[0], own or preset("default")
    known = {"default": default, WINDOW: newest_whole(default), BASE: preset(FULL)}
    adapter = not (name == BASE or name.startswith(f"{BASE}/"))
    return Way(text, policy_of(text.removeprefix(f"{BASE}/"), known), adapter)


def ways(texts: Sequence[str], own: AnchorConfig | None = None) -> list[Way]:
    """All of them, the full cache first: every figure is measured against it. Raises ConfigError as `way` does."""
    if not texts:
        raise ConfigError("No policy was named; name at least one to compare with the full cache.")
    names = list(dict.fromkeys([FULL, *texts]))
    return [way(name, own) for name in names]
