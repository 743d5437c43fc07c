"""Questions that the user brings, each with its document and the place of its answer: JSON lines, JSON, YAML or CSV.

A row has `question`, `answer` or `answers` (accepted ones), and `document` (id, path or name), which may be left out
where an answer stands in one document alone.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from anchorkv.errors import DataError, DocumentError
from anchorkv.evaluate.metrics import contains, tokens
from anchorkv.optional import library
from anchorkv.poc.documents import Source
from anchorkv.poc.sentences import sentence_at
from anchorkv.textencoding import decode_bytes

KINDS = (".jsonl", ".json", ".yaml", ".yml", ".csv")
SHOWN = 5
"""Bad rows that the sentence about them names."""
Row = tuple[int, Any]
"""Line of the file, and what stands there; a _Bad where it cannot be read."""


@dataclass(frozen=True)
class Question:
    """One question on a document."""

    document: str
    """Id of its Source."""
    text: str
    answers: tuple[str, ...]
    """Accepted ones, the first as it is written in the text where it stands there."""
    passage: str
    """The sentence of the text with the answer; "" where the answer stands in it in other words only."""
    own: bool
    """The user's own, not made from the text."""
    lead: str = ""
    """What an answer says before the gold one."""


@dataclass(frozen=True)
class BadRow:
    """A row that asks nothing that could be measured; key and values as in results.Remark."""

    line: int
    reason: str
    key: str
    values: dict[str, str]


class _Bad(ValueError):
    """What is wrong with a row, as in BadRow."""

    def __init__(self, reason: str, key: str, **values: str) -> None:
        super().__init__(reason)
        self.key, self.values = key, values


def own_questions(path: Path, sources: Sequence[Source], *, bad: list[BadRow] | None = None) -> list[Question]:
    """The questions of the file `path`. bad: where bad rows are noted, which are passed over.

    Without `bad`, bad rows raise DataError, one sentence that names them; a file that is missing, unreadable or has no
    good row raises it always.
    """
    wrong: list[BadRow] = []
    found: list[Question] = []
    for line, row in _rows(path):
        try:
            found.append(_question(row, sources))
        except _Bad as error:
            wrong.append(BadRow(line, str(error), error.key, error.values))
    if wrong and bad is None:
        named = "; ".join(f"line {row.line}: {row.reason}" for row in wrong[:SHOWN])
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        rows = "1 bad question" if len(wrong) == 1 else f"{len(wrong)} bad questions"
        raise DataError(f"{path} has {rows} ({named}{more}); mend them, or go on without (--skip-bad-rows).")
    if not found:
        why = f": line {wrong[0].line}: {wrong[0].reason}" if wrong else ""
        raise DataError(f"{path} has no usable question{why}; give question, answer and document in every row.")
    if bad is not None:
        bad += wrong
    return found


def _question(row: Any, sources: Sequence[Source]) -> Question:
    """Raises _Bad saying what is wrong with `row`."""
    if isinstance(row, _Bad):
        raise row
    if not isinstance(row, dict):
        raise _Bad("it is no row of question, answer and document", "no_row")
    text, answers = str(row.get("question") or "").strip(), _answers(row)
    if not text:
        raise _Bad("it has no question", "no_question")
    if not answers:
        raise _Bad("it has no answer", "no_answer")
    source = _document(str(row.get("document") or "").strip(), answers, sources)
    place = _place(source.text, answers, text)
    if place is None and not contains(source.text, answers):
        raise _Bad(f"its answer does not stand in {source.id}", "not_there", path=source.id)
    passage = sentence_at(source.text, *place) if place else ""
    return Question(source.id, text, answers, passage, own=True)


def _answers(row: dict[str, Any]) -> tuple[str, ...]:
    given = row.get("answers", row.get("answer"))
    several = given if isinstance(given, list) else [given]
    return tuple(dict.fromkeys(str(answer).strip() for answer in several if answer is not None and str(answer).strip()))


# --- which document ------------------------------------------------------------------------------------------------


