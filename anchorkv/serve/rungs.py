"""The rungs of the fallback ladder above a policy, and whether a request would fit on one."""

from __future__ import annotations

import re
from dataclasses import replace

from anchorkv.config import AnchorConfig, preset
from anchorkv.evaluate.ways import FULL
from anchorkv.poc.rollout import Rollout
from anchorkv.serve.cells import most_cells, scratch_cells
from anchorkv.serve.policies import Chosen
from anchorkv.serve.prompts import script_of
from anchorkv.serve.requests import Ask
from anchorkv.serve.scheduler import Scheduler

MILDER = 3.0
"""A milder reduction keeps so many times the cells …"""
MILDEST = 2.0
"""… down to this many tokens per cell."""
RECALL_CELLS = 256
_CHANGES = re.compile(r", (?:recall|reduction)=[^,]*")


def rungs(policy: Chosen, rollout: Rollout | None = None) -> tuple[Chosen, ...]:
    """What is safer than `policy`, one step after the other, the full cache last; nothing is safer than that.

    A policy that is on the rollout plan's ladder goes on as measured; any other: recall, a milder reduction, full.
    """
    full = Chosen(FULL, preset(FULL))
    if policy.config == full.config:
        return ()
    if rollout is not None:
        steps = [rollout.config(step.policy, step.recall) for step in rollout.ladder]
        if policy.config in steps:
            after = steps.index(policy.config) + 1
            later = zip(rollout.ladder[after:], steps[after:], strict=True)
            found = (Chosen(_named(step.policy, config), config) for step, config in later)
            return tuple(dict.fromkeys([*(rung for rung in found if rung.config != full.config), full]))
    found_ = []
    recalling = _recalling(policy.config)
    if recalling != policy.config:
        found_.append(Chosen(_named(_base(policy.name), recalling), recalling))
    milder = _milder(recalling)
    if milder is not None:
        found_.append(Chosen(_named(f"{_base(policy.name)}, reduction={milder.reduction:g}", milder), milder))
    return (*found_, full)


def _named(name: str, config: AnchorConfig) -> str:
    return FULL if name == FULL else f"{name}, recall={config.recall}"


def _base(name: str) -> str:
    """Without what was changed, so that a rung is called the same from wherever one comes to it."""
    return _CHANGES.sub("", name)


def _recalling(config: AnchorConfig) -> AnchorConfig:
    return config.replace(recall="on", recall_cells=max(RECALL_CELLS, config.recall_cells))


def _milder(config: AnchorConfig) -> AnchorConfig | None:
    """More anchors; None where there are as many as it takes. A policy that selects none selects some as well."""
    selects = "SEL" in config.anchors
    reduction = max(MILDEST, config.reduction / MILDER) if selects else config.reduction / MILDER
    if selects and reduction >= config.reduction:
        return None
    budget = config.cell_budget
    if isinstance(budget, int):
        budget = round(budget * MILDER)
    anchors = config.anchors if selects else (*config.anchors, "SEL")
    return config.replace(anchors=anchors, reduction=reduction, cell_budget=budget)


class Room:
    """Whether a request could ever fit under a policy, as admission will ask. Thread-safe."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def __call__(self, ask: Ask, policy: AnchorConfig) -> bool:
        """Raises NotFound, SavedStateError, ConfigError, as submitting it would."""
        scheduler, tokenizer = self._scheduler, self._scheduler.engine.tokenizer
        ask = replace(ask, policy=policy)
        base = None
        if ask.document is not None:
            base = scheduler.documents.script(ask.tenant, ask.document, policy)
        script = script_of(ask, tokenizer, base)
        total = len(script) + ask.max_tokens
        most = most_cells(scheduler.engine, policy, total, int(script.pinned.sum()), int(script.ends.sum()))
        return most + scratch_cells(policy) <= scheduler.context_cells
