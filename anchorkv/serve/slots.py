"""One request on its way through the engine: read a little, write a token, end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Engine, Ints
from anchorkv.errors import AnchorKVError
from anchorkv.recall import RecallPlan
from anchorkv.serve.cells import Held, most_cells
from anchorkv.serve.facts import attention_facts, recalled_facts, segment_facts
from anchorkv.serve.handle import Handle
from anchorkv.serve.prefixes import Owner, Parked, owner
from anchorkv.serve.prompts import Script
from anchorkv.serve.requests import Ask, AttentionFacts, DocumentFacts, Finish, Outcome
from anchorkv.serve.writing import Writing
from anchorkv.session import Session, next_logits

log = logging.getLogger("anchorkv.serve")
PATIENCE = 16
"""Requests that may be admitted before an older one; then all wait for it."""
LEAST_GROWTH = 8
"""Cells that a request is thought to grow by, however many it holds."""
LEAST_KEPT = 32
"""Tokens; what is shorter is read again sooner than it is looked up."""


@dataclass
class Times:
    """Readings of the clock; 0 where it has not come to that."""

    asked: float
    begun: float = 0.0
    read: float = 0.0
    first: float = 0.0
    last: float = 0.0


@dataclass
class Away:
    """A session's state outside the engine, while its cells serve others."""

    state: tuple[dict[str, Any], dict[str, Any]]
    cells: int


@dataclass
class Upload:
    """A document to be read, and whoever waits for it."""

    facts: DocumentFacts
    text: str = field(repr=False)
    done: Future[DocumentFacts] = field(default_factory=Future)