def _document(name: str, answers: Sequence[str], sources: Sequence[Source]) -> Source:
    """Raises _Bad where none, or more than one, is meant."""
    if not name:
        found = [source for source in sources if _place(source.text, answers, "") is not None]
        if len(found) == 1:
            return found[0]
        if not found:
            raise _Bad("it names no document, and its answer stands in none", "in_none")
        several = str(len(found))
        raise _Bad(f"it names no document, and its answer stands in {several} of them", "in_several", n=several)
    for names in (_exact, _loose):
        found = [source for source in sources if name in names(source) or name.lower() in names(source)]
        if len(found) == 1:
            return found[0]
        if found:
            several = str(len(found))
            raise _Bad(
                f"there are {several} documents '{name}', so name it with its folder", "same_name", n=several, path=name
            )
    raise _Bad(f"there is no document '{name}'", "no_document", path=name)


def _exact(source: Source) -> set[str]:
    return {source.id, source.path}


def _loose(source: Source) -> set[str]:
    path = PurePosixPath(source.path.lower())
    return {source.id.lower(), str(path), path.name, path.stem, source.title.lower()}


def _place(text: str, answers: Sequence[str], question: str) -> tuple[int, int] | None:
    """Where an accepted answer stands word for word; of several places the one whose surroundings share most words with
    the question."""
    asked = set(tokens(question))
    for answer in answers:
        places = [(found.start(), found.end()) for found in _pattern(answer).finditer(text)]
        if places:
            return max(places, key=lambda at: len(asked & set(tokens(text[max(0, at[0] - 200) : at[1] + 200]))))
    return None


def _pattern(answer: str) -> re.Pattern[str]:
    """`answer` whatever its case and its spaces. Whole words only where it is written with spaces between them."""
    words = r"\s+".join(map(re.escape, answer.split()))
    before = r"(?<![A-Za-z0-9])" if answer[0].isascii() and answer[0].isalnum() else ""
    after = r"(?![A-Za-z0-9])" if answer[-1].isascii() and answer[-1].isalnum() else ""
    return re.compile(f"{before}{words}{after}", re.IGNORECASE)


# --- files ---------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[Row]:
    """Raises DataError when the file is missing or no such file."""
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise DataError(f"{path} is no file of questions; give {', '.join(KINDS[:-1])} or {KINDS[-1]}.")
    try:
        text = decode_bytes(path.read_bytes(), str(path)).removeprefix("\ufeff")
    except FileNotFoundError:
        raise DataError(f"There is no file of questions at {path}; check the path.") from None
    except (OSError, DocumentError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise DataError(f"The questions in {path} cannot be read ({why}); save them as UTF-8 text.") from None
    if kind == ".csv":
        return _csv(text, path)
    if kind == ".json" and text.lstrip().startswith("["):
        return _json(text, path)
    return _lines(text) if kind in (".jsonl", ".json") else _yaml(text, path)


def _lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, _Bad("it is no JSON", "no_json")


def _json(text: str, path: Path) -> Iterator[Row]:
    """The rows of one list, each with the line that it begins in."""
    space, decoder = re.compile(r"[\s,]*"), json.JSONDecoder()
    at = text.index("[") + 1
    while True:
        at = space.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            return
        line = text.count("\n", 0, at) + 1
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            raise DataError(f"{path} is no JSON from line {line} on; mend it there.") from None
        yield line, row


def _yaml(text: str, path: Path) -> Iterator[Row]:
    yaml = library("yaml", "questions")
    try:
        nodes, rows = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise DataError(f"{path}{f':{mark.line + 1}' if mark else ''} is not YAML; mend it there.") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} is no list of questions; begin every one with `- question:`.")
    for node, row in zip(nodes.value, rows, strict=True):
        yield node.start_mark.line + 1, row


def _csv(text: str, path: Path) -> Iterator[Row]:
    """Columns `question`, `answer` and `document`; further columns `answer…` are further accepted answers."""
    head = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
    names: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{line} is no CSV ({error}); mend it there.") from None
        if cells is None:
            return
        if not names:
            names = [cell.strip().lower() for cell in cells]
            if "question" not in names or not any(name.startswith("answer") for name in names):
                raise DataError(f"{path} has no columns question and answer; name them in its first line.")
            continue
        if any(cell.strip() for cell in cells):
            given = dict(zip(names, cells, strict=False))
            answers = [cell for name, cell in zip(names, cells, strict=False) if name.startswith("answer")]
            yield line, {**given, "answers": answers}
