"""From logits to the next token: greedy by default, else temperature, top-k and top-p with a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anchorkv.engines.base import Floats, Ints
from anchorkv.errors import ConfigError

SHORTLIST = 256
"""Of so many tokens the drawn one is nearly always one; to sort a whole vocabulary takes 5 ms."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 takes the most probable one."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    """> 1 makes tokens that the answer already holds less likely (CTRL, arXiv 1909.05858, section 4.1)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature must be 0 or more (got {self.temperature}).")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (off) or more (got {self.top_k}).")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1 (got {self.top_p}).")
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty must be above 0 (got {self.repetition_penalty}).")

    def sampler(self, never: int | None = None) -> Sampler:
        """never: a token that is not drawn, whatever its logit."""
        return Sampler(self, never)


class Sampler:
    """One answer's sampler; it remembers what it drew."""

    def __init__(self, options: Sampling, never: int | None = None) -> None:
        self.options = options
        self._never = never
        self._random = np.random.default_rng(options.seed)
        self._drawn: set[int] = set()

    def draw(self, logits: Floats) -> int:
        """The next token's id. logits: [vocabulary]."""
        if self._never is not None:
            logits = logits.copy()
            logits[self._never] = -np.inf
        token = self._draw(self._penalised(logits))
        self._drawn.add(token)
        return token

    def _penalised(self, logits: Floats) -> Floats:
        penalty = self.options.repetition_penalty
        if penalty == 1 or not self._drawn:
            return logits
        seen = np.fromiter(self._drawn, dtype=np.int64)
        out = logits.copy()
        out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
        return out

    def _draw(self, logits: Floats) -> int:
        options = self.options
        if options.temperature == 0:
            return int(np.argmax(logits))
        scaled = logits.astype(np.float64) / options.temperature
        weights = np.exp(scaled - scaled.max())
        order, aim = _best(scaled, options.top_k or SHORTLIST), self._random.random()
        whole = options.top_k or len(order) == len(weights)
        found = _place(weights[order], 0 if whole else weights.sum() - weights[order].sum(), options.top_p, aim)
        if found == len(order):
            order = _best(scaled, len(scaled))
            found = _place(weights[order], 0, options.top_p, aim)
        return int(order[found])


def _place(weights: Floats, others: float, top_p: float, aim: float) -> int:
    """On which of `weights`, the largest first, `aim` out of [0, 1) falls among the first `top_p` of all; their number
    where it is one of the smaller ones, which weigh `others` together."""
    sums = np.cumsum(weights)
    total = sums[-1] + others
    kept = int(np.searchsorted(sums, top_p * total)) + 1
    if kept <= len(sums):
        total = sums[kept - 1]
    elif others and top_p < 1:
        return len(sums)
    found = int(np.searchsorted(sums, aim * total, side="right"))
    return found if others else min(found, len(sums) - 1)


def _best(values: NDArray[np.float64], count: int) -> Ints:
    """Where the `count` largest values are, the largest first; of equal ones the first."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]
