"""A token stream becomes segments, streaming, with no lookahead.

The contract: whether a token ends its segment is decided when that token arrives, from the text up to and including it,
and is never revised. An EP anchor must know that it is one when its cell is computed, and generated text must be cut
like text that is read. So reading whole, in chunks or token by token gives the same segments, and replaying the same
tokens and the same forced ends gives the same state.

The price: where only the next word could tell, the segmenter guesses. A word that merely looks like an abbreviation or a
list number ("etc.", "he was 25.") does not end its sentence, so the next sentence joins it; "..." typed as three tokens
ends at its first dot; a closing quote or a line break that follows an end as a token of its own begins the next segment.
Ends passed over cost a longer segment, never a lost token.

The segment and its end token are AnLLM's (arXiv 2402.07616, section 3.2); the kind "separator" is SepLLM's
(arXiv 2412.12094). The first half of this file judges text (pure functions of the current line); the class at the end
keeps the little that must be remembered between tokens.
"""

from __future__ import annotations

import codecs
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

PAIRS = {"「": "」", "『": "』", "（": "）", "(": ")", "[": "]", "［": "］", "【": "】", "〔": "〕", "《": "》", "〈": "〉",
         "“": "”", "„": "“", "«": "»", '"': '"'}  # fmt: skip
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
INITIAL = re.compile(r"(?:.*[.-])?[A-Z]|.*[.．][a-z]")
"""One capital ("J", "J.-P") or a letter after a full stop ("U.S", "e.g", "p.m")."""

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


def sentence_ends(line: str, line_break: bool = False) -> bool:
    """Whether the text of `line`, as far as it was read, ends with the end of a sentence. Ignores what is open."""
    core, closed = _core(line)
    if not core or core[-1] not in TERMINATORS or looks_like_code(line):
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
    return closed or not word or not (word[-1].isdigit() and core[-1] in ",:" or ADDRESS.search(word))


# ---------------------------------------------------------------------------------------------------------------- lines

NARROW, WIDE = 40, 100
"""Columns. Prose is hard-wrapped between the two: a shorter or a longer line ends where its author ended it."""

STRUCTURE = re.compile(
    r"""\s*(?:\#{1,6}\s                                         # heading
        | [-*+•‣◦●○■□▪]\s | ・ | \(?\d{1,3}[.)]\s | \(?[A-Za-z]\)\s | [①-⑳]   # list item
        | [-=*_~]{3,}\s*$                                       # rule
        | [A-Z][\w.-]{0,20}(?:\ [A-Z][\w.-]{0,20})?:\s)         # "Name: what is said"
        | .*\S(?:\s*[|\t]|[ ]{3,}\S) | \s*\|                    # table row""",
    re.VERBOSE,
)
CODE = re.compile(
    r"""\s*(?:def\s\w+\( | class\s\w+[(:] | from\s\S+\simport\s | import\s[\w.]+\s*$ | \#include | \#! | // | /\* | \*/
        | >>>\s | @\w+\s*$ | (?:const|let|var)\s\w+\s= | (?:func|fn)\s\w+ | [\w.\[\]]+\s[-+*/:]?=\s)
        | .*(?:\s(?:==|!=|:=|=>|->|\+=|-=|&&|\|\|)\s | [\w\])]\(.*\)\s*[;:{]$ | \w\(\)[;:.]? $ | [{}]$ | [\])"'\w];$(?<==.*))
        | (?:\ {4,}|\t)\s*\S+$                                  # one indented word: "    self." goes on
    """.replace(r" | [\])\"'\w];$(?<==.*)", ""),
    re.VERBOSE,
)
FENCES = ("```", "~~~")
