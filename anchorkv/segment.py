"""A token stream becomes segments, streaming, with no lookahead.

The contract: whether a token ends its segment is decided when that token arrives, from the text up to and including it,
and is never revised. An EP anchor must know that it is one when its cell is computed, and generated text must be cut
like text that is read. So reading whole, in chunks or token by token gives the same segments, and replaying the same
tokens and the same forced ends gives the same state.

The price: where only the next word could tell, the segmenter guesses. What merely looks like an abbreviation or a list
number ("etc.", "he was 25.") does not end its sentence, so the next sentence joins it; "..." in three tokens ends at
its first dot; a closing quote or a line break that comes as a token of its own after an end begins the next segment.

The segment and its end token are AnLLM's (arXiv 2402.07616, section 3.2); the kind "period" is what its EP checkpoints
were trained with; the kind "separator" is SepLLM's (arXiv 2412.12094). The first half of this file judges text (pure
functions of the current line); the class at the end keeps the little that must be remembered between tokens.
"""

from __future__ import annotations

import codecs
import copy
import re
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import NamedTuple

from anchorkv.config import AnchorConfig

STOPS = frozenset(".．")
"""Terminators that also occur inside words and numbers."""

TERMINATORS = STOPS | frozenset("!?！？。｡‼⁇⁈⁉")
CLOSERS = frozenset("'\"”’»)]}）］｝」』】〉》〕*_`")
"""What may stand between a terminator and the end of its sentence; the last three close Markdown emphasis."""

WEAK = frozenset(",;:、，；：—…")
SEPARATORS = frozenset(".,?!;:\t\n。、，！？；：")
PERIOD = b"."
"""The only token that ends a segment of the kind "period", in numbers and abbreviations too: the paper's training went
by this one id, so " ." and "..." are no ends either."""

CJK = "\u2e80"
"""From here on characters are wide, and often several tokens each."""

PAIRS = dict(zip('([（［「『【〔《〈“„«"', ')]）］」』】〕》〉”“»"', strict=True))
MARKS = frozenset(PAIRS) | frozenset(PAIRS.values())

# --------------------------------------------------------------------------------------------- words before a full stop

TITLES = "Mr Mrs Ms Dr Prof Rev Hon Gen Col Capt Lt Sgt Maj Cmdr Gov Sen Rep Pres Jr Sr Messrs Mme Mlle"
PLACES = "St Mt Ft Ave Blvd Rd"
COMPANIES = "Inc Ltd Co Corp Bros"
DATES = "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thur Thurs Fri"
NUMBERED = "No Nos"
CAPITALISED = frozenset(" ".join((TITLES, PLACES, COMPANIES, DATES, NUMBERED)).split())
"""Only with a capital: "the sun rose in mar." may end, "on Mar." may not."""

LATIN = "vs etc eg ie cf al ca viz seq ibid approx"
REFERENCES = "fig figs eq eqs sec ch chap vol vols ed eds pp p ff dept"
ANY_CASE = frozenset(f"{LATIN} {REFERENCES}".split())

YEAR = re.compile(r"1\d{3}|20\d{2}")
INITIAL = re.compile(r"(?:.*[.-])?[A-Za-z]")
"""One letter, alone or after a full stop: "J", "J.-P", "U.S", and "e", which may become "e.g"."""

LABEL = re.compile(r"[A-Za-z]|[ivxIVX]{1,5}|\d{1,4}(?:\.\d{1,3})*")
ADDRESS = re.compile(r"://|^https?$|^www\b|[@/\\_={}<>#~|$]|::|\(\)")


def _last_word(text: str) -> str:
    words = text[-200:].split()
    return words[-1].lstrip("([{“\"'‘«*_`「『（【") if words and not text[-1].isspace() else ""


def is_abbreviation(word: str) -> bool:
    """Whether `word` is usually written with a full stop that does not end its sentence ("Dr", "e.g", "J")."""
    shape = word.capitalize() if word.isupper() else word
    return shape in CAPITALISED or word.lower() in ANY_CASE or INITIAL.fullmatch(word) is not None


