"""Features of texts: what each counts, that a long text compares with a short one, and that nothing breaks them."""

from __future__ import annotations

import time

import pytest
from fake_engine import ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorkv.poc.features import COMMON, LATELY, MOST, PHRASE, SHARES, STRETCH, combined, features
from anchorkv.poc.results import Features

TOKENIZER = ByteTokenizer()
PROSE = (
    "The committee met on Tuesday to discuss the budget. It was agreed that Alice Walker would write to the mayor. "
    "Nobody objected, and the meeting was closed before noon.\n\n"
)
JAPANESE = "委員会は火曜日に予算を検討した。田中さんが市長に手紙を書くことになった。反対する者はいなかった。\n"
CODE = "def area(width, height):\n    size = width * height\n    return size\n\nclass Box(Shape):\n    sides = 4\n"
TABLE = "| part | price | stock |\n| --- | --- | --- |\n| PX-200 | 3.50 | 17 |\n| PX-201 | 4.25 | 0 |\n"


def of(text: str) -> Features:
    return features(text, TOKENIZER)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (PROSE, "en"), (JAPANESE, "ja"), (TABLE, "other"), ("", "other"), ("委员会星期二讨论了预算。" * 9, "other"),
        ("Der Ausschuss hat am Dienstag den Haushalt beraten, und niemand hat dem widersprochen. " * 3, "other"),
    ],
)
def test_language(text: str, language: str) -> None:
    assert of(text).language == language


def test_prose() -> None:
    found = of(PROSE)
    assert found.tokens == len(PROSE)
    assert found.segment_tokens == pytest.approx(len(PROSE) / 3)
    assert (found.numbers, found.code, found.tables, found.japanese) == (0, 0, 0, 0)
    assert found.names == pytest.approx(3 / 29)  # Tuesday, Alice, Walker; not the words that open sentences


def test_japanese() -> None:
    found = of(JAPANESE)
    assert found.japanese == 1
    assert found.segment_tokens == pytest.approx(found.tokens / 3)
    assert found.redundancy < 0.3, "its bytes in UTF-8 are no redundancy of the text"


def test_code_and_tables() -> None:
    code, table = of(CODE), of(TABLE)
    assert (code.code, code.tables) == (pytest.approx(4 / 5), 0)
    assert (table.code, table.tables) == (0, 1)
    assert of("a,b,c,d\n1,2,3,4\n").tables == 1
    assert of("a\tb\tc\n").tables == 1
    assert of("part    price   stock\n").tables == 1
    assert of("Tea, milk, sugar, and bread were bought, as always.\n").tables == 0
    assert of("前田,中村,山本,小林が出席した。\n").tables == 0
    assert of("```\nmake run\n```\nThat is all.\n").code == pytest.approx(3 / 4)


def test_numbers_and_what_is_repeated() -> None:
    found = of("the part PX-200 costs 3.50 and the part PX-200 weighs 12 kg")
    assert found.numbers == pytest.approx(4 / 12)
    assert found.repeated_names == pytest.approx(1 / 4)
    assert of("no name here, and no number").repeated_names == 0


def test_what_returns_after_long_is_told_from_what_is_said_again_at_once() -> None:
    between = " ".join(f"w{n}" for n in range(LATELY + 1))
    quoted = "the Kessler valve opens slowly"
    for text, terms, phrases in (
        (f"{quoted} {between} {quoted}", 5, 1), (f"{between} {between}", LATELY + 1, LATELY + 2 - PHRASE),
        (f"{between} Kessler Kessler", 0, 0), (f"valve {between[: len(between) // 2]} valve", 0, 0),
    ):
        found, words = of(text), len(text.split())
        assert found.returning_terms == pytest.approx(terms / words), text
        assert found.returning_phrases == pytest.approx(phrases / (words + 1 - PHRASE)), text


def test_common_words_are_no_terms() -> None:
    class Words(ByteTokenizer):
        """"valve" is one token, and it is the number `number`."""

        def __init__(self, number: int) -> None:
            self.number = number

        def encode(self, text: str, special: bool = False) -> list[int]:
            return [97, self.number] if text == "a valve" else super().encode(text, special)

    text = f"valve {'x ' * 2 * LATELY} valve"
    assert features(text, Words(COMMON - 1)).returning_terms == 0
    assert features(text, Words(COMMON)).returning_terms == pytest.approx(1 / (2 * LATELY + 2))


def test_redundancy_tells_repetition() -> None:
    assert of(PROSE * 8).redundancy > 0.8 > of(PROSE).redundancy


def test_rare_words_are_judged_as_the_tokenizer_cuts_them() -> None:
    assert of("a bc d ef").rare_words == 0.5  # with its space "bc" takes three bytes, "d" two
    assert of("日").rare_words == 1  # three bytes


def test_a_long_text_is_like_its_parts() -> None:
    short, long = of(PROSE * 8), of(PROSE * 8 * 12)
    assert len(PROSE * 8) > STRETCH / 2
    assert long.tokens == 12 * short.tokens
    for name in SHARES:
        assert getattr(long, name) == pytest.approx(getattr(short, name), abs=0.06), name


def test_a_huge_text_is_sampled_from_beginning_to_end() -> None:
    half = STRETCH * MOST
    found = of("plain words only " * (half // 17) + "n 12 " * (half // 5))
    assert 0.15 < found.numbers < 0.4
    assert found.tokens == pytest.approx(2 * half, rel=0.01)


def test_combined_is_weighted_by_tokens() -> None:
    one, other = of(PROSE), of(TABLE * 50)
    both = combined([one, other])
    assert both.tokens == one.tokens + other.tokens
    assert both.tables == pytest.approx(other.tokens / both.tokens)
    assert both.language == "other"
    sentences = one.tokens / one.segment_tokens + other.tokens / other.segment_tokens
    assert both.segment_tokens == pytest.approx(both.tokens / sentences)
    assert combined([one]) == one
    assert combined([]).tokens == 0
    assert combined([of(""), one]) == one


HOSTILE = st.text(
    st.sampled_from(list("aB1 .,|\t\n`\"'#=-+日本ァぁ\u3000。\u0000\ud800\U0001f600\u202e\u0301")), max_size=300
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(HOSTILE, st.text(max_size=200)), st.integers(1, 60))
def test_any_text_has_features(text: str, times: int) -> None:
    found = of(text * times)
    assert all(0 <= getattr(found, name) <= 1 for name in SHARES)
    assert 0 <= found.segment_tokens <= max(1, found.tokens)


@pytest.mark.parametrize("part", [*"a|( \n", "1,", "a.b", "a_", "x=", "A ", "a\t", PROSE, JAPANESE, CODE, TABLE])
def test_thirty_thousand_characters_take_less_than_a_second(part: str) -> None:
    text = part * (30_000 // len(part))
    started = time.process_time()
    of(text)
    assert time.process_time() - started < 2  # the machine may be busy; alone it takes a third of a second
