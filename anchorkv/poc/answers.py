"""Questions on a document that was read once: the answers in each mode of recall, and whether two answers agree."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from anchorkv.config import RecallMode
from anchorkv.decode import decode
from anchorkv.document import Document, TextWriter
from anchorkv.evaluate.asking import asking
from anchorkv.evaluate.losses import answer_losses
from anchorkv.evaluate.metrics import contains, f1
from anchorkv.evaluate.metrics import tokens as words
from anchorkv.evaluate.run import Record
from anchorkv.poc.sentences import JAPANESE
from anchorkv.recall import RecallPlan, terms
from anchorkv.sampling import Sampling
from anchorkv.session import Session, next_logits

if TYPE_CHECKING:
    from anchorkv.poc.questions import Question

ANSWER_TOKENS, JAPANESE_TOKENS = 24, 48
"""Most tokens of an answer: an English tokenizer takes two or three for a Japanese character."""
_NUMBER = re.compile(r"\d+")


def agrees(answer: str, full: str, question: str = "") -> bool:
    """Whether two answers say the same, normalised as metrics.py does, and without stop words and the question's words,
    which both repeat: one stands in the other, or they share half their words (token F1 of 0.5 or more) and all their
    numbers. Where nothing else is said on either side, they agree."""
    asked = set(words(question))
    said, wanted = (
        " ".join(word for word in words(text) if word not in asked and terms(word)) for text in (answer, full)
    )
    if not said or not wanted:
        return said == wanted
    if contains(said, [wanted]) or contains(wanted, [said]):
        return True
    return f1(said, [wanted]) >= 0.5 and _NUMBER.findall(said) == _NUMBER.findall(wanted)


def by_mode(document: Document, question: Question, wanted: Sequence[RecallMode]) -> dict[RecallMode, Record]:
    """The answers by recall mode. "auto" brings back nothing or what "on" does, so that one of the others' answers is
    its own; it is asked itself where it might have thought again while it wrote."""
    found: dict[RecallMode, Record] = {}
    for mode in sorted(wanted, key=("off", "on", "auto").index):
        same = _same_as(document, question, found) if mode == "auto" else None
        found[mode] = dict(found[same]) if same else _asked(document, question, mode)
    return {mode: found[mode] for mode in wanted}


def _same_as(document: Document, question: Question, found: Mapping[RecallMode, Record]) -> RecallMode | None:
    """The mode whose answer is that of "auto" as well, None where it was not asked or may differ."""
    recalls = auto_recalls(document, question.text)
    mode: RecallMode = "on" if recalls else "off"
    return mode if mode in found and not found[mode]["recalled_again"] else None


def auto_recalls(document: Document, query: str) -> bool:
    """Whether "auto" would recall for `query`, without paying for the recall."""
    return RecallPlan(document.session, document.ranker).worth(query, "auto") is not None


def _asked(document: Document, question: Question, mode: RecallMode) -> Record:
    """One question on a fork with recall `mode`, as `evaluate.asking.ask` asks it; the question is read once for both
    the answer and the loss of the right one. `kept_cells`: held when the question is to be read, recalled ones too."""
    tokenizer = document.session.engine.tokenizer
    started = time.perf_counter()
    with document.session.fork() as session:
        session.config = session.config.replace(recall=mode)
        plan = RecallPlan(session, document.ranker)
        plan.update(question.text)
        held, recalled = session.accounting().kept_cells, session.recalled
        brought = "".join(plan.text_of(segment) for segment in sorted(recalled))
        session.read(asking(document.prompt, tokenizer, question.text))
        next_logits(session)
        first = time.perf_counter() - started
        if question.lead:  # an answer begins with it, and a small model needs it to know what to write
            session.read(tokenizer.encode(question.lead))
            next_logits(session)
        with session.fork() as apart:
            losses = answer_losses(apart, tokenizer.encode(question.answers[0]))
        segment = session.current
        answer = _written(session, plan, question.text)
        return {
            "answer": answer, "correct": contains(answer, question.answers), "answer_loss": float(losses.mean()),
            "recalled_cells": sum(recalled.values()), "recalled": brought, "kept_cells": held,
            "peak_cells": session.peak_cells, "first_token_seconds": round(first, 4),
            "recalled_again": session.current != segment,
        }


def _written(session: Session, plan: RecallPlan, question: str) -> str:
    """The first line of the greedy answer; what follows is not scored and not written."""
    writer, text = TextWriter(session.engine.tokenizer), ""
    most = JAPANESE_TOKENS if JAPANESE.search(question) else ANSWER_TOKENS
    for token in decode(session, most, Sampling(), plan=plan, question=question):
        text += writer.write(token)
        if "\n" in text.lstrip():
            break
    return text.strip().partition("\n")[0]