def stop_ends(before: str, certain: bool) -> bool:
    """Whether a full stop after the line `before` ends a sentence.

    certain: a closing mark or a line break follows, so the stop is not a decimal point.
    """
    if before.rstrip(" ").endswith((".", "．", "…", "‥")):
        return False  # an ellipsis, also when it is spaced out
    word = _last_word(before)
    if not word:
        return bool(before.strip())  # " ." as tokenised corpora write it
    if before.strip() == word and LABEL.fullmatch(word):
        return False  # "2." or "a." opens a line: a list label
    if word[-1].isdigit():
        return certain or YEAR.fullmatch(word) is not None
    if word[-1] in CLOSERS:
        return ADDRESS.search(word.rstrip("*_`")) is None
    return not is_abbreviation(word) and ADDRESS.search(word) is None


def _core(line: str) -> tuple[str, bool]:
    """The line without closing marks and space at its end; and whether there were closing marks."""
    end = len(line.rstrip())
    start = end
    while start and line[start - 1] in CLOSERS:
        start -= 1
    return line[:start], start < end


def in_passing(line: str, at: int) -> bool:
    """Whether the bracket that closes right after the stop before `at` was opened within a sentence: what stands in it,
    such as a contract's （以下「本件」という。）, is said in passing, and the sentence goes on."""
    if line[at] not in ")）":
        return False
    opened, depth = at, 0
    while opened >= 0:
        depth += (line[opened] in ")）") - (line[opened] in "(（")
        if not depth:
            break
        opened -= 1
    before = line[: max(0, opened)].rstrip()
    return bool(before) and before[-1] not in TERMINATORS and before[-1] not in CLOSERS


def sentence_ends(line: str, line_break: bool = False) -> bool:
    """Whether the text of `line`, as far as it was read, ends with the end of a sentence. Ignores what is open."""
    core, closed = _core(line)
    if not core or core[-1] not in TERMINATORS or line.endswith("__") or looks_like_code(line):
        return False
    if closed and in_passing(line, len(core)):
        return False
    if core[-1] in STOPS:
        return stop_ends(core[:-1], closed or line_break)
    return not core[-1].isascii() or ADDRESS.search(_last_word(core[:-1])) is None


def clause_ends(line: str) -> bool:
    """Whether `line` ends at a place to cut when the segment is nearly full: a comma, a colon, a dash, an ellipsis."""
    core, closed = _core(line)
    if core.endswith(("--", "...")):
        return True
    if not core or core[-1] not in WEAK:
        return False
    word = _last_word(core[:-1])
    return closed or not word or not ((word[-1].isdigit() and core[-1] in ",:") or ADDRESS.search(word))


# ---------------------------------------------------------------------------------------------------------------- lines

NARROW, WIDE = 40, 100
"""Columns. Prose is hard-wrapped between the two: a shorter or a longer line ends where its author ended it."""

STRUCTURE = re.compile(
    r"""\s*(?: \#{1,6}\s                                                       # heading
        | [-*+•‣◦●○■□▪]\s | ・ | [①-⑳] | \(?\d{1,3}[.)]\s | \(?[A-Za-z]\)\s   # list item
        | [-=*_~]{3,}\s*$                                                     # rule
        | [A-Z][\w.-]{0,20}(?:\ [A-Z][\w.-]{0,20})?:\s                        # "Name: what is said"
        | \| | .*\S(?:\s*[|\t] | \ {3,}\S) )                                 # table row""",
    re.VERBOSE,
)
CODE = re.compile(
    r"""\s*(?: def\s\w+\( | class\s\w+[(:] | from\s\S+\simport\s | import\s[\w.]+\s*$ | \#include | \#! | // | /\*
        | >>>\s | @\w+\s*$ | (?:const|let|var)\s\w+\s= | (?:func|fn)\s\w+ | [\w.\[\]]+\s[-+*/:]?=\s )
    | .*(?: \s(?: == | != | := | => | -> | \+= | -= | && | \|\| )\s | [\w\])]\(.*\)\s*[;:{]$ | [{}]$ )
    | (?:\ {4,}|\t)\s*[!-~]+$                                  # one indented word: "    self." goes on""",
    re.VERBOSE,
)
CODE_LENGTH = 160
"""A longer line is taken for prose; this also bounds what a match can cost."""
FENCES = ("```", "~~~")


