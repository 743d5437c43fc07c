"""Cloze questions on the facts of a document, for those who bring no questions: what follows in this sentence?

A fact is a date, an amount, a number with its unit, a code or a name that occurs once in the text, behind enough words
to tell the place by. The answer begins with those words (`Question.lead`): of the forms that were tried, the built-in
model with its full cache, which alone was looked at, finds most facts so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from anchorkv.evaluate.run import seed_of
from anchorkv.poc.documents import Source
from anchorkv.poc.questions import Question
from anchorkv.poc.sentences import JAPANESE, sentences

FORM = 'Complete the sentence as it stands in the text: "{lead} …"'
FORM_JA = "本文の文を引用してください。{lead}"
LEAD_WORDS, LEAD_CHARACTERS = (5, 18), (8, 40)
"""At least, and at most, before the fact: in words, or in characters of Japanese."""
LONGEST = 600
"""Characters of a sentence; what is longer is a table or a list without ends."""

_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
_NUMBER = r"\d+(?:[.,:/-]\d+)*"
_NO_UNIT = "(?:an?|and|as|at|but|by|for|from|if|in|is|it|may|of|on|or|than|that|the|to|was|were|when|which|will|with)"
_WORDED = (
    "(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty|sixty|ninety)"
)
FACTS = re.compile(
    rf"""
    (?P<date> {_MONTH}\ \d{{1,2}}(?:[–-]\d{{1,2}})?(?:,?\ \d{{4}})? | \d{{1,2}}\ {_MONTH}(?:\ \d{{4}})?
              | {_MONTH}\ \d{{4}} | \d{{4}}-\d{{2}}-\d{{2}} )
  | (?P<amount> (?:[$€£¥]|(?:USD|EUR|GBP|JPY)\ ){_NUMBER}(?:\ (?:thousand|[mb]illion|trillion))? )
  | (?P<number> {_NUMBER}(?:\ ?%|\ (?!{_NO_UNIT}\b)[a-z]{{2,}}|[a-zA-Z]{{1,3}}\b)? )
  | (?P<code> (?=[A-Za-z0-9_-]*\d)(?=[A-Za-z0-9_-]*[A-Z])[A-Za-z0-9]+(?:[-_][A-Za-z0-9]+)* | [A-Z]{{2,}}(?:_[A-Z]+)+ )
  | (?P<worded> \b{_WORDED}\ [a-z]{{3,}} )
  | (?P<name> [A-Z][a-z]+(?:\ (?:[A-Z]\.|(?:of|de|van|the)\ [A-Z][a-z]+|[A-Z][a-z]+))+ )
  | (?P<term> (?<=[`"“])[\w.:/-]{{3,30}}(?=[`"”]) | \b[a-z]+[A-Z][A-Za-z]+\b )
  | (?P<word> (?<=[a-z,]\ )[A-Z][a-z]{{3,}}\b | \b[a-z]{{6,}}(?=[.;:]\s*$) )
    """,
    re.VERBOSE,
)
_DIGITS = r"[0-9０-９]+(?:[.,．，:：][0-9０-９]+)*"
_KANJI_NUMBER = r"[〇一二三四五六七八九十百千万億]+"
_UNIT_JA = (
    "(?:時間|週間|か月|ヶ月|カ月|ケ月|か所|箇所|種類|営業日|[日年月泊](?:間|目)?|分|秒|人|名|件|回|個|台|枚|本|歳|割|倍|条|項|号|章|階|番|点|"
    "％|%|度|株|社|通|部|冊|ページ|[a-zA-Zａ-ｚＡ-Ｚ]{1,3}|[ァ-ヶー]{2,6})(?:以内|以上|以下|以降|未満|前|後)?"
)
FACTS_JA = re.compile(
    rf"""
    (?P<date> (?:令和|平成|昭和)?(?:元|{_DIGITS})年(?:{_DIGITS}月(?:{_DIGITS}日)?) | {_DIGITS}月{_DIGITS}日
              | (?:令和|平成|昭和)(?:元|{_DIGITS})年 )
  | (?P<amount> [¥￥]{_DIGITS} | (?:{_DIGITS}|{_KANJI_NUMBER})[千万億]?円 )
  | (?P<code> (?=[A-Za-zＡ-Ｚａ-ｚ0-9_-]*[0-9])(?=[A-Za-zＡ-Ｚａ-ｚ0-9_-]*[A-ZＡ-Ｚ])[A-Za-zＡ-Ｚａ-ｚ0-9_-]{{3,}} )
  | (?P<number> 第?{_DIGITS}{_UNIT_JA}? | 第?{_KANJI_NUMBER}{_UNIT_JA} )
  | (?P<name> [ァ-ヶー]{{4,}}(?:・[ァ-ヶー]+)* | [A-Z][A-Za-z]{{3,}} )
  | (?P<term> (?:(?!第)[\u4e00-\u9fff]){{4,10}} | (?<=[「『])[^「」『』]{{2,20}}(?=[」』]) )
    """,
    re.VERBOSE,
)
KINDS = ("amount", "date", "number", "code", "worded", "name", "term", "word")
"""What is asked for, the surest first: a name may be guessed, an amount hardly."""
_START = re.compile(r"\s*(?:#{1,6}\s+|[-*+•‣・]\s+|\(?(?:\d{1,3}|[A-Za-z]|[ivx]{1,4})[.)]\s+)?")
"""What precedes a sentence in its line: a heading's mark, a list's label."""
_NOT_PROSE = re.compile(r"[|\t]|https?://| {3,}\S|(?:\. ?){4,}")
_OPENING = " `\"“([「『（*_"
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Fact:
    """A fact and the words that lead to it. at: characters of the text before it."""

    at: int
    kind: str
    answer: str
    lead: str
    sentence: str
    japanese: bool


def cloze(source: Source, count: int, seed: int = 0) -> list[Question]:
    """Up to `count` questions on facts of `source`, spread over its text; the same for the same text and seed.

    The text is cut into as many stretches as there are questions; each gives the best fact that it has, and those
    without are made up for by the others.
    """
    if count < 1:
        return []
    facts = list(_facts(source.text))
    stretches: list[list[Fact]] = [[] for _ in range(count)]
    for fact in facts:
        stretches[fact.at * count // max(1, len(source.text))].append(fact)
    for stretch in stretches:
        stretch.sort(key=lambda fact: (KINDS.index(fact.kind), seed_of(seed, source.id, fact.at)))
    chosen: list[Fact] = []
    for turn in zip_longest(*stretches):  # the best of each stretch, then the next best
        for fact in filter(None, turn):
            if len(chosen) < count and all(fact.sentence != other.sentence for other in chosen):
                chosen.append(fact)
    return [_question(source, fact) for fact in sorted(chosen, key=lambda fact: fact.at)]


def _question(source: Source, fact: Fact) -> Question:
    form = FORM_JA if fact.japanese else FORM
    return Question(
        document=source.id, text=form.format(lead=fact.lead), answers=_accepted(fact), passage=fact.sentence.strip(),
        own=False, lead=fact.lead,
    )


def _accepted(fact: Fact) -> tuple[str, ...]:
    """The fact as it stands there, without its space, and a number of two digits or more without its unit."""
    answers = [fact.answer, fact.answer.replace(" ", "")] if fact.kind != "name" else [fact.answer]
    digits = re.match(_DIGITS, fact.answer)
    if fact.kind == "number" and digits and len(digits[0]) > 1:
        answers.append(digits[0])
    return tuple(dict.fromkeys(answers))


# --- facts ---------------------------------------------------------------------------------------------------------


def _facts(text: str) -> Iterator[Fact]:
    """Every fact that can be asked for: once in the text, well led to, and with a lead that is found once too."""
    at = 0
    for sentence in sentences(text):
        if len(sentence) <= LONGEST and not _NOT_PROSE.search(sentence.strip()):
            yield from _of_sentence(text, sentence, at)
        at += len(sentence)


def _of_sentence(text: str, sentence: str, at: int) -> Iterator[Fact]:
    japanese = JAPANESE.search(sentence) is not None
    start = _START.match(sentence).end()  # type: ignore[union-attr]
    for found in (FACTS_JA if japanese else FACTS).finditer(sentence, start):
        answer, kind = found[0].strip(), str(found.lastgroup)
        before = sentence[start : found.start()]
        lead = _lead(before, japanese).rstrip(_OPENING)
        if not lead or not _asks(answer, kind, before, japanese):
            continue
        if _occurrences(text, answer, kind) == 1 and text.count(lead) == 1:
            yield Fact(at + found.start(), kind, answer, " ".join(lead.split()), sentence, japanese)


def _lead(before: str, japanese: bool) -> str:
    """What is quoted before the fact: its nearest words, enough of them; "" where there are too few."""
    if japanese:
        if len(before.strip()) < LEAD_CHARACTERS[0]:
            return ""
        if len(before) <= LEAD_CHARACTERS[1]:
            return before.lstrip()
        near = before[-LEAD_CHARACTERS[1] :]
        clause = near.find("、") + 1
        return near[clause:] if clause and len(near) - clause >= LEAD_CHARACTERS[0] else near
    words = [word.start() for word in _WORD.finditer(before)]
    if len(words) < LEAD_WORDS[0]:
        return ""
    return before[words[-min(len(words), LEAD_WORDS[1])] :].rstrip()


def _asks(answer: str, kind: str, before: str, japanese: bool) -> bool:
    """Whether a fact is worth asking for here: not half of another, not a label, not named in the words before it."""
    if before and (before[-1].isdigit() or before[-1] in ".-/–" or (before[-1].isalpha() and answer[0].isascii()
                                                                   and not japanese)):
        return False
    if kind == "number" and not japanese and answer.isdigit() and len(answer) < 2:
        return False
    return answer.lower() not in before.lower()


def _occurrences(text: str, answer: str, kind: str) -> int:
    """Whatever its case, but for terms: `Failure` is not a failure."""
    ends = [r"(?<![A-Za-z0-9])" if answer[0].isascii() and answer[0].isalnum() else "",
            r"(?![A-Za-z0-9])" if answer[-1].isascii() and answer[-1].isalnum() else ""]
    return len(re.findall(ends[0] + re.escape(answer) + ends[1], text, 0 if kind == "term" else re.IGNORECASE))
