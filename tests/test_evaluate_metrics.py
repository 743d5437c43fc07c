"""Exact match, token F1, containment and ROUGE: the official scripts' own cases, DROP's numbers, Japanese."""

from __future__ import annotations

import sys

import pytest

from anchorkv.errors import ConfigError
from anchorkv.evaluate.metrics import contains, exact_match, f1, rouge, rouge_scorer, tokens


@pytest.mark.parametrize(("answer", "accepted", "exact", "score"), [
    ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
    ("in 1999", ["1999", "the year 1999"], 0, 2 / 3),  # one of two tokens is right, the one wanted is there
    ("the the cat", ["cat cat"], 0, 2 / 3),  # articles go
    ("cat cat dog", ["cat cat"], 0, 4 / 5),  # a token counts as often as it stands on both sides
    ("Paris", ["London"], 0, 0),
    ("", ["London"], 0, 0),
    ("theatre", ["the atre"], 0, 0),  # an article is a word of its own
    ("U.S.A.", ["usa"], 1, 1),
    ("twenty-one", ["twentyone"], 1, 1),  # SQuAD deletes punctuation; it does not part words
])
def test_squads_exact_match_and_f1(answer: str, accepted: list[str], exact: float, score: float) -> None:
    assert exact_match(answer, accepted) == exact
    assert f1(answer, accepted) == pytest.approx(score)


def test_the_best_accepted_answer_counts() -> None:
    assert f1("six years", ["seven months", "for six long years"]) == pytest.approx(2 / 3)
    assert f1("anything", []) == 0


@pytest.mark.parametrize(("answer", "gold", "exact", "score"), [
    ("15.0", "15", 1, 1),
    ("1,507", "1507", 1, 1),
    ("15 yards", "15", 0, 2 / 3),
    ("16 yards long", "15 yards", 0, 0),  # no number of the gold answer: nothing else counts
    ("yards", "15 yards", 0, 0),
    ("15-yard", "15 yard", 1, 1),  # hyphens part words
    ("Smith Smith", "Smith", 0, 1),  # bags are sets
    ("the longest", "longest", 1, 1),
])
def test_drops_numbers(answer: str, gold: str, exact: float, score: float) -> None:
    assert exact_match(answer, [gold], numbers=True) == exact
    assert f1(answer, [gold], numbers=True) == pytest.approx(score)


def test_japanese_is_compared_by_characters() -> None:
    assert tokens("「揚子江、気団。」") == list("揚子江気団")
    assert exact_match("揚子江気団。", ["揚子江気団"]) == 1
    assert f1("揚子江気団です", ["揚子江気団"]) == pytest.approx(2 * 5 / 12)
    assert f1("1972年", ["１９７２"]) == pytest.approx(2 * 4 / 9)  # either side decides; full width is no difference
    assert contains("答えは揚子江気団です。", ["揚子江 気団"])


@pytest.mark.parametrize(("answer", "gold", "found"), [
    ("The answer is 38, I think.", "38", True),
    ("The answer is 138.", "38", False),
    ("It was the old harbour of Oslo.", "old harbour", True),
    ("harbour, old", "old harbour", False),
    ("Anything at all.", "the", False),  # nothing is left of the gold answer
])
def test_an_answer_contains_the_gold_one_token_for_token(answer: str, gold: str, found: bool) -> None:
    assert contains(answer, [gold]) is found


def test_rouge_is_the_librarys() -> None:
    pytest.importorskip("rouge_score")
    scores = rouge("the cats sat on the mat", "the cat was on the mat")
    # five of six stemmed words; "the cat", "on the", "the mat"; the longest common subsequence has five
    assert scores == {
        "rouge1": pytest.approx(5 / 6), "rouge2": pytest.approx(3 / 5), "rougeL": pytest.approx(5 / 6)
    }


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    rouge_scorer.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'anchorkv\[eval\]'"):
        rouge("a", "b")
    rouge_scorer.cache_clear()
