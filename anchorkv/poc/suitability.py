"""What to expect of a text before anything is measured: a linear model of the perplexity ratio from its features.

The ratio is that of the model's own policy, recall off, to the full cache of the same weights, over texts of about
2,048 tokens of which the first 512 are not scored. The model is a ridge regression of its logarithm, fitted by
benchmarks/suitability.py on texts of many kinds and read from suitability.json beside this file. Its error is measured
on kinds of text that were left out of the fit, for a user's texts are of a kind of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from anchorkv.errors import SavedStateError
from anchorkv.poc.features import SHARES
from anchorkv.poc.results import Features, Part, Suitability

Numbers = npt.NDArray[np.float64]
FILE = "suitability.json"
NAMES = ("segment_tokens", *SHARES)
"""The features that the model knows, as fields of `Features`."""
GOOD, FAIR = 1.25, 1.5
"""Levels of the expected ratio: up to GOOD, the PoC's default limit, a text suits anchors; up to FAIR what it loses is
mostly single facts, which recall brings back; beyond it the loss is in every sentence."""
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Tried for the ridge: how many texts' worth the belief that a feature does not matter is."""
NEAR = 0.95
"""Share of the fitted texts that lie nearer to another one than what is called outside."""
LEAST_LOSS = 0.0
"""Of the ratio's logarithm. Texts that repeat little lose almost nothing; a line would let them gain."""
CLIP = 2.0
"""Standard deviations beyond which a feature counts no more: a line through usual texts says little of a table."""
DRIVERS, LEAST = 3, 0.02
"""Most features named as drivers; a smaller part of the expected logarithm is not worth a name."""


class Fit(Part):
    """A fitted model. Lists of numbers are in the order of `names`; standardised: minus `means`, over `scales`."""

    names: tuple[str, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...] = Field(description="of standardised features")
    intercept: float = Field(description="log ratio of a text whose features are all the means")
    penalty: float
    texts: tuple[tuple[float, ...], ...] = Field(description="the fitted texts' standardised features")
    limit: float = Field(description="distance to the nearest fitted text beyond which a text is outside")
    error: float = Field(description="root mean square error of the log ratio on kinds that were left out")
    r2: float = Field(description="share of the variance of the log ratio that is explained on kinds left out")
    kinds: int
    length: int = Field(description="tokens of a fitted text")
    fingerprint: str = Field(description="of the weights that were measured")


@dataclass(frozen=True)
class Effect:
    """What one feature does to the expected ratio: `factor` times what a text of the usual value would have."""

    name: str
    value: float
    usual: float
    """The mean of the fitted texts, taken as the model is linear in it (`vector`)."""
    factor: float
    """Above 1 speaks against anchors, below 1 for them."""


class Predictor:
    """Predictions of one fit: the packaged one, unless another is given."""

    def __init__(self, fit: Fit | None = None) -> None:
        """Raises SavedStateError when the packaged file is damaged."""
        self.fit = packaged() if fit is None else fit

    def predict(self, features: Features) -> Suitability:
        """The expected ratio and how far it can be trusted, whatever the features are."""
        fit, place = self.fit, self._place(features)
        outside, effects = distance(place, np.asarray(fit.texts)) > fit.limit, self.explain(features)
        ratio = math.exp(max(LEAST_LOSS, fit.intercept + sum(math.log(effect.factor) for effect in effects)))
        drivers = [effect for effect in effects if abs(math.log(effect.factor)) >= LEAST][:DRIVERS]
        return Suitability(
            expected_ratio=ratio, error=fit.error * math.sqrt(1 + self._leverage(place)), level=level(ratio),
            drivers=tuple(effect.name for effect in drivers), effects=tuple(effect.factor for effect in drivers),
            outside=outside,
        )

    def explain(self, features: Features) -> tuple[Effect, ...]:
        """What every feature does, the strongest first. Beyond `CLIP` standard deviations a feature counts no more."""
        fit = self.fit
        parts = np.clip(self._place(features), -CLIP, CLIP) * np.asarray(fit.weights)
        effects = [
            Effect(name, getattr(features, name), _shown(name, mean), math.exp(part))
            for name, mean, part in zip(fit.names, fit.means, parts.tolist(), strict=True)
        ]
        return tuple(sorted(effects, key=lambda effect: -abs(math.log(effect.factor))))

    def _place(self, features: Features) -> Numbers:
        """Standardised features [k]."""
        place: Numbers = (vector(features, self.fit.names) - np.asarray(self.fit.means)) / np.asarray(self.fit.scales)
        return place

    def _leverage(self, place: Numbers) -> float:
        """How much a text there would move its own prediction: its part of the error comes from uncertain weights."""
        texts = np.clip(self.fit.texts, -CLIP, CLIP)
        return float(place @ np.linalg.solve(_gram(texts, self.fit.penalty), place))


def level(ratio: float) -> Literal["good", "fair", "poor"]:
    """ "good", "fair" or "poor" for an expected ratio."""
    return "good" if ratio <= GOOD else "fair" if ratio <= FAIR else "poor"


