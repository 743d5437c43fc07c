"""Scorers: what they prefer, what they need, and that their memory of the document forks."""

import numpy as np
import pytest

from anchorkv.engines.base import CELLS, SURPRISE, Cells
from anchorkv.errors import ConfigError, ModelError
from anchorkv.scorers import (
    SCORERS,
    Endpoint,
    Frequency,
    Landmarks,
    Learned,
    Random,
    SegmentView,
    Surprise,
    cell_features,
    scorer,
)

PIECES = {1: b"", 5: b".", 6: b"\n\n", 300: b" the", 20000: b" whale", 40000: b" Ahab", 350: b"ing", 400: "鯨".encode()}


def view(tokens, start=0, surprise=None, cells=None, vocabulary=49152):
    return SegmentView(
        tokens=tokens, pieces=[PIECES.get(token, b" x") for token in tokens], start=start, surprise=surprise,
        cells=cells, vocabulary=vocabulary,
    )


def some_cells(count):
    rng = np.random.default_rng(1)
    return Cells(rng.standard_normal((count, 2)).astype(np.float32), rng.random((count, 2)).astype(np.float32))


def head(width=8, inner=None, seed=0):
    rng = np.random.default_rng(seed)

    def random(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    if inner is None:
        return Learned(random(width), 1 + random(width) ** 2, random(width), random()[()])
    return Learned(
        random(width), 1 + random(width) ** 2, random(inner, width), random(inner), random(inner), 0.25
    )


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_gives_one_finite_score_a_token(name):
    one = scorer(name)
    surprise = np.array([np.nan, 1, 2, 3, 4], dtype=np.float32)
    for segment in (view([300, 20000, 5, 40000, 1], surprise=surprise), view([], surprise=surprise[:0])):
        scores = one.score(segment)
        assert scores.dtype == np.float32
        assert scores.shape == (len(segment),)
        assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", SCORERS)
def test_a_copy_scores_alike_and_apart(name):
    rng = np.random.default_rng(0)
    segments = [
        view(rng.choice(list(PIECES), 20).tolist(), start=20 * i, surprise=rng.random(20).astype(np.float32))
        for i in range(3)
    ]
    first, alone = scorer(name), scorer(name)
    first.score(segments[0])
    alone.score(segments[0])
    second = first.copy()
    second.score(segments[1])
    assert (first.score(segments[2]) == alone.score(segments[2])).all()


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no scorer 'nope'.*default.*surprise"):
        scorer("nope")


def test_endpoint_prefers_the_last():
    assert np.argmax(Endpoint().score(view([300, 20000, 5]))) == 2


def test_frequency_prefers_the_rare_and_ignores_marks():
    scores = Frequency().score(view([300, 20000, 40000, 5, 6, 1]))
    assert scores[2] > scores[1] > scores[0] > 0
    assert (scores[3:] == 0).all()
    assert scores.max() <= 1


def test_landmarks_are_the_end_and_the_rare():
    scores = Landmarks().score(view([300, 20000, 40000, 5]))
    assert np.argsort(-scores).tolist() == [3, 2, 1, 0]
    assert scores[-1] >= 1 >= scores[:-1].max()


def test_other_scripts_have_content():
    assert Frequency().score(view([400]))[0] > 0


def test_surprise_is_the_models_own():
    surprise = np.array([np.nan, 5.0, 0.5], dtype=np.float32)
    assert Surprise().needs == {SURPRISE}
    assert Surprise().score(view([300, 5, 6], surprise=surprise)).tolist() == [0.0, 5.0, 0.5]


def test_a_missing_feature_is_named():
    with pytest.raises(ConfigError, match="surprise"):
        Surprise().score(view([300]))
    with pytest.raises(ConfigError, match="cells hold"):
        head().score(view([300]))


def test_random_depends_on_position_and_token_alone():
    whole = Random().score(view(list(range(300, 400))))
    tail = Random().score(view(list(range(350, 400)), start=50))
    assert (whole[50:] == tail).all()
    assert 0.35 < whole.mean() < 0.65
    assert len(set(whole.tolist())) == 100


@pytest.mark.parametrize("inner", [None, 4])
def test_learned_is_a_standardised_head(inner, tmp_path):
    learned = head(inner=inner)
    seen = view([300, 1, 20000, 5, 40000], cells=some_cells(5))
    features = cell_features(seen)
    assert features.shape == (5, 8)
    assert features[:, 6].tolist() == [0, 0, 0, 0, 1]
    x = (features - learned.mean) / learned.std
    if inner is None:
        expected = [float(learned.weight @ row + learned.bias) for row in x]
    else:
        expected = [float(np.maximum(learned.weight @ row + learned.bias, 0) @ learned.out + 0.25) for row in x]
    scores = learned.score(seen)
    assert scores == pytest.approx(expected, abs=1e-4)
    assert learned.needs == {CELLS}
    learned.save(tmp_path / "head.safetensors")
    again = scorer(str(tmp_path / "head.safetensors"))
    assert again.needs == learned.needs
    assert again.score(seen) == pytest.approx(scores, abs=0.02)  # weights are stored as halves


def test_learned_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ModelError, match="reads 9 features"):
        head(width=9).score(view([300], cells=some_cells(1)))
    with pytest.raises(ModelError, match="do not fit"):
        Learned(np.zeros(3), np.ones(3), np.zeros((2, 3)), np.zeros(2))
    with pytest.raises(ModelError, match="not a scorer"):
        scorer(str(tmp_path / "missing.safetensors"))
    (tmp_path / "damaged.safetensors").write_bytes(b"abc")
    with pytest.raises(ModelError, match="not a scorer"):
        scorer(str(tmp_path / "damaged.safetensors"))