def looks_like_code(line: str) -> bool:
    return len(line) <= CODE_LENGTH and CODE.match(line) is not None


def is_fence(line: str) -> bool:
    """Whether `line` opens or closes a fenced code block."""
    start = line.lstrip()[:3]
    return start in FENCES and line.count(start) == 1


def _columns(line: str) -> int:
    return len(line) + sum(char >= CJK for char in line)


def line_stands_alone(line: str) -> bool:
    """Whether a line break after `line` is an end by itself: not a hard wrap inside a paragraph."""
    body = line.rstrip()
    return (
        not NARROW < _columns(body) <= WIDE
        or body.endswith((":", "："))
        or body.isupper()
        or STRUCTURE.match(body) is not None
        or looks_like_code(body)
    )


class Break(IntEnum):
    """What the last line break meant, while nothing but space has followed it."""

    NONE = 0
    SENTENCE = 1
    """The line ended with its sentence; the end counts unless a quote or bracket is open."""
    LINE = 2
    BLANK = 3


def judge_line(line: str, fenced: bool) -> Break:
    """What the line break after `line` means."""
    if not line.strip():
        return Break.BLANK
    if fenced or line_stands_alone(line):
        return Break.LINE
    return Break.SENTENCE if sentence_ends(line, line_break=True) else Break.NONE


def follow_mark(open_marks: str, mark: str, previous: str) -> str:
    """The closing marks that are awaited after `mark`, innermost last. A mark that closes nothing is ignored.

    A straight quote closes one that is open, and opens one only where a word could begin, so that the quote that
    closes an earlier segment's speech, or an inch sign, does not open a new one.
    """
    if mark in open_marks:
        return open_marks[: open_marks.rindex(mark)]
    if mark == '"' and (previous in _BEFORE_CLOSING or (previous.isalnum() and previous < CJK)):
        return open_marks
    return open_marks + PAIRS.get(mark, "")


_BEFORE_CLOSING = (TERMINATORS | CLOSERS | WEAK) - frozenset(':—"*_`')

# ---------------------------------------------------------------------------------------------------------------- state

_LINE_KEPT = 384


class _Piece(NamedTuple):
    data: bytes
    text: str
    """The text when the bytes are whole characters, else empty."""
    plain: bool
    """Whether the token can neither end a segment by its text nor change what is open."""