@lru_cache
def packaged() -> Fit:
    """The fit that the package brings. Raises SavedStateError when its file is missing or damaged."""
    path = files(__package__) / FILE
    try:
        return Fit.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise SavedStateError(f"{path} is missing or damaged; install anchorkv again.") from None


def vector(features: Features, names: Sequence[str] = NAMES) -> Numbers:
    """What the model is linear in, [k]: the logarithm of a length, and the square root of a share, for between none and
    few lies more than between many and all."""
    return np.asarray([
        math.log(max(1.0, features.segment_tokens)) if name == "segment_tokens" else math.sqrt(getattr(features, name))
        for name in names
    ], dtype=np.float64)


def _shown(name: str, value: float) -> float:
    return math.exp(value) if name == "segment_tokens" else value**2


def distance(place: Numbers, texts: Numbers) -> float:
    """From a place [k] to the nearest of `texts` [n, k]."""
    return float(np.sqrt(((texts - place) ** 2).sum(axis=1)).min())


# --- fitting -------------------------------------------------------------------------------------------------------


def fitted(
    features: Sequence[Features], log_ratios: Sequence[float], kinds: Sequence[str], *, length: int, fingerprint: str
) -> Fit:
    """The model of these texts; its error by leaving out one kind at a time, the penalty chosen anew without it.

    Raises ValueError for fewer than three kinds, for which there is no such error.
    """
    rows, target, groups = np.stack([vector(each) for each in features]), np.asarray(log_ratios), np.asarray(kinds)
    if len(set(kinds)) < 3:
        raise ValueError(f"{len(set(kinds))} kinds of text are too few to tell the error on a kind left out")
    expected = left_out(rows, target, groups)
    means, scales = _scaling(rows)
    texts = (rows - means) / scales
    penalty = best_penalty(rows, target, groups)
    weights, intercept = _ridge(texts, target, penalty)
    apart = [distance(texts[n], np.delete(texts, n, axis=0)) for n in range(len(texts))]
    return Fit(
        names=NAMES, means=tuple(means), scales=tuple(scales), weights=tuple(weights), intercept=intercept,
        penalty=penalty, texts=tuple(map(tuple, texts.tolist())),
        limit=float(np.quantile(apart, NEAR)), error=float(np.sqrt(((target - expected) ** 2).mean())),
        r2=explained(target, expected), kinds=len(set(kinds)), length=length, fingerprint=fingerprint,
    )


def explained(target: Numbers, expected: Numbers) -> float:
    """R2: share of the variance of `target`; below 0 where its mean alone would be nearer. 0 where nothing varies."""
    variance = target.var()
    return float(1 - ((target - expected) ** 2).mean() / variance) if variance > 1e-12 else 0.0


def left_out(rows: Numbers, target: Numbers, groups: npt.NDArray[Any]) -> Numbers:
    """What a model that never saw a text's kind, not even to choose its penalty, expects of it: [n]."""
    expected = np.empty_like(target)
    for kind in np.unique(groups):
        out = groups == kind
        penalty = best_penalty(rows[~out], target[~out], groups[~out])
        expected[out] = _expected(rows[~out], target[~out], rows[out], penalty)
    return expected


def best_penalty(rows: Numbers, target: Numbers, groups: npt.NDArray[Any]) -> float:
    """The one of PENALTIES with the smallest squared error on kinds left out."""
    def error(penalty: float) -> float:
        total = 0.0
        for kind in np.unique(groups):
            out = groups == kind
            total += ((target[out] - _expected(rows[~out], target[~out], rows[out], penalty)) ** 2).sum()
        return total

    return min(PENALTIES, key=error)


def _expected(rows: Numbers, target: Numbers, others: Numbers, penalty: float) -> Numbers:
    """Fitted on rows [n, k] and target [n]: what `Predictor` would expect of others [m, k]."""
    means, scales = _scaling(rows)
    weights, intercept = _ridge((rows - means) / scales, target, penalty)
    expected: Numbers = np.maximum(LEAST_LOSS, intercept + np.clip((others - means) / scales, -CLIP, CLIP) @ weights)
    return expected


def _scaling(rows: Numbers) -> tuple[Numbers, Numbers]:
    scales = rows.std(axis=0)
    return rows.mean(axis=0), np.where(scales > 0, scales, 1.0)


def _ridge(texts: Numbers, target: Numbers, penalty: float) -> tuple[Numbers, float]:
    """Weights [k] of standardised texts [n, k], clipped, and the intercept."""
    inside = np.clip(texts, -CLIP, CLIP)
    middle = inside.mean(axis=0)
    weights: Numbers = np.linalg.solve(_gram(inside - middle, penalty), (inside - middle).T @ (target - target.mean()))
    return weights, float(target.mean() - middle @ weights)


def _gram(texts: Numbers, penalty: float) -> Numbers:
    gram: Numbers = texts.T @ texts + penalty * np.eye(texts.shape[1])
    return gram
