"""What a text is like, before any model reads it: what speaks for anchors, and what against them.

All are light counts that err on single words and hold on average: no parser, no list of names, no model. A long text
is judged in stretches of about 2,048 tokens, for how redundant a text is and what it repeats depends on how much of it
one looks at; so long and short texts compare, and both with those that suitability.py was fitted on.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Tokenizer
from anchorkv.poc.results import Features
from anchorkv.segment import is_fence, looks_like_code, split

T = TypeVar("T", bound=Hashable)
STRETCH = 2048
"""Tokens that are judged together."""
MOST = 16
"""Stretches that are judged of a text, evenly spread over it."""
SENTENCES = AnchorConfig(min_segment=1, max_segment=256)
SHARES = (
    "numbers", "names", "code", "tables", "redundancy", "repeated_names", "rare_words", "returning_terms",
    "returning_phrases", "japanese",
)
"""The features that are shares, 0 to 1."""
RARE_PIECES, COMMON = 3, 4000
"""A word of so many tokens is rare; a word of one token is common where its id is below this: tokenizers number what
they learned, the most frequent first."""
LATELY = 60
"""Words. What returns sooner is still whole in the recent window; for what returns later anchors have to do."""
PHRASE = 5
"""Words and marks: short runs come back by chance, longer ones are quoted."""

_KANA, _KANJI = "ぁ-ゖァ-ヺー", "一-鿿々〆㐀-䶿"
WORD = re.compile(rf"[{_KANJI}]+|[ァ-ヺー]+|[ぁ-ゖ]+|(?:(?![{_KANJI}{_KANA}])[^\W_])+(?:['’.,:/_-](?=\w)[^\W_]+)*")
"""A word, a number or a code ("3.5", "2024-05-01", "PX-200"); in Japanese a run of one script."""
PART = re.compile(rf"{WORD.pattern}|[^\w\s]")
"""A word or a mark: what phrases are made of."""
KANA, KANJI = re.compile(f"[{_KANA}]"), re.compile(f"[{_KANJI}]")
NUMBER = re.compile(r"\d")
OPENING = re.compile(r"(?:^|[.!?:。！？\"“”'‘(\[*#>|\n-])\s*$")
"""What a capital after it says nothing: the beginning of a line, a sentence, speech or a list item."""
NO_NAMES = frozenset("I I'm I've I'd I'll I’m I’ve I’d I’ll".split())
ENGLISH = frozenset("the of and to in is that for it with as on are be this by not or from at an was you if".split())
CUT = re.compile(r".*?\n|\S*\s")
LINE = 400
"""Characters of a line that are looked at."""


def features(text: str, tokenizer: Tokenizer) -> Features:
    """Counts over `text`, whatever it holds; tokens are the tokenizer's. A text without words has shares of 0."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no text that could be tokenized
    size = len(tokenizer.encode(text))
    parts = [_stretch(part, tokenizer) for part in _stretches(text, round(size / STRETCH))]
    return combined(parts).model_copy(update={"tokens": size})


def combined(parts: Sequence[Features]) -> Features:
    """Of all texts together: means weighted by tokens; the language is that of most tokens."""
    tokens = sum(part.tokens for part in parts)
    if not tokens:
        return Features(tokens=0, segment_tokens=0.0, language="other", **dict.fromkeys(SHARES, 0.0))
    shares = {name: sum(getattr(part, name) * part.tokens for part in parts) / tokens for name in SHARES}
    sentences = sum(part.tokens / part.segment_tokens for part in parts if part.segment_tokens)
    languages: dict[str, int] = {}
    for part in parts:
        languages[part.language] = languages.get(part.language, 0) + part.tokens
    return Features(
        tokens=tokens, segment_tokens=tokens / sentences if sentences else 0.0,
        language=max(languages, key=lambda name: languages[name]),
        **{name: min(1.0, max(0.0, share)) for name, share in shares.items()},
    )


