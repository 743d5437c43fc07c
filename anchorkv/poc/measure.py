"""What is measured, in which order: one reading of a document gives losses, cells and the answers to its questions.

    jobs(items, ways) -> for each: measured(models, job, plan) -> a record for the Store -> summary.py

Every area's first document comes on every way before any area's second, then the speeds, the other documents, and last
the grounds that "context recovered" needs. All ways read the same tokens and are asked the same questions, on forks of
the same reading, greedily; the first line of an answer counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from anchorkv.config import AnchorConfig, preset
from anchorkv.document import Document, Reading, TextWriter, pinned_tokens
from anchorkv.engines.base import SURPRISE, Engine, Floats, Output, Tokenizer
from anchorkv.errors import AnchorKVError
from anchorkv.evaluate.asking import modes
from anchorkv.evaluate.run import Models, Record
from anchorkv.evaluate.ways import FULL, Way
from anchorkv.ledger import Ledger
from anchorkv.poc import speed
from anchorkv.poc.answers import ANSWER_TOKENS, JAPANESE_TOKENS, by_mode
from anchorkv.prompt import Prompt
from anchorkv.session import Session
from anchorkv.views.segments import states_of

if TYPE_CHECKING:
    from anchorkv.poc.documents import Source
    from anchorkv.poc.plan import Plan
    from anchorkv.poc.questions import Question

TaskName = Literal["document", "speed", "ground"]
BLOCK = 64
"""Tokens whose losses are drawn together by the bootstrap: neighbours are not independent, and documents are short."""
FIRST = 256
"""Tokens of a document that are read but not scored, a quarter of a short one: nothing was dropped before them."""
ROOM = 256
"""Positions kept free in the model's window for a question and its answer: what is longer than the rest must be cut
before it is measured."""
MARKS = 16
"""Points of the memory curve."""
VIEW = 240
"""Tokens of a document's beginning that an anchor view shows."""
LOST = "…"
"""Stands for text of which nothing was kept."""
_KINDS = {"anchor": "anchor", "whole": "whole", "sink": "whole", "pinned": "whole", "recalled": "recalled"}
"""State of a token -> its kind in an anchor view, the likeliest to be shown first; every other is "dropped"."""


@dataclass(frozen=True)
class Item:
    """A document and what is asked about it."""

    source: Source
    questions: tuple[Question, ...]

    @property
    def id(self) -> str:
        return self.source.id


@dataclass(frozen=True)
class Job:
    """One thing to measure: a document on one way, its ground without memory, or an area's speed on its document."""

    task: TaskName
    way: Way
    item: Item

    @property
    def key(self) -> tuple[str, str, str]:
        """As the Store has it."""
        return self.task, self.way.name, self.item.id


def items(sources: Sequence[Source], questions: Sequence[Question], plan: Plan) -> list[Item]:
    """The documents with their questions, one of each area in turn, so that every area has figures early.

    A document has no more questions than the plan says, except where they are the user's own.
    """
    asked: dict[str, list[Question]] = {}
    for question in questions:
        asked.setdefault(question.document, []).append(question)
    areas: dict[str, list[Item]] = {}
    for source in sources:
        mine = asked.get(source.id, [])
        own = [question for question in mine if question.own]
        rest = [question for question in mine if not question.own]
        chosen = own + rest[: max(0, plan.questions_per_document - len(own))]
        areas.setdefault(source.area, []).append(Item(source, tuple(chosen)))
    most = max(map(len, areas.values()), default=0)
    return [mine[turn] for turn in range(most) for mine in areas.values() if turn < len(mine)]


def ways_of(policies: Mapping[str, AnchorConfig]) -> list[Way]:
    """The full cache, which everything is measured against, and the plan's policies."""
    named = [Way(name, policy) for name, policy in policies.items() if name != FULL]
    return [Way(FULL, preset(FULL)), *named]


