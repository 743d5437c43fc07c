"""What the engine thread does, round by round: admit, read a slice of one prompt, write a token in every answer.

A slice takes about as long as a step, so that a long prompt never starves answers, nor answers a prompt.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace

from anchorkv.errors import AnchorKVError, CapacityError
from anchorkv.serve.cells import scratch_cells
from anchorkv.serve.documents import Documents, Snapshot
from anchorkv.serve.figures import Figures, Share, mean
from anchorkv.serve.handle import Waking
from anchorkv.serve.keeping import Keeping
from anchorkv.serve.prefixes import Claim, owner
from anchorkv.serve.queues import Queues
from anchorkv.serve.requests import Finish
from anchorkv.serve.room import Room
from anchorkv.serve.slots import Slot, Upload
from anchorkv.serve.steps import Steps

log = logging.getLogger("anchorkv.serve")
LEAST_SLICE = 32
"""Tokens of a prompt that are read between two steps, at least."""
BACKGROUND_SLICE = 64
"""Tokens that a request of low priority reads at a time."""


class Rounds:
    """Belongs to the engine thread."""

    def __init__(
        self, room: Room, documents: Documents, files: Executor, clock: Callable[[], float], *, max_sessions: int,
        slice_tokens: int, background_share: float,
    ) -> None:
        self._room, self._documents, self._clock = room, documents, clock
        self._max_sessions, self._slice_tokens, self._share = max_sessions, slice_tokens, Share(background_share)
        self.waiting, self.low = Queues(), Queues()
        self.calls: deque[Callable[[], None]] = deque()
        """What other threads want done on this one."""
        self.waking = Waking()
        self._steps = Steps(room.engines)
        self._keeping = Keeping(documents, files, room.prefixes, self.calls.append)
        self.running: list[Slot] = []
        self.background: Slot | None = None
        self.figures = Figures()
        self.look = True
        """Something changed: a request may fit now."""
        self.on_gap: Callable[[float], None] = lambda seconds: None
        """Told how long each token of an answer came after the one before it."""
        self._next = 0

    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._at_work() or len(self.low))

    def busy(self) -> bool:
        """Whether a round would get something done now; else the background waits for room, which takes a while."""
        return self._at_work() or (self.look and len(self.low) > 0)

    def _at_work(self) -> bool:
        return bool(self.running or self.background or self.calls or len(self.waiting))

    def round(self) -> None:
        try:
            self._round()
        finally:
            self.waking.now()

    def _round(self) -> None:
        while self.calls:
            self.calls.popleft()()
        self._drop_cancelled()
        self._admit()
        self._read()
        for slot in [slot for slot in self.running if not slot.reading]:
            if slot.upload is not None:  # the same text may have been read before, so that nothing was left to read
                self._keep_document(slot, slot.upload)
        self._write([slot for slot in self.running if not slot.reading])
        self._serve_background()

    def cancel_all(self) -> None:
        """End everything, and free all cells."""
        for slot in [*self.running, *self.waiting.all(), *self.low.all()]:
            self._end(slot, "cancelled")
        if self.background is not None:
            self._end(self.background, "cancelled")
        self._room.prefixes.clear()
        self.waking.now()

    def close(self) -> None:
        """After `cancel_all`, for good."""
        self._steps.close()

    # --- admission ---------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        slots = [*self.running, *self.waiting.all(), *self.low.all()]
        for slot in [*slots, *([self.background] if self.background else [])]:
            if slot.cancelled:
                self._end(slot, "cancelled")

    def _admit(self) -> None:
        if not (self.look or not self.running or self._looks_anyway()):
            return
        if self.look:
            found = {slot: self._room.cached(slot) for slot in self.waiting.all()}
            for slot, entry in found.items():
                slot.expected = len(entry.stream) if entry is not None else 0
            self._room.prefixes.want(found.values())
        self.look = False
        # Those that had to leave come back before others come in.
        while self._admit_one(sorted(self.waiting.heads(), key=lambda slot: slot.away is None)):
            pass

    def _looks_anyway(self) -> bool:
        """What running requests free on their way makes room as well, so look now and then without being told."""
        return self.figures.steps % 16 == 0

    def _admit_one(self, heads: list[Slot]) -> bool:
        """Admit the first of `heads` that may begin; False when none may."""
        passed: list[Slot] = []
        for slot in heads if len(self.running) < self._max_sessions else ():
            if self._room.follows(slot, self.running):
                continue
            if self._place(slot):
                self.waiting.admitted(slot)
                self.running.append(slot)
                for other in passed:
                    other.overtaken += 1
                return True
            if slot.away is not None or slot.pressing:
                return False
            passed.append(slot)
        return False

    def _place(self, slot: Slot) -> bool:
        """Let `slot` begin; a background request makes way for it."""
        low = self.background
        if self._room.place(slot, self._active()):
            return True
        if low is None:
            return False
        self._send_away(low)
        return self._room.place(slot, self.running)

    def _secure(self, slot: Slot, more: int, alone: int) -> bool:
        """See to it that `more` cells are free on the engine of `slot`; if need be the background's request, then the
        youngest ones, leave for a while. alone: enough for `slot` itself; False when there are not even so many."""
        engine, low = slot.session.engine, self.background
        if low is not None and low.held is not None and low.session.engine is engine:
            if self._room.ensure(engine, alone if slot is low else more, self._active(), Claim.BACKGROUND):
                return True
            self._send_away(low)
            if slot is low:
                return True
        while not self._room.ensure(engine, more, self._active(), Claim.REQUEST):
            here = [other for other in self.running if other.held is not None and other.session.engine is engine]
            if len(here) < 2:
                return self._room.ensure(engine, alone, here, Claim.ALL)
            # Nobody notices when a prompt is read later; an answer that stops is seen.
            self._send_away(next((other for other in reversed(here) if other.reading), here[-1]))
        return True

    def _active(self) -> list[Slot]:
        """Running requests in the order in which they came, the background's last."""
        return [*self.running, *([self.background] if self.background is not None else [])]

    def _send_away(self, slot: Slot) -> None:
        """`slot` gives up its cells and waits for its turn once more; it will go on where it was."""
        log.info("a request leaves the engine for a while, for want of cells")
        self.figures.sent_away += 1
        slot.leave()
        if slot is self.background:
            self.background = None
            self.low.put(slot, first=True)
        else:
            self.running.remove(slot)
            self.waiting.put(slot, first=True)

    # --- reading -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """A slice of the prompt whose turn it is, and where that one ends, of the next ones'."""
        left = self._slice() if any(not slot.reading for slot in self.running) else self._slice_tokens
        while left > 0 and (reading := [slot for slot in self.running if slot.reading]):
            self._next += 1
            done = self._read_slice(reading[self._next % len(reading)], left)
            if not done:
                break
            left -= done

    def _slice(self) -> int:
        """Tokens that take about as long to read as a step takes."""
        fair = round(self.figures.step_seconds * self.figures.read_rate)
        return min(self._slice_tokens, max(LEAST_SLICE, fair))

    def _read_slice(self, slot: Slot, budget: int) -> int:
        """Up to `budget` tokens of its prompt; the number of tokens read."""
        begun, done = self._clock(), 0
        try:
            while done < budget and slot.reading:
                more = slot.grows_by(budget - done) + scratch_cells(slot.policy)
                if not self._secure(slot, more, min(more, slot.growth() + scratch_cells(slot.policy))):
                    raise CapacityError("This request needs more KV cells than there are.")
                if slot.held is None:
                    break
                done += slot.read(budget - done)
                if slot.pure and slot.position in slot.marks():
                    self._keep(slot)
        except AnchorKVError as error:
            self._end(slot, "error", str(error))
        except Exception:
            log.exception("reading request %s failed", slot.ask.id if slot.ask else "of a document")
            self._end(slot, "error", "The server failed while it read this prompt; the fault is in its log.")
        seconds = self._clock() - begun
        self.figures.prompt_tokens += done
        self.figures.prefill_seconds += seconds
        if done >= LEAST_SLICE and seconds > 0:
            self.figures.read_rate = mean(self.figures.read_rate, done / seconds)
        return done

    def _keep(self, slot: Slot) -> None:
        """Leave what `slot` has read to others; a document whose file was lost is written again."""
        document = slot.document if slot.position == slot.document_end else None
        self._room.park(slot)
        if document is None or slot.owner != owner(document.tenant, document.policy):
            return
        if self._documents.lacks(document):
            self._keeping.mend(document, Snapshot.of(slot.session))

    def _keep_document(self, slot: Slot, upload: Upload) -> None:
        """An upload has been read: park it, and have it written to disk beside the engine's work."""
        figures = slot.session.accounting()
        facts = replace(
            upload.facts, kept_cells=figures.kept_cells, kv_bytes=figures.kept_bytes,
            reading_seconds=self._clock() - slot.times.begun,
        )
        snapshot = Snapshot.of(slot.session)
        self._room.park(slot, end=True)
        slot.close()
        self._gone(slot)
        self._keeping.keep(upload, facts, snapshot)

    # --- writing -----------------------------------------------------------------------------------------------

    def _write(self, slots: list[Slot]) -> None:
        """One token in each of these answers."""
        begun = self._clock()
        writing: list[tuple[Slot, int]] = []
        for engine in self._room.engines:
            writing += self._drawn([s for s in slots if s.held is not None and s.session.engine is engine])
        if not writing:
            return
        self._step(writing)
        self.figures.completion_tokens += len(writing)
        seconds = self._clock() - begun
        self.figures.steps += 1
        self.figures.decode_seconds += seconds
        self.figures.step_seconds = mean(self.figures.step_seconds, seconds)

    def _drawn(self, slots: list[Slot]) -> list[tuple[Slot, int]]:
        """The next token of each of these, all of one engine, which then has room for them."""
        for slot in slots:
            if slot.held is not None and slot.ended_segment is not None:
                self._recall_on(slot)
        slots = [slot for slot in slots if slot.held is not None]
        more = sum(1 + slot.policy.ac_tokens for slot in slots)
        more += max((scratch_cells(slot.policy) for slot in slots), default=0)
        if slots and not self._secure(slots[0], more, more):
            self._end(slots[0], "error", "This request needs more KV cells than there are.")
        return [(slot, token) for slot in slots if slot.held is not None and (token := self._draw(slot)) is not None]

    def _draw(self, slot: Slot) -> int | None:
        before = slot.times.last
        try:
            token = slot.draw()
        except Exception:
            log.exception("choosing a token failed")
            self._end(slot, "error", "The server failed while it chose a token; the fault is in its log.")
            return None
        if token is None:
            self._finish(slot)
        elif before and not slot.low:
            self.on_gap(slot.times.last - before)
        return token

    def _step(self, writing: list[tuple[Slot, int]]) -> None:
        """Read back what was written; a slot that fails ends."""

        def fail(index: int, error: AnchorKVError) -> None:
            log.warning("a request ended while it was written: %s", error)
            self._end(writing[index][0], "error", str(error))

        sessions, tokens = [slot.session for slot, _ in writing], [token for _, token in writing]
        before = [session.current for session in sessions]
        self.waking.now()  # tokens are sent while the next ones are computed
        try:
            self._steps.step(sessions, tokens, self._room.prefixes.evict, fail)
        except Exception:
            log.exception("a joint step failed")
            for slot, _ in writing:
                if slot.held is not None:
                    self._end(slot, "error", "The server failed while it wrote; the fault is in its log.")
        for (slot, _), segment in zip(writing, before, strict=True):
            if slot.held is None:
                continue
            slot.stepped(segment)
            if slot.writing is not None and slot.writing.finish is not None:
                self._finish(slot)

    def _recall_on(self, slot: Slot) -> None:
        try:
            more = slot.policy.recall_cells + scratch_cells(slot.policy)
            self._secure(slot, more, more)
            if slot.held is not None:
                slot.recall_on()
        except AnchorKVError as error:
            self._end(slot, "error", str(error))

    # --- the end -----------------------------------------------------------------------------------------------

    def _finish(self, slot: Slot) -> None:
        writing = slot.writing
        self._end(slot, writing.finish if writing is not None and writing.finish is not None else "stop")

    def _end(self, slot: Slot, finish: Finish, error: str = "") -> None:
        """Free the cells of `slot`, or leave them to whoever goes on from here, and tell the caller."""
        if slot.handle is not None and slot.writing is not None:
            last = slot.writing.flush()
            outcome = slot.outcome(finish, error)
            if finish in ("stop", "length"):
                self._room.learn(slot, outcome.peak_cells)
            if finish in ("stop", "length") and slot.keeps_answer:
                self._room.park(slot, end=True)
            slot.close()
            self.figures.cached_tokens += outcome.cached_tokens
            took = outcome.prefill_seconds + outcome.decode_seconds
            self.figures.request_seconds = mean(self.figures.request_seconds, took)
            if last is not None:
                slot.handle.put(last)
            slot.handle.end(outcome)
        else:
            slot.close()
            if slot.upload is not None and slot.upload.done.set_running_or_notify_cancel():
                reason = error or "The server stopped before the document was read."
                slot.upload.done.set_exception(AnchorKVError(reason))
        self._gone(slot)

    def _gone(self, slot: Slot) -> None:
        self.look = True
        if slot in self.running:
            self.running.remove(slot)
        elif slot is self.background:
            self.background = None
        else:
            queue = self.low if slot.low else self.waiting
            queue.remove(slot)

    # --- low priority ------------------------------------------------------------------------------------------

    def _serve_background(self) -> None:
        """A slice or a token of the background's request, when nothing else runs or its share is not used up."""
        figures = self.figures
        left = self._share.left(figures.prefill_seconds + figures.decode_seconds)
        if self.running and not left:
            return
        if self.background is None and not len(self.waiting) and (not self.running or self._looks_anyway()):
            for slot in self.low.heads():
                if self._room.place(slot, self.running):
                    self.low.admitted(slot)
                    self.background = slot
                    break
        slot_ = self.background
        if slot_ is None:
            return
        begun, before = self._clock(), replace(figures)
        if slot_.reading:
            self._read_slice(slot_, BACKGROUND_SLICE)
        else:
            self._write([slot_])
        figures.step_seconds, figures.read_rate = before.step_seconds, before.read_rate
        figures.prefill_seconds, figures.decode_seconds = before.prefill_seconds, before.decode_seconds
        seconds = self._clock() - begun
        figures.low_seconds += seconds
        if self.running:  # idle time costs nobody anything
            self._share.take(seconds)
