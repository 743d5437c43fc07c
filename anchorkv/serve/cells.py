"""How many KV cells a request may come to hold, and how many all sessions hold together, shared ones counted once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Engine, Ints
from anchorkv.ledger import State
from anchorkv.selection import SLACK, SLACK_FROM
from anchorkv.session import Session

_numbers = itertools.count()


def most_cells(engine: Engine, config: AnchorConfig, tokens: int, pinned: int, ends: int) -> int:
    """Most cells that a stream of `tokens` tokens may hold at once under `config`: an upper bound, never an estimate.

    pinned: how many of them are pinned. ends: how often a segment is ended by force.
    """
    segments = tokens // config.min_segment + ends + 1
    added = segments * config.ac_tokens if "AC" in config.anchors else 0
    anchors = added
    if "SEL" in config.anchors:
        anchors += int((tokens + SLACK * max(tokens, SLACK_FROM)) / config.reduction) + 1
    if "EP" in config.anchors:
        anchors += segments if config.ends_are_anchors else tokens
    budget = config.budget_for(engine.info.window)
    if budget is not None:
        anchors = min(anchors, budget)
    recall = config.recall_cells if config.recall != "off" else 0
    pending = engine.batch if engine.masks else 0
    return min(tokens + added, anchors + pinned + config.most_whole + pending + recall)


def scratch_cells(config: AnchorConfig) -> int:
    """Cells that the engine needs for a moment beside those: recall runs a whole segment, and one cell moves."""
    return 2 + (config.max_segment if config.recall != "off" else 0)


@dataclass(frozen=True)
class Lineage:
    """Which cells a session has in common with those it was forked from.

    parts: (number, first position): cells from `first position` on, up to the next part's, were made under `number`.
    """

    parts: tuple[tuple[int, int], ...] = field(default_factory=lambda: ((next(_numbers), 0),))

    def fork(self, at: int) -> Lineage:
        """That of a session that continues alone from position `at`."""
        return Lineage((*(part for part in self.parts if part[1] < at or part[1] == 0), (next(_numbers), at)))


@dataclass(eq=False)
class Held:
    """A session and where its cells come from."""

    session: Session
    lineage: Lineage = field(default_factory=Lineage)

    def fork(self) -> Held:
        """Raises CapacityError when the engine has no session left."""
        return Held(self.session.fork(), self.lineage.fork(len(self.session.ledger)))

    def keys(self) -> Ints:
        """[cells held] numbers that are equal where two sessions share a cell."""
        positions = self.session.memory.positions()
        numbers = np.asarray([number for number, _ in self.lineage.parts], dtype=np.int64)
        firsts = np.asarray([first for _, first in self.lineage.parts], dtype=np.int64)
        made = numbers[np.searchsorted(firsts, positions, side="right") - 1]
        # What recall brought back is this session's own, whatever the one it was forked from holds there.
        made[self.session.ledger.column("state")[positions] == State.RECALLED] = numbers[-1]
        keys: Ints = made << 32 | positions
        return keys


def distinct(keys: Iterable[Ints]) -> int:
    """Cells that sessions with these `Held.keys` hold together."""
    parts = list(keys)
    return len(np.unique(np.concatenate(parts))) if parts else 0
