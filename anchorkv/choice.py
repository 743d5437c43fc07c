"""When a segment leaves the recent window: which of its tokens become anchors (SEL), and which older anchors go.

The scorer says how useful each token is (`scorers.py`), a budget turns scores into anchors (`selection.py`), and the
ledger takes down what was chosen and why. What was chosen depends on what was read up to then alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import CELLS, SURPRISE, Engine, Floats, Ints, Memory
from anchorkv.ledger import Ledger, State
from anchorkv.scorers import Scorer, SegmentView, scorer
from anchorkv.selection import RunningBudget, best, share
from anchorkv.visibility import NEVER


class Choice:
    """What one session chooses by, and what it has to remember for that."""

    def __init__(self, engine: Engine, config: AnchorConfig) -> None:
        self.engine, self.config = engine, config
        self.scorer: Scorer | None = scorer(config.scorer, engine.info) if "SEL" in config.anchors else None
        self.budget = RunningBudget(config.reduction)
        self.cell_budget = config.budget_for(engine.info.window)
        self._surprise: list[Floats] = []  # of the tokens that no scorer has seen yet, where the scorer needs it
        self._surprise_from = 0

    @property
    def needs(self) -> frozenset[str]:
        """What the scorer reads of the model."""
        return self.scorer.needs if self.scorer else frozenset()

    @property
    def why_dropped(self) -> str:
        """The reason that the ledger gives for a token that left the recent window and was not chosen."""
        scored = f", not among the best by '{self.config.scorer}' at {self.config.reduction:g}x" if self.scorer else ""
        return f"left the recent window, no anchor{scored}"

    def hear(self, surprise: Floats) -> None:
        """-log p [n] of the tokens that follow those heard before."""
        self._surprise.append(surprise)

    def leave(self, segment: int, current: int, ledger: Ledger, memory: Memory) -> None:
        """`segment` leaves the recent window of segment `current`: choose which of its tokens stay. Its tokens must
        have been computed where the scorer `needs` anything."""
        if self.scorer is None:
            return
        span = ledger.span(segment)
        span = span[~ledger.column("added")[span]]
        tokens = ledger.tokens[span].tolist()
        scores = self.scorer.score(
            SegmentView(
                tokens=tokens, pieces=[self.engine.tokenizer.piece(token) for token in tokens], start=int(span[0]),
                surprise=self._surprise_of(span) if SURPRISE in self.scorer.needs else None,
                cells=memory.read_cells(span) if CELLS in self.scorer.needs else None,
                vocabulary=self.engine.info.vocabulary,
            )
        )
        column = ledger.column
        eligible = (column("state")[span] == State.WHOLE) & ~column("anchor")[span]
        finite = np.isfinite(scores)
        column("score")[span[eligible]] = np.where(finite, scores, scores[finite].min(initial=0))[eligible]
        if self.config.aging:
            self._thin(span, current, ledger)
        else:
            self._choose(span, ledger)

    def _choose(self, span: Ints, ledger: Ledger) -> None:
        """Which tokens of `span`, the segment that leaves, become anchors for good."""
        column, stop = ledger.column, int(span[-1]) + 1
        kept = int((column("always")[:stop] | column("anchor")[:stop]).sum())
        scores = column("score")[span]
        older, whole = _older(ledger, stop), len(ledger) - stop
        self._keep(span[self.budget.choose(scores, ~np.isnan(scores), older, kept, whole)], ledger)

    def _thin(self, span: Ints, current: int, ledger: Ledger) -> None:
        """Which tokens of `span`, the segment that leaves, and which of the older anchors go on."""
        stop = int(span[-1]) + 1
        anchor, always, score = (ledger.column(name)[:stop] for name in ("anchor", "always", "score"))
        alive = ledger.column("evicted")[:stop] == NEVER
        scored = ~np.isnan(score)
        pool = np.flatnonzero(alive & anchor & scored & ~always)
        pool = np.concatenate([pool, span[scored[span]]])
        fixed = int((always | (anchor & alive & ~scored)).sum())
        count = round(share(_older(ledger, stop), self.config.reduction, len(ledger) - stop))
        why = "aged: no longer among the best anchors"
        if self.cell_budget is not None and count > self._room:
            count, why = self._room, f"cell budget of {self.cell_budget} full: no longer among the best anchors"
        deviation = float(np.nanstd(score)) if scored.any() else 0.0
        stays = best(score[pool], len(ledger) - pool, self.config.aging, deviation, count - fixed)
        was = anchor[pool]
        self._keep(pool[stays & ~was], ledger)
        _evict(pool[was & ~stays], current, ledger, why)

    def _keep(self, chosen: Ints, ledger: Ledger) -> None:
        ledger.column("anchor")[chosen] = True
        ledger.mark(chosen, State.ANCHOR, f"chosen by '{self.config.scorer}' (SEL)")

    def fit_budget(self, left: int, current: int, ledger: Ledger) -> None:
        """Cell budget: the oldest anchors go first, so that what stays and the text being read fit.

        left: the first segment that has not left the recent window.
        """
        if self.cell_budget is None:
            return
        older = slice(0, int(np.searchsorted(ledger.column("segment"), left)))
        always, evicted = ledger.column("always")[older], ledger.column("evicted")[older]
        alive = np.flatnonzero(ledger.column("anchor")[older] & ~always & (evicted == NEVER))
        surplus = len(alive) + int(always.sum()) - self._room
        if surplus > 0:
            _evict(alive[:surplus], current, ledger, f"cell budget of {self.cell_budget} full: oldest anchor")

    @property
    def _room(self) -> int:
        """Cells that the cell budget leaves for older text."""
        return (self.cell_budget or 0) - (self.config.most_whole - self.config.sinks)

    def _surprise_of(self, span: Ints) -> Floats:
        """-log p of the tokens of `span`; theirs and everything older is then let go."""
        found = np.concatenate(self._surprise)
        rows = span - self._surprise_from
        self._surprise_from = int(span[-1]) + 1
        self._surprise = [found[rows[-1] + 1 :]]
        return found[rows]

    def copy(self) -> Choice:
        """An independent choice that continues from here."""
        other = object.__new__(Choice)
        other.__dict__.update(self.__dict__)
        other.scorer = self.scorer.copy() if self.scorer else None
        other.budget = self.budget.copy()
        other._surprise = list(self._surprise)
        return other

    def state(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Arrays and JSON-able fields that `restore` takes."""
        arrays = {"budget": self.budget.state()}
        if self._surprise:
            arrays["surprise"] = np.concatenate(self._surprise)
        return arrays, {"surprise_from": self._surprise_from}

    def restore(self, arrays: dict[str, npt.NDArray[Any]], fields: dict[str, Any]) -> None:
        """Continue from `state`. Raises KeyError, TypeError or ValueError when the parts do not fit."""
        self.budget = RunningBudget.restore(self.config.reduction, arrays["budget"])
        self._surprise = [arrays["surprise"]] if "surprise" in arrays else []
        self._surprise_from = int(fields["surprise_from"])


def _older(ledger: Ledger, stop: int) -> int:
    """Tokens of the text before position `stop`."""
    return stop - int(ledger.column("added")[:stop].sum())


def _evict(anchors: Ints, current: int, ledger: Ledger, why: str) -> None:
    """Queries of segment `current` and later see these anchors no more."""
    ledger.column("evicted")[anchors] = current
    ledger.mark(anchors, State.DROPPED, why)
