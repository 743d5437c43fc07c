"""Rolling estimates with their bounds, and the sequential test that says that a figure is no longer what it was.

Times are readings of a monotonic clock, in seconds: what the clock on the wall does changes nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any, Self

HALF_LIFE = 12 * 3600.0
"""Seconds after which a check counts half."""
ALARM = math.log(20_000)
"""Of the sequential test: while nothing has changed, it speaks up once in 20,000 checks or less often."""
_MOST_SCORE = 3.0
"""What one check may add to it, so that no single answer makes an alarm."""


@dataclass(frozen=True)
class Bounds:
    """An estimate and its two-sided bounds; `n`: how many checks it is worth, the faded ones counted in part."""

    value: float
    low: float
    high: float
    n: float

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in asdict(self).items()}


@dataclass
class Rolling:
    """A mean in which older values count less: each new value takes 1/window from those before it, and time takes half
    of all in `HALF_LIFE`. The weighted mean and variance are updated in place (West 1979)."""

    weight: float = 0.0
    mean: float = 0.0
    moment: float = 0.0
    """Weighted sum of squared deviations from the mean."""
    _last: float | None = field(default=None, repr=False)

    def add(self, value: float, now: float, window: float) -> None:
        fade = self._fade(now) * (1 - 1 / window)
        self.weight, self.moment, self._last = self.weight * fade + 1, self.moment * fade, now
        delta = value - self.mean
        self.mean += delta / self.weight
        self.moment += delta * (value - self.mean)

    def n(self, now: float) -> float:
        """Weight of all values at `now`, where one that comes now weighs 1."""
        return self.weight * self._fade(now)

    @property
    def variance(self) -> float:
        """Of single values; NaN below two of them."""
        return self.moment / (self.weight - 1) if self.weight >= 2 else math.nan

    def mean_bounds(self, now: float, confidence: float) -> Bounds | None:
        """By Student's t; None below two values."""
        n = self.n(now)
        if n < 2:
            return None
        reach = _t(confidence, n - 1) * math.sqrt(max(0.0, self.variance) / n)
        return Bounds(self.mean, self.mean - reach, self.mean + reach, n)

    def share_bounds(self, now: float, confidence: float) -> Bounds | None:
        """Of values that are 0 or 1, by Wilson's score interval (1927); None without values."""
        n = self.n(now)
        if n <= 0:
            return None
        z, p = NormalDist().inv_cdf((1 + confidence) / 2), min(1.0, max(0.0, self.mean))
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return Bounds(p, max(0.0, centre - reach), min(1.0, centre + reach), n)

    def as_dict(self) -> dict[str, float]:
        return {"weight": self.weight, "mean": self.mean, "moment": self.moment}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """From `as_dict`; the time between the two does not count. Raises KeyError, TypeError, ValueError."""
        values = [float(state[name]) for name in ("weight", "mean", "moment")]
        if not all(map(math.isfinite, values)):
            raise ValueError("an estimate is not finite")
        return cls(*values)

    def _fade(self, now: float) -> float:
        return 1.0 if self._last is None else 0.5 ** (max(0.0, now - self._last) / HALF_LIFE)


@dataclass
class Watched:
    """A figure's rolling mean, and CUSUM over it: the sum of log-likelihood ratios "as expected" against "out of
    bounds", never below 0 (Page 1954). An alarm comes at `ALARM`; the mean time between false ones is at least
    exp(ALARM) checks (Lorden 1971). What came since the sum last was 0 is what came since the change: an alarm makes it
    the estimate, so that what was before does not hide what is now."""

    rolling: Rolling = field(default_factory=Rolling)
    since: Rolling = field(default_factory=Rolling)
    total: float = 0.0

    def add(self, value: float, score: float, now: float, window: float) -> bool:
        """score: log-likelihood ratio of this value. Returns whether this is an alarm."""
        self.rolling.add(value, now, window)
        self.since.add(value, now, window)
        self.total = max(0.0, self.total + min(_MOST_SCORE, score))
        alarm = self.total >= ALARM
        if alarm:
            self.rolling, self.total = self.since, 0.0
        if not self.total:
            self.since = Rolling()
        return alarm

    @property
    def restless(self) -> bool:
        """Whether the test is half-way to an alarm."""
        return self.total > ALARM / 2

    def as_dict(self) -> dict[str, Any]:
        return {"rolling": self.rolling.as_dict(), "since": self.since.as_dict(), "total": self.total}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """As `Rolling.of`."""
        return cls(Rolling.of(state["rolling"]), Rolling.of(state["since"]), float(state["total"]))


def mean_score(value: float, expected: float, limit: float, variance: float) -> float:
    """Log-likelihood ratio of `value` for a normal mean at `limit` against one at `expected`."""
    return (limit - expected) / variance * (value - (limit + expected) / 2)


def share_score(hit: bool, expected: float, limit: float) -> float:
    """The same of one hit or miss for shares, each kept off 0 and 1 where a single miss would prove everything."""
    usual, other = (min(0.99, max(0.01, share)) for share in (expected, limit))
    return math.log(other / usual) if hit else math.log((1 - other) / (1 - usual))


def _t(confidence: float, freedom: float) -> float:
    """Student's quantile from the normal one (Abramowitz and Stegun, 26.7.5); never for less than two degrees."""
    z, v = NormalDist().inv_cdf((1 + confidence) / 2), max(2.0, freedom)
    return (
        z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
