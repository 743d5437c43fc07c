"""What all methods are given: the same texts as the same tokens, chosen by a seed before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anchorkv.engines.base import Engine, Tokenizer
from anchorkv.evaluate.asking import asking
from anchorkv.evaluate.metrics import f1
from anchorkv.evaluate.passages import question_set
from anchorkv.evaluate.rows import Rows, find
from anchorkv.evaluate.tasks.needle import Needle, numbers
from anchorkv.prompt import Prompt

CONTINUATION, READING, NEEDLE = "continuation", "reading", "needle"
BOOKS, ARTICLES = "lm/pg19.test.jsonl", "lm/wikitext2.test.jsonl"


@dataclass(frozen=True)
class Case:
    """One text, and what comes after it: a continuation to be predicted, or a question to be answered."""

    id: str
    task: str
    text: str
    """"" for a continuation, which is tokens alone."""
    context: list[int]
    continuation: list[int]
    question: str = ""
    asked: tuple[int, ...] = ()
    """The tokens of the question, as `Document` asks it."""
    answers: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    """The tokens of the first one."""
    max_tokens: int = 32

    def score(self, answer: str) -> float:
        """SQuAD's F1 of the first line; for a needle 1 when its number is there."""
        if self.task == NEEDLE:
            return float(self.answers[0] in numbers(answer))
        return f1(answer.partition("\n")[0], self.answers)


def continuations(engine: Engine, data: Path, count: int, length: int, more: int) -> list[Case]:
    """`count` texts each of books and of encyclopedia articles (short ones one after the other): `length` tokens to be
    compressed, and the `more` that follow."""
    found = []
    for name in (BOOKS, ARTICLES):
        waiting: list[int] = []
        texts = (row["text"] for row in Rows(find(data, name), {"text": str}))
        for number in range(count):
            while len(waiting) < length + more:
                waiting += engine.tokenizer.encode(next(texts)[: 8 * (length + more)])
            case = f"{Path(name).name.removesuffix('.jsonl')}/{length}/{number}"
            found.append(Case(case, CONTINUATION, "", waiting[:length], waiting[length : length + more]))
            waiting = []
    return found


def readings(engine: Engine, data: Path, count: int, passages: int, seed: int = 0) -> list[Case]:
    """SQuAD questions, the passage of each hidden among others."""
    squad = question_set("squad", data)
    return [
        _asked(engine.tokenizer, f"squad/{passages}/{question.id}", READING, squad.hidden(question, passages, seed),
               question.text, question.answers, 32)
        for question in squad.chosen(count, seed)
    ]


def needles(engine: Engine, data: Path, count: int, length: int, seed: int = 0) -> list[Case]:
    """One made-up fact in a book, at depths that cover the text evenly."""
    repeats = -(-count // 5)
    task = Needle(data=data, lengths=(length,), needles=(1,), repeats=repeats, seed=seed, limit=count)
    found = []
    for item in task.items():
        text, fact = task.text(engine.tokenizer, item)
        found.append(_asked(
            engine.tokenizer, f"needle/{item.id}", NEEDLE, text, fact.question, (fact.number,), task.max_tokens,
        ))
    return found


def _asked(
    tokenizer: Tokenizer, number: str, task: str, text: str, question: str, answers: tuple[str, ...], most: int
) -> Case:
    prompt = Prompt.of(tokenizer)
    opening = tokenizer.start_ids() + tokenizer.encode(prompt.opening, special=True)
    return Case(
        number, task, text, opening + tokenizer.encode(text), [], question,
        tuple(asking(prompt, tokenizer, question)), answers, tuple(tokenizer.encode(answers[0])), most,
    )
