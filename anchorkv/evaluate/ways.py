"""The ways to be compared: a name, the policy that it means, and whether the model's adapter is on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anchorkv.config import PRESETS, AnchorConfig, preset
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
    """The way that `text` names: "NAME" or "NAME:field=value,field=value".

    NAME: a preset, a JSON file of a policy, "base" (the full cache of the model without its adapter), "window"
        (`newest_whole` of the default), and before any of them "base/" for the model without its adapter.
    own: the model's own policy, which "default" means where it has one.
    Raises ConfigError, one sentence, for what is unknown or does not fit.
    """
    name, _, changes = text.partition(":")
    adapter = not (name == BASE or name.startswith(f"{BASE}/"))
    policy = _policy(name.removeprefix(f"{BASE}/"), own).replace(**_fields(text, changes))
    return Way(text, policy, adapter)


def ways(texts: Sequence[str], own: AnchorConfig | None = None) -> list[Way]:
    """All of them, the full cache first: every figure is measured against it. Raises ConfigError as `way` does."""
    if not texts:
        raise ConfigError("No policy was named; name at least one to compare with the full cache.")
    names = list(dict.fromkeys([FULL, *texts]))
    return [way(name, own) for name in names]


def _policy(name: str, own: AnchorConfig | None) -> AnchorConfig:
    if name == BASE:
        return preset(FULL)
    if name in ("default", WINDOW):
        policy = own or preset("default")
        return newest_whole(policy) if name == WINDOW else policy
    if name in PRESETS:
        return preset(name)
    if name.lower().endswith(".json"):
        return AnchorConfig.load(name)
    known = ", ".join([*PRESETS, WINDOW, BASE])
    raise ConfigError(f"There is no policy '{name}'; choose one of {known}, or a JSON file of one.")


def _fields(text: str, changes: str) -> dict[str, Any]:
    """What stands behind the colon. Values are JSON; what is none is a word."""
    fields: dict[str, Any] = {}
    for part in filter(None, changes.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in AnchorConfig.model_fields:
            raise ConfigError(
                f"In '{text}', '{part}' is no field=value of a policy; its fields are "
                f"{', '.join(AnchorConfig.model_fields)}."
            )
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = tuple(value.split("+")) if name == "anchors" else value
    return fields

