"""Questions on the terminal: one answer as it is written, or two side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from anchorkv.cli import tables
from anchorkv.document import Answer, Document
from anchorkv.ledger import Ledger
from anchorkv.sampling import Sampling
from anchorkv.views.segments import segment_text


@dataclass
class Side:
    """One way of reading the document, and what it answered."""

    name: str
    document: Document
    answers: list[Answer] = field(default_factory=list)
    ledgers: list[Ledger] = field(default_factory=list)
    """Each answer's own ledger: what was recalled for it."""

    def stream(self, question: str, max_tokens: int, sampling: Sampling) -> Iterator[str]:
        """The answer in pieces. It is entered in `answers` however the iteration ends."""
        stream = self.document.stream(question, max_tokens=max_tokens, sampling=sampling)
        try:
            with closing(iter(stream)) as pieces:  # type: ignore[type-var]
                started = False
                for piece in pieces:
                    shown = printable(piece if started else piece.lstrip())
                    started = started or bool(shown)
                    yield shown
        finally:
            if stream.answer is not None and stream.session is not None:
                self.answers.append(stream.answer)
                self.ledgers.append(stream.session.ledger)

    def as_dict(self) -> dict[str, Any]:
        """For --json: reading, accounting, and each answer with the text of what was recalled."""
        tokenizer = self.document.session.engine.tokenizer
        answers = []
        for answer, ledger in zip(self.answers, self.ledgers, strict=True):
            texts = [{"segment": n, "text": segment_text(ledger, tokenizer, n)} for n in answer.recalled]
            answers.append({**answer.as_dict(), "recalled": texts})
        return {**tables.accounting_dict(self.document), "answers": answers}


def printable(text: str) -> str:
    """Without control characters: neither a model nor a document may steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def ask_one(console: Console, side: Side, question: str, max_tokens: int, sampling: Sampling) -> None:
    """Print the question, its answer while it is written, and a line of figures."""
    console.print()
    console.print(f"Q  {printable(question)}", style="bold", markup=False)
    for piece in side.stream(question, max_tokens, sampling):
        console.print(piece, end="", markup=False, soft_wrap=True)
    console.print()
    if side.answers:
        console.print(tables.answer_line(side.answers[-1]), style="dim")


def ask_both(console: Console, left: Side, right: Side, question: str, max_tokens: int, sampling: Sampling) -> None:
    """Two answers beside each other, written one after the other so that neither slows the other down."""
    texts = {left.name: Text(""), right.name: Text("")}
    before = {left.name: len(left.answers), right.name: len(right.answers)}

    def screen() -> RenderableType:
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(*(_panel(side, texts[side.name], len(side.answers) > before[side.name]) for side in (left, right)))
        return Group(Text(f"Q  {printable(question)}", style="bold"), grid)

    console.print()
    if not console.is_terminal:
        for side in (left, right):
            texts[side.name].append("".join(side.stream(question, max_tokens, sampling)))
        console.print(screen())
        return
    with Live(screen(), console=console, refresh_per_second=12) as live:
        for side in (left, right):
            for piece in side.stream(question, max_tokens, sampling):
                texts[side.name].append(piece)
                live.update(screen())
        live.update(screen())


def _panel(side: Side, text: Text, done: bool) -> Panel:
    line = tables.answer_line(side.answers[-1]) if done else "…"
    empty = Text("(no answer)" if done else "…", style="dim")
    body = Group(text if text.plain else empty, Text(line, style="dim"))
    return Panel(body, title=side.name, title_align="left", box=box.ROUNDED, border_style="dim", padding=(0, 1))


def recalled_texts(side: Side) -> Iterator[tuple[int, str]]:
    """Number and text of each segment recalled for the last answer, on one line each."""
    if side.answers:
        for number in side.answers[-1].recalled:
            text = segment_text(side.ledgers[-1], side.document.session.engine.tokenizer, number)
            yield number, printable(" ".join(text.split()))
