"""Every figure with its uncertainty: standard errors of means, of paired differences, and by the bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anchorkv.engines.base import Ints

Numbers = npt.NDArray[np.float64]
DRAWS = 1000
"""Of the bootstrap."""
TIE = 2.0
"""Differences below so many standard errors are called a tie."""


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` measurements and its standard error; NaN where one measurement leaves it unknown."""

    value: float
    stderr: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.stderr:.3f}"


def mean(values: Sequence[float] | Numbers) -> Estimate:
    """The mean of independent measurements. NaN with n = 0 when there are none."""
    numbers = np.asarray(values, dtype=np.float64)
    n = len(numbers)
    error = float(numbers.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return Estimate(float(numbers.mean()) if n else float("nan"), error, n)


def difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """The mean of values - others, paired item by item: what both sides share does not blur it.

    Raises ValueError when the sides differ in length.
    """
    if len(values) != len(others):
        raise ValueError(f"{len(values)} values cannot be paired with {len(others)}")
    return mean(np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64))


def verdict(gain: Estimate) -> str:
    """"better", "worse" or "tie" for a difference where more is better."""
    if not abs(gain.value) > TIE * gain.stderr:
        return "tie"
    return "better" if gain.value > 0 else "worse"


def bootstrap(figure: Callable[[Ints], float], n: int, seed: int = 0, draws: int = DRAWS) -> float:
    """Standard error of `figure`, a function of the indices [n] of what was drawn with replacement out of n groups.

    For figures that are no plain mean (a ratio of perplexities). NaN for fewer than two groups, or draws with a figure.
    """
    if n < 2:
        return float("nan")
    random = np.random.default_rng(seed)
    found = np.asarray([figure(random.integers(0, n, n)) for _ in range(draws)], dtype=np.float64)
    known = found[~np.isnan(found)]
    return float(known.std(ddof=1)) if len(known) > 1 else float("nan")
