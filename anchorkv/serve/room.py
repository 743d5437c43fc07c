"""Room for requests among the KV cells there are: admission, what is parked, and what makes way.

A request is admitted when the cells that it will likely come to hold fit beside what is held and what was promised to
others. "Likely" is what requests of its policy came to hold of late, as a share of the most they could. Where that was
too little, what is parked makes way, and then the youngest request waits outside the engine for a while (`rounds.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from anchorkv.engines.base import Engine
from anchorkv.errors import CapacityError
from anchorkv.serve.cells import Held, distinct, scratch_cells
from anchorkv.serve.documents import Documents
from anchorkv.serve.prefixes import Claim, Parked, Prefixes, owner
from anchorkv.serve.requests import TooLarge
from anchorkv.serve.slots import LEAST_KEPT, Slot, common
from anchorkv.session import Session

T = TypeVar("T")
_POLICIES = 256
"""Policies whose requests' cells are remembered."""


class Room:
    """Belongs to the engine thread, `check` excepted."""

    def __init__(self, engines: Sequence[Engine], cells: int, documents: Documents, prefixes: Prefixes) -> None:
        """engines: contexts of one model, each of `cells` KV cells."""
        self.engines, self.cells, self.documents, self.prefixes = list(engines), cells, documents, prefixes
        self._at_most = {id(engine): 0 for engine in engines}  # cells held, overestimated until counted again
        self._taken: OrderedDict[str, float] = OrderedDict()

    def check(self, slot: Slot) -> None:
        """Raises TooLarge when `slot` could never run."""
        need = slot.most + scratch_cells(slot.policy)
        if need > self.cells:
            raise TooLarge(
                f"This request may need {need} KV cells for {len(slot.script)} tokens to read and {slot.max_tokens} to "
                f"write, and there are {self.cells}; shorten it, or use a policy that keeps less."
            )

    # --- counting ----------------------------------------------------------------------------------------------

    def used(self, running: Sequence[Slot], engine: Engine | None = None) -> int:
        """Cells held now, on one engine or on all, shared ones counted once."""
        keys = [s.held.keys() for s in running if s.held is not None and engine in (None, s.session.engine)]
        return distinct([*keys, *(entry.keys for entry in self.prefixes.parked if engine in (None, entry.engine))])

    def measure(self, running: Sequence[Slot]) -> tuple[int, int, int, int]:
        """Cells held now, promised, held by kept prefixes, held by documents."""
        documents = [entry.keys for entry in self.prefixes.parked if entry.document is not None]
        prefixes = [entry.keys for entry in self.prefixes.parked if entry.document is None]
        promised = sum(self._growth(slot) for slot in running)
        return self.used(running), promised, distinct(prefixes), distinct(documents)

    def learn(self, slot: Slot, peak_cells: int) -> None:
        """A request came to hold `peak_cells` at most."""
        key = slot.owner[1] + slot.recall
        share = min(1.0, peak_cells / max(1, slot.most))
        self._taken[key] = self._taken.get(key, share) * 0.8 + share * 0.2
        self._taken.move_to_end(key)
        while len(self._taken) > _POLICIES:
            self._taken.popitem(last=False)

    def _growth(self, slot: Slot, position: int | None = None, held: int = 0) -> int:
        # Background work is promised all that it may need, so that it is not sent away again for want of it.
        share = 1.0 if slot.low else self._taken.get(slot.owner[1] + slot.recall, 1.0)
        return slot.growth(share, position, held)

    # --- admission ---------------------------------------------------------------------------------------------

    def cached(self, slot: Slot) -> Parked | None:
        """The longest beginning of `slot` that is kept, for it to go on from."""
        if slot.away is not None or not slot.reuse:
            return None
        return self.prefixes.find(slot.owner, slot.stream, slot.script.recall_at, slot.recall)

    def follows(self, slot: Slot, running: Sequence[Slot]) -> bool:
        """Whether one of `running` is reading now what `slot` could go on from in a moment."""
        if not slot.reuse or slot.away is not None:
            return False
        for leader in running:
            if not leader.reading or leader.owner != slot.owner or not leader.reuse:
                continue
            shared = common(leader, slot)
            if shared == len(leader.script) and leader.recall == slot.recall:
                leader.followed = True
            marks = [mark for mark in leader.marks() if leader.position < mark <= shared]
            found = self.cached(slot)
            if marks and max(marks) >= (len(found.stream) if found is not None else 0) + LEAST_KEPT:
                return True
        return False

    def place(self, slot: Slot, running: Sequence[Slot]) -> bool:
        """Let `slot` begin, from the longest beginning that was read before, or go on; False: there is no room now."""
        engines = sorted(self.engines, key=lambda engine: self._at_most[id(engine)])
        try:
            if slot.away is not None:
                return self._bring_back(slot, running, engines)
            self._bring_document(slot, running, engines)
            parent = self._parent(slot)
            return (parent is not None and self._go_on(slot, running, engines, parent)) or any(
                self._make_room(engine, self._growth(slot, 0), slot, running, None) and self._open(slot, engine)
                for engine in engines
            )
        except CapacityError:  # all sessions of the engine run
            return False

    def _open(self, slot: Slot, engine: Engine) -> bool:
        slot.begin(Held(self._with_room(slot, engine, lambda: Session(engine, slot.policy))), 0)
        return True

    def _go_on(self, slot: Slot, running: Sequence[Slot], engines: Sequence[Engine], parent: Parked) -> bool:
        """From a fork of `parent`, or from a copy of it on another engine."""
        at, growth = len(parent.stream), self._growth(slot, len(parent.stream), len(parent.keys))
        if self._make_room(parent.engine, growth, slot, running, parent):
            slot.begin(self._with_room(slot, parent.engine, parent.held.fork, parent), at)
            self.prefixes.went_on(parent)
            return True
        for engine in engines:
            more = len(parent.keys) + growth
            if engine is not parent.engine and self._make_room(engine, more, slot, running, None):
                copy = partial(Session.restore, engine, slot.policy, *parent.held.session.state())
                slot.begin(Held(self._with_room(slot, engine, copy)), at)
                self._at_most[id(engine)] += len(parent.keys)
                return True
        return False

    def _bring_back(self, slot: Slot, running: Sequence[Slot], engines: Sequence[Engine]) -> bool:
        cells = slot.away.cells if slot.away is not None else 0
        for engine in engines:
            if self._make_room(engine, cells + self._growth(slot, slot.position, cells), slot, running, None):
                self._with_room(slot, engine, partial(slot.come_back, engine))
                self._at_most[id(engine)] += cells
                return True
        return False

    def _make_room(
        self, engine: Engine, more: int, new: Slot, running: Sequence[Slot], keep: Parked | None
    ) -> bool:
        """Free parked sessions of `engine`, `keep` excepted, until `more` cells for `new` fit beside what was promised;
        none where that would not be enough."""
        here = [slot for slot in running if slot.held is not None and slot.session.engine is engine]
        more += max(scratch_cells(slot.policy) for slot in (*here, new)) + sum(self._growth(slot) for slot in here)
        claim = self._claim(new, running, alone=not here)
        kept = {*self.prefixes.stay(claim), *([keep] if keep is not None else [])}
        stays = [entry.keys for entry in kept if entry.engine is engine]
        # Alone on an engine a request fits, whatever others have come to hold of late.
        if distinct([*(s.held.keys() for s in here if s.held), *stays]) + more > self.cells and (here or stays):
            return False
        while self.used(running, engine) + more > self.cells:
            if not self.prefixes.evict(engine, claim, keep):
                break
        return True

    @staticmethod
    def _claim(new: Slot, running: Sequence[Slot], alone: bool) -> Claim:
        """What makes way so that `new` may begin on an engine; `alone`: nothing else runs there. Before a conversation
        makes way, the background's request does."""
        if new.low or any(slot.low for slot in running):
            return Claim.BACKGROUND
        return Claim.ALL if alone or new.pressing else Claim.REQUEST

    def ensure(self, engine: Engine, more: int, running: Sequence[Slot], claim: Claim) -> bool:
        """Whether `more` cells are free on `engine` now; parked sessions make way for them as `claim` says."""
        while self._at_most[id(engine)] + more > self.cells:
            self._at_most[id(engine)] = self.used(running, engine)
            if self._at_most[id(engine)] + more > self.cells and not self.prefixes.evict(engine, claim):
                return False
        self._at_most[id(engine)] += more
        return True

    # --- what is parked ----------------------------------------------------------------------------------------

    def park(self, slot: Slot, end: bool = False) -> None:
        """Keep what `slot` has read for others: a fork of it, or at its `end` the session itself."""
        stream = slot.stream[: slot.position]
        if end and slot.writing is not None:
            stream = np.concatenate([stream, np.asarray(slot.writing.tokens, dtype=np.int64)])
        document = slot.document.id if slot.document is not None and len(stream) == slot.document_end else None
        if slot.held is None or len(stream) < LEAST_KEPT or self.prefixes.holds(slot.owner, stream):
            return
        held, slot.held = slot.held, None if end else slot.held
        if not end:
            try:
                held = self._with_room(slot, held.session.engine, held.fork)
            except CapacityError:
                return  # keeping it would have been a favour to others
        shared = document is not None or slot.position == slot.script.head or slot.followed
        entry = Parked(held, slot.owner, stream, slot.recall, document, shared and not end)
        self.prefixes.add(entry)
        if not entry.shared:  # the furthest serves the next turn best
            if slot.left in self.prefixes.parked:
                self.prefixes.remove(slot.left)
            slot.left = entry

    def _with_room(self, slot: Slot, engine: Engine, action: Callable[[], T], keep: Parked | None = None) -> T:
        """`action` for `slot`, after freeing parked sessions where the engine has no session left."""
        claim = Claim.BACKGROUND if slot.low else Claim.ALL
        while True:
            try:
                return action()
            except CapacityError:
                if not self.prefixes.evict(engine, claim, keep):
                    raise

    def _parent(self, slot: Slot) -> Parked | None:
        if not slot.reuse and slot.document is None:
            return None
        found = self.prefixes.find(slot.owner, slot.stream, slot.script.recall_at, slot.recall)
        if not slot.reuse and found is not None and found.document is None:
            return None
        return found

    def _bring_document(self, slot: Slot, running: Sequence[Slot], engines: Sequence[Engine]) -> None:
        """Have the document that `slot` asks in memory, if its file can be read."""
        facts, wanted = slot.document, slot.stream[: slot.document_end]
        if facts is None or slot.upload is not None or slot.owner != owner(facts.tenant, facts.policy):
            return
        if self.prefixes.holds(slot.owner, wanted):
            return
        more = facts.kept_cells + self._growth(slot, slot.document_end, facts.kept_cells)
        engine = next((e for e in engines if self._make_room(e, more, slot, running, None)), None)
        if engine is None:
            return
        session = self._with_room(slot, engine, partial(self.documents.open, facts, engine))
        if session is None:
            return
        self._at_most[id(engine)] += facts.kept_cells
        ledger = session.ledger
        real = ~ledger.column("added")
        if not np.array_equal(ledger.tokens[real], slot.script.tokens[: slot.document_end]):
            session.close()
            self.documents.set_aside(facts, "its anchors are those of another text")
            return
        self.prefixes.add(Parked(Held(session), slot.owner, wanted, "", facts.id, True))
