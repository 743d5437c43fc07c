"""Scores become anchors. Two budgets with one size: anchors that age, and anchors that stay for good."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from anchorkv.engines.base import Bools, Floats
from anchorkv.errors import ConfigError

AGE = 256
"""Tokens after which age begins to tell."""
HORIZON = 512
"""Tokens of older text over which a surplus or a deficit of cells is worked off."""
SLACK = 0.04
"""How far the kept cells may stray from the target, as a share of it …"""
SLACK_FROM = 2000
"""… from this many tokens of older text on; before, the same number of cells as there."""
WHOLE_SHARE = 0.1
"""Most of the budget that may pay for the cells still held whole, so that on a long text all cells meet the target."""


def share(older_tokens: int, reduction: float, held_whole: int) -> float:
    """Cells that `older_tokens` may keep at this reduction: those still held whole spend it too, up to WHOLE_SHARE."""
    target = older_tokens / reduction
    return target - min(held_whole, WHOLE_SHARE * target)


def best(
    scores: Floats, ages: npt.NDArray[np.integer], aging: float, deviation: float, count: int
) -> Bools:
    """Which of the anchors stay, [n] booleans: the `count` best by score - aging * deviation * log(1 + age / AGE).

    Old text is asked less often, and by then for fewer of its tokens, so it may thin out while recent text stays dense;
    what loses is gone for good. scores: [n], NaN counts as worst; ties go to the younger. ages: [n] in tokens.
    deviation: standard deviation of the scores, so that `aging` means the same for every scorer.
    """
    values = np.nan_to_num(scores.astype(np.float64), nan=-np.inf, neginf=-np.inf, posinf=np.inf)
    values = values - aging * deviation * np.log1p(ages / AGE)
    stays = np.zeros(len(values), dtype=bool)
    stays[np.lexsort((ages, -values))[: max(0, count)]] = True
    return stays


class RunningBudget:
    """Keeps one in `reduction` of the tokens that left the recent window, whatever the scores look like.

    A segment keeps its tokens above a threshold: the quantile, among all scores seen so far, that would bring the
    kept cells to the target within the next HORIZON tokens. A band around the target bounds what a run of dense or
    thin segments may do: |kept - target| <= SLACK * max(older, SLACK_FROM) / reduction, or half a cell.
    Only sinks, pinned spans and ineligible tokens can push the kept cells outside it; then none, or all, are chosen.
    """

    def __init__(self, reduction: float) -> None:
        if not reduction > 1:
            raise ConfigError(f"reduction must be above 1, not {reduction:g}.")
        self.reduction = reduction
        self._seen: Floats = np.zeros(0, dtype=np.float32)  # all eligible scores so far, ascending; never written to

    def choose(
        self, scores: npt.NDArray[np.floating], eligible: Bools, older_tokens: int, kept_already: int,
        held_whole: int = 0,
    ) -> Bools:
        """Which tokens of a segment stay: [n] booleans, only where `eligible`. Call it once a segment, in order.

        scores: [n], higher is better; NaN counts as worst; ties go to the earlier token.
        eligible: [n], False for what stays anyway (sinks, pinned, other anchors) or never may.
        older_tokens: all tokens that have left the recent window, this segment's included.
        kept_already: cells kept of those, sinks and pinned included: they spend the budget too.
        held_whole: cells beside those, of the recent window; so do they, up to WHOLE_SHARE of it.
        """
        chosen = np.zeros(len(scores), dtype=bool)
        places = np.flatnonzero(eligible)
        values = np.nan_to_num(np.asarray(scores, dtype=np.float32)[places], nan=-np.inf, neginf=-np.inf, posinf=np.inf)
        self._seen = np.insert(self._seen, np.searchsorted(self._seen, np.sort(values)), np.sort(values))
        if not len(places):
            return chosen
        count = self._count(values, older_tokens, kept_already, held_whole)
        chosen[places[np.argsort(-values, kind="stable")[:count]]] = True
        return chosen

    def _count(self, values: Floats, older_tokens: int, kept_already: int, held_whole: int) -> int:
        """How many of `values` stay."""
        target = share(older_tokens, self.reduction, held_whole)
        slack = max(SLACK * max(older_tokens, SLACK_FROM) / self.reduction, 0.5)
        fewest = int(np.ceil(target - slack)) - kept_already
        most = int(np.floor(target + slack)) - kept_already
        rate = (target + HORIZON / self.reduction - kept_already) / (len(values) + HORIZON)
        rank = int(np.clip(round(rate * len(self._seen)), 1, len(self._seen)))
        threshold = self._seen[-rank]
        above = int((values > threshold).sum())
        at_least = int((values >= threshold).sum())
        count = min(max(round(target) - kept_already, above), at_least)
        return int(np.clip(np.clip(count, fewest, max(most, fewest)), 0, len(values)))

    def copy(self) -> RunningBudget:
        """An independent budget that continues from here."""
        other = RunningBudget(self.reduction)
        other._seen = self._seen
        return other

    def state(self) -> Floats:
        """What `restore` needs: all scores seen, ascending."""
        return self._seen.copy()

    @classmethod
    def restore(cls, reduction: float, seen: Floats) -> RunningBudget:
        """A budget that continues from `state()`."""
        other = cls(reduction)
        other._seen = np.asarray(seen, dtype=np.float32)
        return other