class Segmenter:
    """Cuts a token stream into segments as the module says; `config` chooses the kind and the limits.

    piece: the bytes of a token (`Tokenizer.piece`); they need not be whole characters.
    Copies share `piece` and a cache of its answers, and nothing else.
    """

    def __init__(self, config: AnchorConfig, piece: Callable[[int], bytes]) -> None:
        self._kind = config.segments
        self._min = config.min_segment
        self._max = config.max_segment
        self._piece = piece
        self._pieces: dict[int, _Piece] = {}
        self.at_separator = False
        """Whether the token pushed last ended with a separator (kind "separator" only)."""
        self._forget_text()

    @property
    def length(self) -> int:
        """Tokens in the segment that is being read; 0 right after an end."""
        return self._length

    @property
    def state(self) -> tuple[int, bytes, str, str, Break, bool, bool]:
        """Everything that future decisions depend on besides the configuration."""
        return self._length, self._pending, self._line, self._open, self._break, self._fenced, self._content

    def push(self, token: int) -> bool:
        """Read `token`. True when it ends its segment."""
        self._length += 1
        self.at_separator = False
        ended = self._length >= self._max
        if self._kind == "period":
            ended = ended or (self._length >= self._min and self._piece(token) == PERIOD)
        elif self._kind != "fixed":
            known = self._pieces.get(token)
            if known is None:
                known = self._pieces[token] = _classify(self._piece(token))
            if known.plain and not self._pending:
                self._line += known.text
                self._break = Break.NONE
                self._content = True
                if len(self._line) > _LINE_KEPT:
                    self._shorten_line()
            else:
                parts = bool(self._pending)
                text = self._decode(known)
                self._read(text)
                self.at_separator = self._kind == "separator" and text[-1:] in SEPARATORS and not self._pending
                ended = ended or self._text_ends(text, parts)
        if ended:
            self._begin()
        return ended

    def end(self) -> None:
        """The caller ends the segment here: a turn, a pinned span or a document ends. What follows is a new text."""
        self._forget_text()

    def copy(self) -> Segmenter:
        """An independent segmenter in the same state."""
        return copy.copy(self)  # every value is immutable but the cache, which is shared

    def __deepcopy__(self, memo: object) -> Segmenter:
        return self.copy()  # never copies the tokenizer behind `piece`

    def _begin(self) -> None:
        self._length = 0
        self._open = ""  # closing marks that are awaited, innermost last
        self._content = False  # whether the segment has anything but space, terminators and closing marks

    def _forget_text(self) -> None:
        self._begin()
        self._pending = b""  # the first bytes of a character that is not complete
        self._line = ""
        self._break = Break.NONE
        self._fenced = False

    def _shorten_line(self) -> None:
        """Keep both ends of a very long line: what it is, and how it goes on."""
        self._line = self._line[: _LINE_KEPT // 3] + self._line[-_LINE_KEPT // 2 :]

    def _decode(self, piece: _Piece) -> str:
        if piece.text and not self._pending:
            return piece.text
        data = self._pending + piece.data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def _read(self, text: str) -> None:
        for char in text:
            if char == "\n":
                self._break_line()
                continue
            if char in MARKS and not self._fenced:
                self._open = follow_mark(self._open, char, self._line[-1:])
            self._line += char
            if not char.isspace():
                self._break = Break.NONE
                self._content = self._content or (char not in TERMINATORS and char not in CLOSERS)
        if len(self._line) > _LINE_KEPT:
            self._shorten_line()

    def _break_line(self) -> None:
        fence = is_fence(self._line)
        self._break = judge_line(self._line, self._fenced or fence)
        self._fenced ^= fence
        self._line = ""
        if self._break >= Break.LINE:
            self._open = ""

    def _text_ends(self, text: str, parts: bool) -> bool:
        """Whether the segment may end after the token that brought `text`; parts: it completed a character."""
        if self._length < self._min or self._pending:
            return False
        if (parts or text[-1:] >= CJK) and self._length > self._max - 3:
            return True  # the next character may be three tokens: a forced cut would split it
        if self._kind == "separator":
            return self.at_separator
        if not self._content:
            return False
        if self._break >= Break.LINE:
            return True
        if 4 * self._length > 3 * self._max and (not self._line.strip() or clause_ends(self._line)):
            return True
        if self._fenced or (self._open and 2 * self._length <= self._max):
            return False
        return self._break == Break.SENTENCE or sentence_ends(self._line)


def _classify(data: bytes) -> _Piece:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return _Piece(data, "", False)
    last = text.rstrip()[-1:]
    ending = last in _ENDINGS or last >= CJK or text[-1:] in SEPARATORS
    return _Piece(data, text, not ending and "\n" not in text and MARKS.isdisjoint(text))


_ENDINGS = TERMINATORS | CLOSERS | WEAK | {"", "-"}


def split(tokens: Iterable[int], config: AnchorConfig, piece: Callable[[int], bytes]) -> list[list[int]]:
    """`tokens` cut into segments; the last one may be unfinished."""
    segmenter = Segmenter(config, piece)
    segments: list[list[int]] = []
    for token in tokens:
        if segmenter.length == 0:
            segments.append([])
        segments[-1].append(token)
        segmenter.push(token)
    return segments
