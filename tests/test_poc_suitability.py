"""What is expected of a text: the fit finds what is there, its error is honest, and the packaged one is sound."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import suitability as benchmark  # benchmarks/suitability.py
from fake_engine import ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

from anchorkv.config import preset
from anchorkv.errors import SavedStateError
from anchorkv.evaluate.ways import ways
from anchorkv.poc import suitability
from anchorkv.poc.features import SHARES, features
from anchorkv.poc.results import Features
from anchorkv.poc.suitability import CLIP, FAIR, GOOD, NAMES, Fit, Predictor, fitted, level, packaged

WORDS = ("names", "fingerprint")
ROOT = Path(__file__).resolve().parent.parent


def text_like(**changes: float) -> Features:
    fields = {**dict.fromkeys(SHARES, 0.2), "tokens": 2048, "segment_tokens": 20.0, "language": "en", **changes}
    return Features(**fields)


def some(kinds: int = 12, each: int = 4, seed: int = 0) -> tuple[list[Features], list[str]]:
    """Texts of kinds, those of one kind alike."""
    chance = np.random.default_rng(seed)
    texts, names = [], []
    for kind in range(kinds):
        middle = dict(zip(SHARES, chance.uniform(0.1, 0.9, len(SHARES)), strict=True))
        for _ in range(each):
            near = {name: float(np.clip(value + chance.normal(0, 0.02), 0, 1)) for name, value in middle.items()}
            texts.append(text_like(segment_tokens=float(chance.uniform(10, 40)), **near))
            names.append(f"kind {kind}")
    return texts, names


def fit_of(seed: int = 0, noise: float = 0.0, slope: float = 0.5) -> tuple[Fit, list[Features]]:
    texts, kinds = some(seed=seed)
    chance = np.random.default_rng(seed)
    ratios = [0.1 + slope * text.numbers - slope / 2 * text.names + chance.normal(0, noise) for text in texts]
    return fitted(texts, ratios, kinds, length=2048, fingerprint="some weights"), texts


def test_the_fit_finds_what_the_ratio_follows_from() -> None:
    fit, texts = fit_of()
    predictor = Predictor(fit)
    for text in texts[::5]:
        expected = math.exp(0.1 + 0.5 * text.numbers - 0.25 * text.names)
        assert predictor.predict(text).expected_ratio == pytest.approx(expected, rel=0.04)
    found = predictor.predict(text_like(numbers=0.85, names=0.5))
    assert found.drivers[0] == "numbers"
    assert found.effects[0] > 1
    assert fit.r2 > 0.8


def test_features_that_mean_nothing_explain_nothing() -> None:
    fit, _ = fit_of(noise=0.2, slope=0.0)
    assert fit.r2 < 0.1, "a kind that was left out cannot be told from the others by chance"
    assert fit.error == pytest.approx(0.2, rel=0.3)


def test_the_error_is_that_of_kinds_left_out() -> None:
    """A shift of whole kinds cannot be learned from the others: the error must show it."""
    texts, kinds = some()
    shift = {kind: number % 2 * 0.4 for number, kind in enumerate(dict.fromkeys(kinds))}
    fit = fitted(texts, [shift[kind] for kind in kinds], kinds, length=2048, fingerprint="some weights")
    assert fit.error > 0.15


def test_three_kinds_are_the_least() -> None:
    texts, kinds = some(kinds=2)
    with pytest.raises(ValueError, match="2 kinds of text are too few"):
        fitted(texts, [0.1] * len(texts), kinds, length=2048, fingerprint="some weights")


def test_equal_ratios_are_no_error() -> None:
    texts, kinds = some(kinds=3)
    fit = fitted(texts, [0.1] * len(texts), kinds, length=2048, fingerprint="some weights")
    assert fit.error == pytest.approx(0, abs=1e-9)
    assert fit.r2 == 0


def test_an_unlike_text_is_outside_and_less_certain() -> None:
    fit, texts = fit_of()
    predictor = Predictor(fit)
    within, beyond = predictor.predict(texts[0]), predictor.predict(text_like(**dict.fromkeys(SHARES, 1.0)))
    assert not within.outside
    assert beyond.outside
    assert beyond.error > within.error > fit.error


def test_far_from_the_usual_a_feature_counts_no_more() -> None:
    fit, texts = fit_of()
    roots = np.sqrt([text.numbers for text in texts])
    most = roots.mean() + CLIP * roots.std()
    below, at, beyond = (
        Predictor(fit).predict(text_like(names=0.0, numbers=float(value))).expected_ratio
        for value in (0.9 * most**2, most**2, 1.0)
    )
    assert most**2 < 1
    assert below < at
    assert at == pytest.approx(beyond)


def test_nothing_is_expected_to_gain() -> None:
    fit, _ = fit_of(slope=2.0)
    assert Predictor(fit).predict(text_like(numbers=0.0, names=1.0)).expected_ratio == 1


def test_effects_multiply_to_the_expected_ratio() -> None:
    fit, texts = fit_of()
    effects = Predictor(fit).explain(texts[3])
    assert {effect.name for effect in effects} == set(NAMES)
    product = math.exp(fit.intercept) * math.prod(effect.factor for effect in effects)
    assert Predictor(fit).predict(texts[3]).expected_ratio == pytest.approx(product)
    usual = {effect.name: effect.usual for effect in effects}
    assert usual["numbers"] == pytest.approx(np.mean([math.sqrt(text.numbers) for text in texts]) ** 2)
    assert usual["segment_tokens"] == pytest.approx(np.exp(np.mean([np.log(text.segment_tokens) for text in texts])))


def test_a_usual_text_has_no_drivers() -> None:
    fit, texts = fit_of()
    usual = {name: float(np.mean([math.sqrt(getattr(text, name)) for text in texts]) ** 2) for name in SHARES}
    length = float(np.exp(np.mean([np.log(text.segment_tokens) for text in texts])))
    assert Predictor(fit).predict(text_like(**usual, segment_tokens=length)).drivers == ()


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.9, "good"), (GOOD, "good"), (GOOD + 1e-9, "fair"), (FAIR, "fair"), (FAIR + 1e-9, "poor")]
)
def test_levels(ratio: float, expected: str) -> None:
    assert level(ratio) == expected


# --- the packaged fit ----------------------------------------------------------------------------------------------


def test_the_packaged_fit_is_that_of_the_results() -> None:
    """Both are written by one run of benchmarks/suitability.py: fitting its rows again gives what is packaged."""
    results = json.loads((ROOT / "results" / "suitability.json").read_text(encoding="utf-8"))
    rows, fit = results["rows"], packaged()
    again = fitted(
        [Features(**row["features"]) for row in rows], [row["log_ratio"] for row in rows],
        [row["kind"] for row in rows], length=fit.length, fingerprint=results["model"]["fingerprint"],
    )
    for name in Fit.model_fields:
        ours, packed = getattr(again, name), getattr(fit, name)
        assert np.asarray(ours) == pytest.approx(np.asarray(packed)) if name not in WORDS else ours == packed, name
    assert results["fit"]["error"] == pytest.approx(fit.error)
    assert not [row["source"] for row in rows if ".test." in row["source"]]
    assert len({row["id"] for row in rows}) == len(rows)


def test_the_packaged_fit_expects_loss_within_reason() -> None:
    predictor = Predictor()
    prose = "The committee met on Tuesday, and Alice Walker wrote to the mayor about the plan for the year. " * 40
    found = predictor.predict(features(prose, ByteTokenizer()))
    assert 1 <= found.expected_ratio < 3
    assert 0 < found.error < 1
    assert set(found.drivers) <= set(NAMES)


SHARE = st.floats(0, 1)


@given(st.builds(
    Features, tokens=st.integers(0, 10**9), segment_tokens=st.floats(0, 1e9), language=st.just("other"),
    **dict.fromkeys(SHARES, SHARE),
))
def test_any_features_have_a_finite_expectation(text: Features) -> None:
    found = Predictor().predict(text)
    assert math.isfinite(found.expected_ratio)
    assert found.expected_ratio > 0
    assert math.isfinite(found.error)
    assert len(found.drivers) == len(found.effects) <= 3
    assert found.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"names": ["numbers"]}'])
def test_a_damaged_file_is_told_in_one_sentence(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / suitability.FILE).write_text(content)
    monkeypatch.setattr(suitability, "files", lambda package: tmp_path)
    packaged.cache_clear()
    try:
        with pytest.raises(SavedStateError, match=r"missing or damaged; install anchorkv again\.$"):
            Predictor()
    finally:
        packaged.cache_clear()


# --- the benchmark -------------------------------------------------------------------------------------------------


def test_no_test_file_is_read() -> None:
    assert not [name for name, _, _ in benchmark.ROWS.values() if "test" in Path(name).name]


def test_more_texts_go_on_from_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"Line {n} of a text. " * 9 for n in range(400)]
    pool = [("one:1", "\n".join(lines)), *((f"one:{n}", lines[n]) for n in range(2, 300))]
    monkeypatch.setattr(benchmark, "pools", lambda data: iter([("one", pool), ("short", [("short:1", "Too short.")])]))
    fewer, more = (benchmark.texts(Path(), ByteTokenizer(), count) for count in (2, 4))
    assert (len(fewer), len(more)) == (2, 4), "a kind that is too short gives none"
    assert more[:2] == fewer
    assert all(len(text.tokens) == benchmark.LENGTH for text in more)
    assert len({text.id for text in more}) == 4


def test_a_row_compares_both_readings_of_a_text() -> None:
    text = benchmark.Text("books", "somewhere", "some text", (1, 2))
    task = benchmark.Suitability([text])
    both = ways(['default:recall="off"'])
    blocks = {both[0].name: [256.0, 384.0], both[1].name: [256.0, 448.0]}
    records = [{"way": name, "item": text.id, "blocks": sums, "reduction": 9.0} for name, sums in blocks.items()]
    (row,) = task.rows(records, both)
    assert row["log_ratio"] == pytest.approx((448 - 384) / 256)
    assert row["ratio"] == pytest.approx(math.exp(0.25))
    assert row["full_perplexity"] == pytest.approx(math.exp(2.5))
    assert row["reduction"] == 9
    assert task.rows(records[:1], both) == [], "read in one way only"
    assert both[1].policy == preset("default").replace(recall="off")
