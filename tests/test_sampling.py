"""From logits to tokens."""

from __future__ import annotations

import numpy as np
import pytest

from anchorkv.errors import ConfigError
from anchorkv.sampling import Sampling

LOGITS = np.asarray([0.0, 2.0, 1.0, -3.0], dtype=np.float32)


def test_greedy_takes_the_best() -> None:
    assert [Sampling().sampler().draw(LOGITS) for _ in range(3)] == [1, 1, 1]


def test_top_k_and_top_p_bound_the_choice() -> None:
    for options, allowed in ((Sampling(5, top_k=2), {1, 2}), (Sampling(1, top_p=0.1), {1})):
        sampler = options.sampler()
        assert {sampler.draw(LOGITS) for _ in range(200)} == allowed


def test_frequencies_follow_the_softmax() -> None:
    sampler = Sampling(temperature=1.0, seed=1).sampler()
    drawn = np.bincount([sampler.draw(LOGITS) for _ in range(4000)], minlength=4) / 4000
    expected = np.exp(LOGITS) / np.exp(LOGITS).sum()
    np.testing.assert_allclose(drawn, expected, atol=0.03)


def test_a_seed_decides() -> None:
    one, two = Sampling(1, seed=7).sampler(), Sampling(1, seed=7).sampler()
    assert [one.draw(LOGITS) for _ in range(20)] == [two.draw(LOGITS) for _ in range(20)]


@pytest.mark.parametrize("spread", [0.01, 3.0])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 40}, {"top_k": 700, "top_p": 0.5}, {"top_k": 10**6}])
def test_a_shortlist_draws_what_sorting_everything_would(options: dict[str, float], spread: float) -> None:
    """Whether the probable tokens are few or many, and where logits are equal."""
    found, expected = [], []
    for seed in range(50):
        logits = np.random.default_rng(seed).normal(scale=spread, size=2000).astype(np.float32).round(1)
        logits[::7] = -np.inf
        found.append(Sampling(0.8, seed=seed, **options).sampler().draw(logits))  # type: ignore[arg-type]
        order = np.argsort(-logits, kind="stable")[: int(options.get("top_k", len(logits)))]
        weights = np.exp(logits[order].astype(np.float64) / 0.8)
        weights /= weights.sum()
        weights = weights[: np.searchsorted(np.cumsum(weights), options.get("top_p", 1.0)) + 1]
        expected.append(order[np.random.default_rng(seed).choice(len(weights), p=weights / weights.sum())])
    assert found == expected


def test_repetition_is_penalised() -> None:
    sampler = Sampling(repetition_penalty=3).sampler()
    assert [sampler.draw(LOGITS) for _ in range(2)] == [1, 2]


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"repetition_penalty": 0}]
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]
