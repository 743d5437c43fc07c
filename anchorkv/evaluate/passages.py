"""Questions about passages (SQuAD, DROP, CoQA, JSQuAD, QMSum, a user's own), and passages hidden among others.

Which questions are asked, which passages surround theirs and in what order follows from the seed and their own text
alone, never from results: more questions extend fewer ones, and twenty other passages begin with the same nine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from anchorkv.errors import DataError
from anchorkv.evaluate.metrics import contains
from anchorkv.evaluate.rows import Row, Rows, find
from anchorkv.evaluate.run import seed_of

SETS = {
    "squad": "squad/squad_v1.test.jsonl",  # Rajpurkar et al., arXiv 1606.05250
    "drop": "squad/drop.test.jsonl",  # Dua et al., arXiv 1903.00161
    "coqa": "squad/coqa.test.jsonl",  # Reddy et al., arXiv 1808.07042
    "jsquad": "ja/jsquad.validation.jsonl",  # Kurihara et al. 2022, JGLUE
    "qmsum": "long/qmsum.test.jsonl",  # Zhong et al., arXiv 2104.05938
}
"""name -> file in the data folder, plain or as .gz."""
SEPARATOR = "\n\n"
"""Between passages."""


@dataclass(frozen=True)
class Question:
    """One question, the passage that answers it, and the answers that are accepted."""

    id: str
    context: str
    text: str
    """With the earlier turns of a conversation before it."""
    answers: tuple[str, ...]


@dataclass(frozen=True)
class QuestionSet:
    """All questions of one file, in its order. `bad`: what was wrong with the rows passed over."""

    name: str
    questions: list[Question]
    digest: str
    """Of the file's bytes."""
    bad: list[str] = field(default_factory=list)

    def chosen(self, limit: int, seed: int = 0) -> list[Question]:
        """The first `limit` questions of a seeded shuffle; all of them where there are fewer."""
        return sorted(self.questions, key=lambda question: seed_of(seed, self.name, question.id))[:limit]

    def hidden(self, question: Question, passages: int, seed: int = 0) -> str:
        """The passage of `question` at a seeded place among passages - 1 others of the set.

        Passages that hold an accepted answer too are the last to be taken. Raises DataError when the set has fewer
        different passages.
        """
        others = {other.context for other in self.questions} - {question.context}
        if len(others) < passages - 1:
            raise DataError(
                f"{self.name} has {len(others) + 1} different passages, too few for {passages}; ask for fewer passages."
            )
        texts = self._first(passages - 1, others, question, seed)
        texts.insert(seed_of(seed, self.name, question.id, passages) % passages, question.context)
        return SEPARATOR.join(texts)

    def _first(self, count: int, others: set[str], question: Question, seed: int) -> list[str]:
        taken: list[str] = []
        last: list[str] = []
        for text in sorted(others, key=lambda text: (seed_of(seed, question.id, text), text)) if count else []:
            if len(taken) == count:
                break
            (last if contains(text, question.answers) else taken).append(text)
        return (taken + last)[:count]


def question_set(name: str, data: Path, skip_bad: bool = False) -> QuestionSet:
    """The set called `name` (see SETS) out of the folder `data`.

    Raises DataError for an unknown name, a missing or damaged file, and at the first bad row unless it is to be passed
    over.
    """
    if name not in SETS:
        raise DataError(f"There is no question set '{name}'; choose among {', '.join(SETS)}, or give files.")
    path = find(data, SETS[name])
    return _meetings(name, path, skip_bad) if name == "qmsum" else question_file(path, skip_bad, name)


def question_file(path: Path, skip_bad: bool = False, name: str | None = None) -> QuestionSet:
    """A jsonl file (plain or .gz) with context, question, answers (list of accepted strings) and, where there are
    some, id and history (list of earlier [question, answer]).

    name: None takes the file's own. Raises DataError as `question_set` does.
    """
    rows = Rows(path, {"context": str, "question": str, "answers": list}, skip_bad, check=_wrong_question)
    name = name or path.name.removesuffix(".gz").removesuffix(".jsonl")
    return _set(name, rows, lambda row: iter([_question(row)]))


def _meetings(name: str, path: Path, skip_bad: bool) -> QuestionSet:
    """QMSum: every query of a meeting is a question, its reference summary the answer."""
    rows = Rows(path, {"text": str, "queries": list}, skip_bad, check=_wrong_meeting)
    return _set(name, rows, _queries)


def _set(name: str, rows: Rows, questions: Callable[[Row], Iterator[Question]]) -> QuestionSet:
    found: dict[str, Question] = {}
    for row in rows:
        for question in questions(row):
            # What stands twice in a file is asked once; ids that say the same of different questions are told apart.
            if found.setdefault(question.id, question) != question:
                other = replace(question, id=f"{question.id}#{_short(repr(question))}")
                found.setdefault(other.id, other)
    digest = hashlib.sha256(rows.path.read_bytes()).hexdigest()[:16]
    return QuestionSet(name, list(found.values()), digest, rows.bad)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _question(row: Row) -> Question:
    turns = [f"{asked}\nAnswer: {answer}\nQuestion: " for asked, answer in row.get("history") or []]
    text = "".join([*turns, row["question"]])
    number = row.get("id") or _short(repr((row["context"], text)))
    return Question(str(number), row["context"], text, tuple(row["answers"]))


def _queries(row: Row) -> Iterator[Question]:
    number = row.get("id") or _short(row["text"])
    for index, query in enumerate(row["queries"]):
        yield Question(f"{number}/{index}", row["text"], query["query"], (query["answer"],))


def _wrong_question(row: Row) -> str:
    if not all(_is_text(answer) for answer in row["answers"]):
        return "the field 'answers' has an answer that is no text or empty"
    if not row["context"].strip() or not row["question"].strip():
        return "the context or the question is blank"
    history = row.get("history") or []
    pairs = isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn) for turn in history
    )
    return "" if pairs else "the field 'history' is no list of [question, answer]"


def _wrong_meeting(row: Row) -> str:
    fit = all(
        isinstance(query, dict) and _is_text(query.get("query")) and _is_text(query.get("answer"))
        for query in row["queries"]
    )
    return "" if fit else "a query has no text as its query or answer"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