def _stretches(text: str, count: int) -> Iterator[str]:
    """`text` in `count` parts of about equal length, at most `MOST` of them, cut at the next line or else space."""
    count = max(1, count)
    bounds = [0]
    for n in range(1, count):
        at = n * len(text) // count
        after = CUT.search(text, at, at + LINE)
        bounds.append(max(bounds[-1], after.end() if after else at))
    bounds.append(len(text))
    chosen = range(count) if count <= MOST else (n * (count - 1) // (MOST - 1) for n in range(MOST))
    return (text[bounds[n] : bounds[n + 1]] for n in chosen)


def _stretch(text: str, tokenizer: Tokenizer) -> Features:
    tokens = tokenizer.encode(text)
    sentences = sum(bool(tokenizer.decode(each).strip()) for each in split(tokens, SENTENCES, tokenizer.piece))
    found = list(WORD.finditer(text))
    words = [word.group() for word in found]
    numbers = [word for word in words if NUMBER.search(word)]
    names = [word.group() for word in found if _is_name(text, word)]
    lines = [line[:LINE] for line in text.splitlines() if line.strip()]
    japanese, pieces = _japanese(text), _pieces(words, tokenizer)
    parts = PART.findall(text)
    return Features(
        tokens=len(tokens), segment_tokens=len(tokens) / sentences if sentences else 0.0,
        numbers=_share(len(numbers), len(words)), names=_share(len(names), len(words)),
        code=_share(_code_lines(lines), len(lines)), tables=_share(sum(map(_is_row, lines)), len(lines)),
        redundancy=_redundancy(text), repeated_names=_repeated([*numbers, *names]),
        rare_words=_share(sum(len(pieces[word]) >= RARE_PIECES for word in words), len(words)),
        returning_terms=_returning(words, lambda word: len(pieces[word]) > 1 or pieces[word][0] >= COMMON),
        returning_phrases=_returning(list(zip(*(parts[n:] for n in range(PHRASE)), strict=False))),
        japanese=japanese, language=_language(text, words, japanese),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _is_name(text: str, word: re.Match[str]) -> bool:
    """Whether it has a capital that its place does not explain."""
    shown = word.group()
    if not shown[0].isupper() or shown in NO_NAMES or NUMBER.search(shown):
        return False
    return OPENING.search(text[max(0, word.start() - 4) : word.start()]) is None and word.start() > 0


def _repeated(words: Sequence[str]) -> float:
    """Share of `words` that occurred before."""
    return _share(len(words) - len(set(words)), len(words))


def _code_lines(lines: Sequence[str]) -> int:
    count, fenced = 0, False
    for line in lines:
        fence = is_fence(line)
        count += fence or fenced or (looks_like_code(line) and not _is_row(line))
        fenced ^= fence
    return count


def _is_row(line: str) -> bool:
    """Whether it looks like a row of a table: cells between bars, tabs, wide gaps, or at least three tight commas."""
    body = line.strip()
    if body.startswith(("+-", "+=")) or (body.startswith("|") and body.count("|") > 1) or body.count(" | ") > 1:
        return True
    cells = len(re.findall(r"\S(?=\t| {3,}\S)", body))
    tight = len(re.findall(r"(?<![^!-~]),(?! )", body))
    return cells >= 2 or (tight >= 3 and len(body) < 30 * tight and ", " not in body)


def _redundancy(text: str) -> float:
    """In the encoding that takes fewer bytes: UTF-8 alone would make three-byte characters look redundant."""
    data = min(text.encode("utf-8"), text.encode("utf-16-le"), key=len)
    return max(0.0, 1 - len(zlib.compress(data, 9)) / len(data)) if data else 0.0


def _pieces(words: Sequence[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """The tokens of each word as it stands within a line: after a word and a space, in Japanese after nothing."""
    before = len(tokenizer.encode("a"))

    def pieces(word: str) -> list[int]:
        if KANA.match(word) or KANJI.match(word):
            return tokenizer.encode(word)
        return tokenizer.encode(f"a {word}")[before:]

    return {word: pieces(word) or [0] for word in set(words)}


def _returning(units: Sequence[T], counts: Callable[[T], bool] = lambda unit: True) -> float:
    """Share of `units` that count and stood before, the last time more than `LATELY` units ago."""
    last: dict[T, int] = {}
    found = 0
    for at, unit in enumerate(units):
        found += at - last.get(unit, at) > LATELY and counts(unit)
        last[unit] = at
    return _share(found, len(units))


def _japanese(text: str) -> float:
    letters = sum(map(str.isalpha, text))
    return min(1.0, _share(len(KANA.findall(text)) + len(KANJI.findall(text)), letters))


def _language(text: str, words: Sequence[str], japanese: float) -> str:
    """ "ja", "en" or "other". Kanji without kana are Chinese; English is known by its commonest words."""
    if japanese > 0.3:
        return "ja" if len(KANA.findall(text)) > 0.1 * len(KANJI.findall(text)) else "other"
    latin = [word.lower() for word in words if word.isascii() and word.isalpha()]
    common = _share(sum(word in ENGLISH for word in latin), len(latin))
    return "en" if common > 0.08 and len(latin) > 0.5 * len(words) else "other"
