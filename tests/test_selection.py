"""The running budget: the reduction that was asked for is the one achieved, whatever the scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorkv.errors import ConfigError
from anchorkv.selection import AGE, RunningBudget, best, share


def run(scores, lengths, reduction, sinks=4, pinned=0.0, seed=0):
    """Keep tokens segment by segment; returns booleans over all tokens."""
    budget = RunningBudget(reduction)
    kept = np.random.default_rng(seed).random(len(scores)) < pinned
    kept[:sinks] = True
    start = 0
    for length in lengths:
        span = slice(start, start + length)
        before = kept.copy()
        kept[span] |= budget.choose(scores[span], ~kept[span], span.stop, int(kept[: span.stop].sum()))
        assert (kept[: span.start] == before[: span.start]).all()
        start += length
    return kept


def cut(total, lengths):
    """`lengths`, repeated until they sum up to exactly `total`."""
    out = []
    while sum(out) < total:
        out.append(min(lengths[len(out) % len(lengths)], total - sum(out)))
    return out


SHAPES = {
    "uniform": lambda rng, n: rng.random(n),
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy tail": lambda rng, n: rng.pareto(0.5, n),
    "constant": lambda rng, n: np.full(n, 3.0),
    "rising": lambda rng, n: np.arange(n),
    "exponentially rising": lambda rng, n: np.exp(np.linspace(0, 60, n)),
    "falling": lambda rng, n: -np.arange(n),
    "ties": lambda rng, n: rng.integers(0, 2, n),
    "rare one": lambda rng, n: rng.random(n) < 0.001,
    "saw": lambda rng, n: np.arange(n) % 700,
    "two books": lambda rng, n: np.concatenate([rng.random(n // 2), 5 + rng.random(n - n // 2)]),
    "poisoned": lambda rng, n: np.where(rng.random(n) < 0.3, np.nan, np.where(rng.random(n) < 0.3, np.inf, -np.inf)),
}


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)), seed=st.integers(0, 2**32 - 1), total=st.integers(2000, 4000),
    lengths=st.lists(st.integers(4, 64), min_size=1, max_size=8), reduction=st.floats(3, 40),
)
def test_achieved_reduction_is_within_5_percent(shape, seed, total, lengths, reduction):
    scores = SHAPES[shape](np.random.default_rng(seed), total)
    kept = run(scores, cut(total, lengths), reduction)
    assert total / kept.sum() == pytest.approx(reduction, rel=0.05)


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.floats(width=32), min_size=1, max_size=40), total=st.integers(2000, 3000),
    lengths=st.lists(st.integers(4, 64), min_size=1, max_size=5), reduction=st.floats(3, 40),
)
def test_any_repeating_scores(scores, total, lengths, reduction):
    kept = run(np.resize(np.array(scores, dtype=np.float32), total), cut(total, lengths), reduction)
    assert total / kept.sum() == pytest.approx(reduction, rel=0.05)


def test_pinned_tokens_spend_the_budget_too():
    scores = np.random.default_rng(1).random(4000)
    kept = run(scores, cut(4000, [30]), 12, pinned=0.05)
    assert 4000 / kept.sum() == pytest.approx(12, rel=0.05)


def test_more_pinned_than_the_budget_allows_leaves_nothing_to_choose():
    scores = np.random.default_rng(1).random(2000)
    pinned = np.random.default_rng(0).random(2000) < 0.5
    kept = run(scores, cut(2000, [25]), 12, sinks=0, pinned=0.5)
    assert kept.sum() - pinned.sum() < 10


def test_dense_passages_keep_more():
    rng = np.random.default_rng(2)
    dense = np.arange(4000) // 100 % 2 == 1
    kept = run(rng.random(4000) + 0.5 * dense, cut(4000, [25]), 12)
    assert kept[dense].sum() > 2 * kept[~dense].sum()


def test_the_best_of_a_segment_are_chosen_and_ineligible_ones_never():
    budget = RunningBudget(4)
    scores = np.array([0.1, 0.9, 0.5, 0.8, 0.2, 0.3, 0.4, 0.0])
    eligible = np.array([True, False, True, True, True, True, True, True])
    chosen = budget.choose(scores, eligible, 8, 0)
    assert not chosen[1]
    assert chosen[3]
    assert scores[chosen].min() > scores[~chosen & eligible].max()


def test_nothing_eligible_chooses_nothing():
    assert not RunningBudget(2).choose(np.ones(5), np.zeros(5, dtype=bool), 5, 0).any()
    assert RunningBudget(2).choose(np.ones(0), np.ones(0, dtype=bool), 0, 0).shape == (0,)


def test_a_copy_continues_alike_and_apart():
    rng = np.random.default_rng(3)
    first = RunningBudget(12)
    all_true = np.ones(30, dtype=bool)
    first.choose(rng.random(30), all_true, 30, 0)
    second = first.copy()
    scores = rng.random(30)
    second.choose(10 + rng.random(30), all_true, 60, 0)  # must not move the first one's threshold
    third = RunningBudget(12)
    rng = np.random.default_rng(3)
    third.choose(rng.random(30), all_true, 30, 0)
    assert (first.choose(scores, all_true, 60, 2) == third.choose(scores, all_true, 60, 2)).all()


@pytest.mark.parametrize("reduction", [1, 0, -3, float("nan")])
def test_a_reduction_must_reduce(reduction):
    with pytest.raises(ConfigError):
        RunningBudget(reduction)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 200), count=st.integers(0, 220), aging=st.floats(0, 9))
def test_as_many_anchors_stay_as_may(seed, size, count, aging):
    random = np.random.default_rng(seed)
    scores = np.where(random.random(size) < 0.1, np.nan, random.standard_normal(size)).astype(np.float32)
    assert best(scores, random.permutation(size), aging, 1.0, count).sum() == min(size, count)


def test_without_aging_the_best_scores_stay_and_with_much_of_it_the_youngest():
    random = np.random.default_rng(1)
    scores, ages = random.standard_normal(500).astype(np.float32), random.permutation(500) * 3
    assert set(np.flatnonzero(best(scores, ages, 0, 1, 50))) == set(np.argsort(-scores)[:50])
    assert set(np.flatnonzero(best(scores, ages, 1000, 1, 50))) == set(np.argsort(ages)[:50])


def test_an_old_anchor_stays_by_what_it_is_worth():
    """A deviation of score outweighs one e-fold of 1 + age / AGE at an aging of 1."""
    ages = np.asarray([0, round(AGE * (np.e - 1))])
    assert best(np.asarray([0, 1.01], dtype=np.float32), ages, 1, 1, 1).tolist() == [False, True]
    assert best(np.asarray([0, 0.99], dtype=np.float32), ages, 1, 1, 1).tolist() == [True, False]
    assert best(np.asarray([0, 1.01], dtype=np.float32), ages, 1, 2, 1).tolist() == [True, False]


def test_cells_held_whole_pay_for_a_tenth_of_the_share_at_most():
    assert share(1200, 12, 0) == 100
    assert share(1200, 12, 7) == 93
    assert share(1200, 12, 80) == 90