class Slot:
    """A request: `position` tokens of its script are read, then `writing` goes on. Belongs to the engine thread."""

    def __init__(
        self, engine: Engine, script: Script, tenant: str, policy: AnchorConfig, clock: Callable[[], float], *,
        handle: Handle | None = None, writing: Writing | None = None, upload: Upload | None = None,
        document: tuple[DocumentFacts, int] | None = None, low: bool = False,
    ) -> None:
        """document: the one that the script begins with, and where in it that one ends."""
        self.engine, self.script, self.tenant, self.policy, self._clock = engine, script, tenant, policy, clock
        self.handle, self.writing, self.upload, self.low = handle, writing, upload, low
        self.document = document[0] if document is not None else None
        self.document_end = document[1] if document is not None else 0
        self.times = Times(clock())
        self.held: Held | None = None
        self.position = self.cached = 0
        self.away: Away | None = None
        self.plan: RecallPlan | None = None
        self.left: Parked | None = None
        """What it has left for its conversation's next turn so far."""
        self.ended_segment: int | None = None
        """A segment of the answer has ended, and recall is to look again."""
        self.expected = 0
        """Tokens that it would not have to read, when this was last looked up."""
        self.overtaken = 0
        """Requests that came later and were admitted before it."""
        self.followed = False
        """Another request waits for what this one is reading."""
        ends = int(script.ends.sum())
        total = len(script) + self.max_tokens
        self.most = most_cells(engine, policy, total, int(script.pinned.sum()), ends)

    # --- what it is --------------------------------------------------------------------------------------------

    @property
    def ask(self) -> Ask | None:
        return self.handle.ask if self.handle is not None else None

    @property
    def max_tokens(self) -> int:
        ask = self.ask
        if ask is None:
            return 0
        return len(ask.given) if ask.given is not None else ask.max_tokens

    @property
    def reuse(self) -> bool:
        return not self.low and (self.ask is None or self.ask.reuse)

    @property
    def pressing(self) -> bool:
        """Whether it has been overtaken often enough."""
        return self.overtaken >= PATIENCE

    @property
    def cancelled(self) -> bool:
        if self.handle is not None:
            return self.handle.cancelled
        return self.upload is not None and self.upload.done.cancelled()

    @cached_property
    def owner(self) -> Owner:
        return owner(self.tenant, self.policy)

    @property
    def recall(self) -> str:
        """What decides what recall brings; "" where nothing can be said before it was tried."""
        if self.ask is not None and self.ask.recall_segments is not None:
            return ""
        return self.policy.model_dump_json(include={"recall", "recall_cells"})

    @cached_property
    def stream(self) -> Ints:
        return self.script.stream()

    @property
    def session(self) -> Session:
        if self.held is None:
            raise RuntimeError("the request has no session yet")
        return self.held.session

    @property
    def reading(self) -> bool:
        return self.position < len(self.script)

    @property
    def pure(self) -> bool:
        """Whether its session is what reading its tokens alone gives: recall has brought nothing."""
        return self.plan is None or not self.plan.brought

    @property
    def keeps_answer(self) -> bool:
        """Whether a later turn may go on from here: what was written is what the caller got, word for word."""
        ask, writing = self.ask, self.writing
        written = writing is not None and writing.stop is None and ask is not None and ask.given is None
        return self.reuse and self.pure and written and self.spelled

    @property
    def spelled(self) -> bool:
        """Whether a next turn that repeats the answer reads the tokens that were written."""
        writing, ask = self.writing, self.ask
        if writing is None or ask is None or not ask.messages:
            return True
        return self.engine.tokenizer.encode(writing.text) == writing.tokens

    def growth(self, share: float = 1.0, position: int | None = None, held: int = 0) -> int:
        """Cells that it may still come to hold beside those held now, if it comes to `share` of the most it can.

        position, held: were it to begin there, with so many cells.
        """
        at = self.position if position is None else position
        written = 0 if self.writing is None else len(self.writing.tokens)
        left = len(self.script) - at + self.max_tokens - written
        if "AC" in self.policy.anchors:
            left += self.policy.ac_tokens * (left // self.policy.min_segment + int(self.script.ends[at:].sum()) + 1)
        if self.policy.recall != "off":
            left += self.policy.recall_cells
        if self.held is not None:
            held = len(self.held.session.memory.positions())
        return min(left, max(LEAST_GROWTH, round(self.most * share) - held))

    # --- reading -----------------------------------------------------------------------------------------------

    def begin(self, held: Held, position: int) -> None:
        """Go on from `held`, which has read `position` tokens of the script."""
        held.session.config = self.policy  # may differ in recall from what the cells were read under
        self.held, self.position, self.cached = held, position, position
        self.times.begun = self.times.begun or self._clock()
        if position > self.script.recall_at:  # it was found there that recall brings nothing
            self.plan = RecallPlan(held.session)
        if not self.reading:
            self.times.read = self._clock()

    def marks(self) -> set[int]:
        """Where its session is worth keeping for others."""
        script = self.script
        if not self.reuse or self.upload is not None:
            return set()
        marks = {script.head, script.recall_at, self.document_end}
        if self.followed or (self.ask is not None and self.ask.messages):
            marks.add(len(script))
        return {mark for mark in marks if mark >= LEAST_KEPT}

    def read(self, budget: int) -> int:
        """Read up to `budget` tokens, no further than the next mark or forced end; the number of tokens read.

        Raises CapacityError; the request must then be ended, or begun again.
        """
        script, session, at = self.script, self.session, self.position
        if at == script.recall_at and self.plan is None:
            self._recall()
        stops = [at + budget, len(script), *(mark for mark in (*self.marks(), script.recall_at) if mark > at)]
        forced = np.flatnonzero(script.ends[at : at + budget])
        if len(forced):
            stops.append(at + int(forced[0]) + 1)
        stop = min(stops)
        last = stop == len(script)
        session.read(script.tokens[at:stop].tolist(), script.pinned[at:stop].tolist(), logits=last)
        if script.ends[stop - 1]:
            session.end_segment()
        self.position = stop
        if last:
            self.times.read = self._clock()
        return stop - at

    def grows_by(self, budget: int) -> int:
        """Cells that reading up to `budget` tokens may take, what recall brings before included."""
        tokens = min(budget, len(self.script) - self.position)
        # An added anchor for each token is more than there can be.
        added = tokens * self.policy.ac_tokens if "AC" in self.policy.anchors else 0
        recalls = self.plan is None and self.position <= self.script.recall_at < self.position + tokens
        return tokens + added + (self.policy.recall_cells if recalls and self.policy.recall != "off" else 0)

    def _recall(self) -> None:
        self.plan = RecallPlan(self.session)
        ask = self.ask
        if ask is not None and ask.recall_segments is not None:
            for segment in ask.recall_segments:
                if segment < self.session.ledger.segments and self.session.recall(segment, "recalled by the caller"):
                    self.plan.brought.append(segment)
        elif self.script.question:
            self.plan.update(self.script.question)

    # --- writing -----------------------------------------------------------------------------------------------

    def draw(self) -> int | None:
        """Write the next token: its id, still to be read back; None when the answer is over."""
        writing, handle = self.writing, self.handle
        if writing is None or handle is None:
            return None
        piece = writing.draw(next_logits(self.session))
        if piece is None:
            return None
        self.times.last = self._clock()
        self.times.first = self.times.first or self.times.last
        handle.put(piece)
        return piece.token

    def stepped(self, segment: int) -> None:
        """The token drawn was read back; `segment` was the current one before."""
        by_itself = self.policy.recall != "off" and self.ask is not None and self.ask.recall_segments is None
        ended = self.session.current != segment
        self.ended_segment = segment if self.plan is not None and by_itself and ended else None

    def recall_on(self) -> None:
        """At a segment's end in the answer, recall again for the question and what was just written.

        Raises CapacityError.
        """
        segment, self.ended_segment = self.ended_segment, None
        if segment is None or self.plan is None:
            return
        session = self.session
        written = session.ledger.tokens[session.ledger.span(segment)].tolist()
        self.plan.update(f"{self.script.question} {session.engine.tokenizer.decode(written)}")

    # --- out of the engine and back ----------------------------------------------------------------------------

    def leave(self) -> None:
        """Give up the cells and keep what they hold outside; `come_back` goes on as if nothing had happened."""
        session = self.session
        self.away = Away(session.state(), len(session.memory.positions()))
        session.close()
        self.held = None

    def come_back(self, engine: Engine) -> None:
        """Raises CapacityError; it is then still away."""
        if self.away is None:
            return
        session = Session.restore(engine, self.policy, *self.away.state)
        self.held, self.away = Held(session), None
        if self.plan is not None:
            self.plan.session = session

    # --- the end -----------------------------------------------------------------------------------------------

    def outcome(self, finish: Finish, error: str = "") -> Outcome:
        """What the request gave and cost, from the engine's own structures."""
        ask, writing, times = self.ask, self.writing, self.times
        if ask is None or writing is None:
            raise RuntimeError("a document's reading has no outcome")
        now = self._clock()
        held = {} if self.held is None else self._held_facts(self.session)
        if finish in ("stop", "length"):
            held["attention"] = self._attention()
        logprobs = writing.logprobs
        return Outcome(
            id=ask.id, tenant=ask.tenant, finish=finish, text=writing.text, policy=self.policy, document=ask.document,
            error=error, stop=writing.stop, prompt_tokens=len(self.script), cached_tokens=self.cached,
            completion_tokens=len(writing.tokens), tokens=tuple(writing.tokens),
            answer_logprob=float(np.mean(logprobs)) if logprobs else None,
            lowest_logprob=min(logprobs) if logprobs else None,
            queue_seconds=(times.begun or now) - times.asked,
            prefill_seconds=(times.read or now) - times.begun if times.begun else 0.0,
            first_token_seconds=times.first - times.asked if times.first else 0.0,
            decode_seconds=times.last - times.first, **held,
        )

    def _held_facts(self, session: Session) -> dict[str, Any]:
        figures = session.accounting()
        return {
            "kept_cells": figures.kept_cells, "peak_cells": figures.peak_cells, "full_cells": figures.full_cells,
            "kv_bytes": figures.kept_bytes, "segments": segment_facts(session),
            "recalled": recalled_facts(session, self.plan.brought if self.plan is not None else ()),
        }

    def _attention(self) -> AttentionFacts | None:
        """None where nobody asked, or it cannot be had: the answer stands all the same."""
        if self.held is None or self.low or self.ask is None or not self.ask.attention:
            return None
        try:
            return attention_facts(self.session, len(self.script))
        except AnchorKVError as error:
            log.warning("the attention of %s cannot be told: %s", self.ask.id, error)
            return None

    def close(self) -> None:
        """Free its cells; it may begin again."""
        if self.held is not None:
            self.held.session.close()
        self.held, self.away, self.plan, self.position, self.cached = None, None, None, 0, 0


def common(one: Slot, other: Slot) -> int:
    """Tokens that two scripts begin with alike."""
    size = min(len(one.stream), len(other.stream))
    differ = (one.stream[:size] != other.stream[:size]).nonzero()[0]
    return int(differ[0]) if len(differ) else size