def jobs(items: Sequence[Item], ways: Sequence[Way]) -> list[Job]:
    """Everything there is to measure, what matters most first: a budget that ends early still has all areas."""
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(item.source.area, item)
    early = set(map(id, first.values()))
    later = [item for item in items if id(item) not in early]
    policies = [way for way in ways if way.name != FULL]
    grounds = {way.ground.name: way.ground for way in policies}
    return [
        *(Job("document", way, item) for item in first.values() for way in ways),
        *(Job("speed", way, typical(items, area)) for area in first for way in policies),
        *(Job("document", way, item) for item in later for way in ways),
        *(Job("ground", ground, item) for item in items for ground in grounds.values()),
    ]


def typical(items: Iterable[Item], area: str) -> Item:
    """The area's document of median length: the one whose speed is measured."""
    mine = sorted((item for item in items if item.source.area == area), key=lambda item: len(item.source.text))
    return mine[len(mine) // 2]


def settings(plan: Plan, items: Sequence[Item], ways: Sequence[Way], models: Models) -> dict[str, Any]:
    """What a run's records follow from, for its Store: a run goes on only with the same."""
    return {
        "documents": {item.id: item.source.sha256 for item in items},
        "questions": {item.id: [[q.text, list(q.answers), q.lead] for q in item.questions] for item in items},
        "ways": {way.name: way.policy.model_dump(mode="json") for way in ways},
        "recall_modes": list(plan.recall_modes), "max_tokens_document": plan.max_tokens_document,
        "answer_tokens": [ANSWER_TOKENS, JAPANESE_TOKENS], "first": FIRST, "block": BLOCK,
        "fingerprints": sorted({models.of(way).engine.info.fingerprint for way in ways}),
    }


def measured(models: Models, job: Job, plan: Plan) -> Record:
    """The record of `job`. What fails with an AnchorKVError becomes a record with the field "error"."""
    started = time.perf_counter()
    try:
        found = _TASKS[job.task](models, job, plan)
    except AnchorKVError as error:
        found = {"error": str(error)}
    seconds = round(time.perf_counter() - started, 3)
    head = {"task": job.task, "way": job.way.name, "item": job.item.id, "area": job.item.source.area}
    return {**head, "seconds": seconds, **found}


# --- a document on one way -----------------------------------------------------------------------------------------


def _document(models: Models, job: Job, plan: Plan) -> Record:
    """`blocks`: [sum of losses in nats, tokens scored]; `curve`: [tokens read, cells held]; `questions`: each with
    `answers` {recall mode: what `_asked` gave}, and `kept`: what of its passage the cache holds after reading."""
    engine, item = models.of(job.way).engine, job.item
    text = item.source.text
    document, found = _read(engine, job.way.policy, text, item.source.title)
    with document:
        states = states_of(document.ledger)
        opening = len(document.ledger) - int(document.ledger.column("added").sum()) - found["tokens"]
        found["questions"] = [
            {
                "question": question.text, "accepted": list(question.answers), "passage": question.passage,
                "kept": _kept(document, states, text, question.passage),
                "answers": by_mode(document, question, modes(job.way.policy, plan.recall_modes)),
            }
            for question in item.questions
        ]
        if job.way.name != FULL:
            where = _real(document.ledger)[opening : opening + VIEW]
            found["view"] = shown(document.ledger, engine.tokenizer, states, where)
    return found


def _ground(models: Models, job: Job, plan: Plan) -> Record:
    """The losses alone, with nothing but sinks and the recent window."""
    engine, source = models.of(job.way).engine, job.item.source
    document, found = _read(engine, job.way.policy, source.text, source.title)
    document.close()
    return {"blocks": found["blocks"], "tokens": found["tokens"]}


def _speed(models: Models, job: Job, plan: Plan) -> Record:
    engine, item = models.of(job.way).engine, job.item
    tokens, questions = engine.tokenizer.encode(item.source.text), [question.text for question in item.questions]
    return speed.measure(models, job.way, tokens, questions, plan.recall_modes)


_TASKS = {"document": _document, "ground": _ground, "speed": _speed}


def _read(engine: Engine, policy: AnchorConfig, text: str, title: str) -> tuple[Document, Record]:
    """The text as `Document.read` reads it, with its losses and the memory on the way."""
    tokenizer = engine.tokenizer
    prompt = Prompt.of(tokenizer)
    opening = tokenizer.start_ids() + tokenizer.encode(prompt.opening, special=True)
    body = tokenizer.encode(text)
    spans = [span for span in policy.pinned if span in text]  # one policy reads many documents
    tokens = opening + body
    pinned = [policy.pin_prompt] * len(opening) + pinned_tokens(text, spans, body, tokenizer)
    parts: list[Floats] = []

    def take(first: int, out: Output) -> None:
        if out.surprise is not None:
            parts.append(out.surprise)

    session = Session(engine, policy, observe=take, observe_needs=frozenset({SURPRISE}))
    curve, at, started = [], 0, time.perf_counter()
    try:
        for mark in sorted({max(1, len(tokens) * n // MARKS) for n in range(1, MARKS + 1)}):
            session.read(tokens[at:mark], pinned[at:mark])
            curve.append([mark, session.accounting().kept_cells])
            at = mark
    except BaseException:
        session.close()
        raise
    seconds = time.perf_counter() - started
    session.observe, session.observe_needs = None, frozenset()
    losses = np.concatenate(parts)[~session.ledger.column("added")][len(opening) :]
    cells = session.accounting()
    document = Document(session, prompt, title, Reading(len(tokens), seconds))
    return document, {
        "tokens": len(body), "blocks": _blocks(losses), "curve": curve, "read_seconds": round(seconds, 3),
        "kept_cells": cells.kept_cells, "peak_cells": cells.peak_cells, "full_cells": cells.full_cells,
        "cell_bytes": engine.info.cell_bytes,
    }


def _blocks(losses: Floats) -> list[list[float]]:
    """[sum of losses, tokens] of each block of the scored part of the text, whose first token is never scored."""
    scored = losses[max(1, min(FIRST, len(losses) // 4)) :].astype(np.float64)
    return [[float(scored[at : at + BLOCK].sum()), len(scored[at : at + BLOCK])] for at in range(0, len(scored), BLOCK)]


# --- what a cache holds of a text ----------------------------------------------------------------------------------


def shown(ledger: Ledger, tokenizer: Tokenizer, states: Sequence[str], where: Sequence[int]) -> list[list[str]]:
    """[text, kind] of the tokens at positions `where`, one behind the other. Tokens that share a character are one, of
    the kind of whichever is still held. states: of all positions (`states_of`)."""
    writer, found, held = TextWriter(tokenizer), [], []
    order = [*_KINDS, "dropped", "evicted"]
    for position in where:
        text = writer.write(int(ledger.tokens[position]))
        held.append(states[position])
        if text:
            found.append([text, _KINDS.get(min(held, key=order.index), "dropped")])
            held = []
    return found


def _kept(document: Document, states: Sequence[str], text: str, passage: str) -> str:
    """What of `passage`, at its first place in `text`, the cache holds: the rest is LOST. "" where it is not found."""
    if not passage or passage not in text:
        return ""
    tokenizer = document.session.engine.tokenizer
    body = tokenizer.encode(text)
    inside = np.flatnonzero(pinned_tokens(text, [passage], body, tokenizer))
    once = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)[0]
    real = _real(document.ledger)
    where = real[once + len(real) - len(body)]
    pieces = [LOST if kind == "dropped" else piece for piece, kind in shown(document.ledger, tokenizer, states, where)]
    kept = [piece for at, piece in enumerate(pieces) if piece != LOST or not at or pieces[at - 1] != LOST]
    return "".join(kept).strip()


def _real(ledger: Ledger) -> Any:
    """Positions of the text's own tokens."""
    return np.flatnonzero(~ledger.column("added"))
