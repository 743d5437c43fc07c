"""A document read once through anchors, and asked many times on forks of what is kept."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchorkv.config import AnchorConfig
from anchorkv.decode import decode
from anchorkv.engines.base import Engine, Tokenizer
from anchorkv.errors import ConfigError, DocumentError
from anchorkv.ledger import Accounting, Ledger
from anchorkv.prompt import Prompt
from anchorkv.recall import Ranker, RecallPlan
from anchorkv.sampling import Sampling
from anchorkv.savefile import open_session, save_session
from anchorkv.session import Progress, Session

QUESTION = "\n\nAnswer from the text above, briefly.\nQuestion: {question}"


@dataclass(frozen=True)
class Answer:
    """What one question gave and what it cost."""

    question: str
    text: str
    tokens: int
    first_token_seconds: float
    """From asking to the first token: recall, reading the question, one decode."""
    tokens_per_second: float
    recalled: list[int]
    """Segments that recall brought back, in order."""
    recalled_cells: int
    accounting: Accounting

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "accounting": self.accounting.as_dict()}

    def __str__(self) -> str:
        return self.text


class Stream:
    """An answer while it is written: iterate over pieces of text; `answer` is complete afterwards."""

    def __init__(self, document: Document, question: str, max_tokens: int, sampling: Sampling) -> None:
        self._document, self._question = document, question
        self._max_tokens, self._sampling = max_tokens, sampling
        self.answer: Answer | None = None
        self.session: Session | None = None
        """The fork that answers; closed when the iteration ends."""

    def __iter__(self) -> Iterator[str]:
        document, question = self._document, self._question
        tokenizer = document.session.engine.tokenizer
        started = time.perf_counter()
        with document.session.fork() as session:
            self.session = session
            plan = RecallPlan(session, document.ranker)
            plan.update(question)
            recalled_cells = sum(session.recalled.values())
            asking = QUESTION.format(question=question.strip()) + document.prompt.asking
            session.read(tokenizer.encode(asking, special=True))
            first, count, text = 0.0, 0, []
            writer = TextWriter(tokenizer)
            try:
                for token in decode(session, self._max_tokens, self._sampling, plan=plan, question=question):
                    count += 1
                    first = first or time.perf_counter() - started
                    piece = writer.write(token)
                    text.append(piece)
                    if piece:
                        yield piece
            finally:
                total = time.perf_counter() - started
                self.answer = Answer(
                    question=question, text="".join(text).strip(), tokens=count, first_token_seconds=first or total,
                    tokens_per_second=(count - 1) / (total - first) if count > 1 else 0.0, recalled=list(plan.brought),
                    recalled_cells=recalled_cells, accounting=session.accounting(),
                )


@dataclass(frozen=True)
class Reading:
    """What reading cost."""

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Document:
    """A text held as anchors. `ask` and `stream` answer on forks: they never change what is kept."""

    def __init__(
        self, session: Session, prompt: Prompt, title: str, reading: Reading, ranker: Ranker | None = None
    ) -> None:
        self.session, self.prompt, self.title, self.reading, self.ranker = session, prompt, title, reading, ranker

    @classmethod
    def read(
        cls, engine: Engine, config: AnchorConfig, text: str, *, title: str = "text",
        progress: Callable[[int, int], None] | None = None, ranker: Ranker | None = None,
    ) -> Document:
        """Read `text` through anchors. progress: called with (tokens done, tokens in all).

        Raises DocumentError for an empty text, ConfigError for a pinned span that does not occur, CapacityError.
        """
        if not text.strip():
            raise DocumentError(f"{title} has no text in it; give a document with words.")
        tokenizer = engine.tokenizer
        prompt = Prompt.of(tokenizer)
        opening = tokenizer.start_ids() + tokenizer.encode(prompt.opening, special=True)
        body = tokenizer.encode(text)
        pinned = [config.pin_prompt] * len(opening) + pinned_tokens(text, config.pinned, body, tokenizer)
        tokens = opening + body
        session = Session(engine, config)
        started = time.perf_counter()
        report: Progress | None = (lambda done: progress(done, len(tokens))) if progress else None
        try:
            session.read(tokens, pinned, report)
        except BaseException:
            session.close()
            raise
        return cls(session, prompt, title, Reading(len(tokens), time.perf_counter() - started), ranker)

    def ask(self, question: str, *, max_tokens: int = 128, sampling: Sampling | None = None) -> Answer:
        """The whole answer. Raises ConfigError for an empty question."""
        stream = self.stream(question, max_tokens=max_tokens, sampling=sampling)
        for _ in stream:
            pass
        if stream.answer is None:
            raise RuntimeError("the stream ended without an answer")
        return stream.answer

    def stream(self, question: str, *, max_tokens: int = 128, sampling: Sampling | None = None) -> Stream:
        """The answer piece by piece; its figures are in `.answer` afterwards."""
        if not question.strip():
            raise ConfigError("The question is empty; ask something.")
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1 (got {max_tokens}).")
        return Stream(self, question, max_tokens, sampling or Sampling())

    def fork(self) -> Document:
        """The same document on a session of its own; the cells are shared."""
        return Document(self.session.fork(), self.prompt, self.title, self.reading, self.ranker)

    @property
    def ledger(self) -> Ledger:
        return self.session.ledger

    def accounting(self) -> Accounting:
        return self.session.accounting()

    def save(self, path: str | Path) -> None:
        """Write the kept cells, the ledger and the policy to one file. Raises SavedStateError if it cannot."""
        extra = {"kind": "document", "title": self.title, "reading": asdict(self.reading)}
        save_session(self.session, path, extra)

    @classmethod
    def open(cls, engine: Engine, path: str | Path, ranker: Ranker | None = None) -> Document:
        """A document as `save` wrote it. Raises SavedStateError when it is damaged or another model's."""
        session, extra = open_session(engine, path)
        reading = Reading(**extra["reading"]) if "reading" in extra else Reading(len(session.ledger), 0.0)
        return cls(session, Prompt.of(engine.tokenizer), str(extra.get("title", "")), reading, ranker)

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> Document:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TextWriter:
    """Token ids to text, holding back bytes until a character is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.piece(token))


def pinned_tokens(text: str, spans: Sequence[str], tokens: Sequence[int], tokenizer: Tokenizer) -> list[bool]:
    """Which of `tokens` (those of `text`) lie in one of `spans`, wherever they occur.

    Raises ConfigError naming a span that does not occur.
    """
    pinned = [False] * len(tokens)
    if not spans:
        return pinned
    ends, at = [], 0
    for token in tokens:
        at += len(tokenizer.piece(token))
        ends.append(at)
    data = text.encode()
    shift = at - len(data)  # SentencePiece may put a space before the text
    for span in spans:
        wanted = span.encode()
        found = data.find(wanted)
        if found < 0:
            raise ConfigError(f"The pinned span {span!r} does not occur in the document; check its spelling.")
        while found >= 0:
            first, last = found + shift, found + shift + len(wanted)
            for index, end in enumerate(ends):
                begin = ends[index - 1] if index else 0
                if begin < last and end > first:
                    pinned[index] = True
            found = data.find(wanted, found + len(wanted))
    return pinned
