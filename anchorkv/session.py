"""The loop: a stream of tokens is read or written, segments close, anchors stay, everything else is freed.

A sentence of text passes through here once: `read` enters its tokens in the ledger and asks the segmenter where it ends
(`segment.py`); the engine computes its cells, seeing what the rule allows (`visibility.py`); when it has left the
recent window, the scorer says which of its tokens stay (`choice.py`); the others are freed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from anchorkv.choice import Choice
from anchorkv.config import AnchorConfig
from anchorkv.engines.base import SURPRISE, Bools, Engine, Floats, Ints, Memory, Output, surprise_of
from anchorkv.errors import AnchorKVError
from anchorkv.interrupts import deferred_interrupt
from anchorkv.ledger import Accounting, Ledger, State
from anchorkv.segment import Segmenter
from anchorkv.visibility import NEVER, Recalled, dense_mask, visible_from

Progress = Callable[[int], None]
Observer = Callable[[int, Output], None]


class Session:
    """One stream over one engine memory. Not thread-safe; fork it to branch, close it to free its cells."""

    def __init__(
        self, engine: Engine, config: AnchorConfig, *, observe: Observer | None = None,
        observe_needs: frozenset[str] = frozenset(),
    ) -> None:
        """observe: called with the first position and the output of every decode, with `observe_needs` in it."""
        self.engine = engine
        self.observe, self.observe_needs = observe, observe_needs
        self.config = config
        self.memory: Memory = engine.open()
        self.ledger = Ledger(config.recent_window)
        self.segmenter = Segmenter(config, engine.tokenizer.piece)
        self.choice = Choice(engine, config)
        self.current = 0
        """Number of the segment being read."""
        self.logits: Floats | None = None
        """[vocabulary] after the last token; None before the first."""
        self.peak_cells = 0
        self._pending_from = 0
        self._left = 0  # segments below this one have left the recent window
        self._step_ends = False
        self._stale = False  # something may have become invisible since cells were last freed
        self._recalled: dict[int, Ints] = {}  # segment -> positions that a recall brought back

    # --- reading -----------------------------------------------------------------------------------------------

    def read(
        self, tokens: Sequence[int], pinned: Sequence[bool] | None = None, progress: Progress | None = None,
        logits: bool = True,
    ) -> None:
        """Read `tokens` after what was read before. The result is the same however a text is cut into calls.

        pinned: which of them are never dropped. progress: called with the number of tokens done so far.
        logits: False when the caller will read on before it asks for `self.logits`.
        Raises CapacityError when the engine has no cell left; the tokens computed so far stay readable.
        """
        for done, token in enumerate(tokens, start=1):
            pin = pinned is not None and pinned[done - 1]
            self._enter(token, State.PINNED if pin else State.WHOLE)
            if self._show(token):
                with deferred_interrupt():
                    self._close_segment(logits=logits and done == len(tokens))
                if progress:
                    progress(done)
            elif len(self.ledger) - self._pending_from >= self.engine.batch:
                with deferred_interrupt():
                    self._compute(logits=logits and done == len(tokens))
        with deferred_interrupt():
            self._compute(logits=logits)
        if progress:
            progress(len(tokens))

    def reads_on(self, tokens: Sequence[int]) -> bool:
        """Whether `tokens` would be read in one decode that sees all that is held: none of them ends a segment."""
        segmenter = self.segmenter.copy()
        anchors = "EP" in self.config.anchors
        ends = any(segmenter.push(token) or (anchors and segmenter.at_separator) for token in tokens)
        return not ends and self._pending_from == len(self.ledger)

    def end_segment(self) -> None:
        """End the current segment here, whatever it reads like (a turn ends, a document ends)."""
        if len(self.ledger) and self.ledger.column("segment")[-1] == self.current:
            self._compute()
            self.segmenter.end()
            self._close_segment()
            self._compute()

    def _enter(self, token: int, state: State, added: bool = False) -> int:
        if state is State.WHOLE and len(self.ledger) < self.config.sinks and not added:
            state = State.SINK
        return self.ledger.append(token, self.current, state=state, added=added)

    def _show(self, token: int) -> bool:
        """Show the token just entered to the segmenter: whether it ends its segment. A separator is an anchor now."""
        ended = self.segmenter.push(token)
        if self.segmenter.at_separator and "EP" in self.config.anchors:
            self._anchor(len(self.ledger) - 1, "separator (EP)")
        return ended

    def _close_segment(self, logits: bool = True) -> None:
        """The last token entered ends its segment: make its anchors, begin the next one, free what nobody sees."""
        config, ledger = self.config, self.ledger
        if config.ends_are_anchors:
            self._anchor(len(ledger) - 1, "end of its segment (EP)")
        if "AC" in config.anchors:
            for _ in range(config.ac_tokens):
                self._anchor(self._enter(self.engine.tokenizer.anchor_id(), State.WHOLE, added=True), "added (AC)")
        if not self.engine.masks or len(ledger) - self._pending_from >= self.engine.batch:
            self._compute(logits=logits)
        self.current += 1
        self._leave_window()

    def _anchor(self, position: int, reason: str) -> None:
        self.ledger.column("anchor")[position] = True
        # A token that was computed before its segment was ended by force has seen what any token sees.
        self.ledger.column("blind")[position] = self.config.isolated and position >= self._pending_from
        if self.ledger.column("state")[position] == State.WHOLE:
            self.ledger.mark([position], State.ANCHOR, reason)

    # --- computing ---------------------------------------------------------------------------------------------

    def _compute(self, logits: bool = True) -> None:
        """Have the engine compute the cells of all entered tokens, each seeing what the rule says."""
        start, stop = self._pending_from, len(self.ledger)
        if start == stop:
            return
        needs = self.choice.needs & {SURPRISE}
        for first, last in self._runs(start, stop):
            tokens = self.ledger.tokens[first:last].tolist()
            visible, mask = self._sees(first, last)
            wanted = logits and last == stop
            out = self.memory.decode(
                tokens, first, visible=visible, mask=mask, needs=needs | self.observe_needs, logits=wanted
            )
            self._pending_from = last
            self.logits = out.logits if wanted else None
            if needs and out.surprise is not None:
                self.choice.hear(out.surprise)
            if self.observe:
                self.observe(first, out)
        self.peak_cells = max(self.peak_cells, len(self.memory.positions()))
        self._free()

    def _runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Cut the entered tokens into decodes [first, last).

        With masks one decode reads everything, several segments long; without, anchors that see their own segment
        alone need a decode of their own.
        """
        if self.engine.masks:
            return [(start, stop)]
        blind = self.ledger.column("blind")[start:stop]
        cuts = [0, *(np.flatnonzero(np.diff(blind)) + 1).tolist(), stop - start]
        return [(start + a, start + b) for a, b in pairwise(cuts)]

    def _sees(self, first: int, last: int) -> tuple[Ints | None, Bools | None]:
        """(visible, mask) for one decode, as Memory.decode takes them."""
        layout = self.ledger.layout()
        blind = bool(layout.blind[first:last].any())
        if not self.engine.masks:
            if not blind:
                return None, None
            span = self.ledger.span(int(layout.segment[first]))
            return span[span < first], None
        if not blind and layout.segment[first] == layout.segment[last - 1]:
            return None, None
        queries = np.arange(first, last)
        return None, dense_mask(layout, queries, np.concatenate([self.memory.positions(), queries]))

    # --- one token of several sessions in one batch ------------------------------------------------------------

    def begin_step(self, token: int) -> bool:
        """Enter one token for a joint decode. False: it needed a decode of its own and has been read already."""
        if self.observe or self._pending_from < len(self.ledger):
            self.read([token])
            return False
        self._enter(token, State.WHOLE)
        self._step_ends = self._show(token)
        ends_blind = self._step_ends and self.config.ends_are_anchors and self.config.isolated
        if ends_blind or self.ledger.column("blind")[-1]:
            if self._step_ends:
                self._close_segment()
            self._compute()
            return False
        if SURPRISE in self.choice.needs:
            self.choice.hear(np.asarray([surprise_of(next_logits(self), token)], dtype=np.float32))
        return True

    def end_step(self, out: Output) -> None:
        """Take what the joint decode gave for the token that `begin_step` entered."""
        self._pending_from = len(self.ledger)
        self.logits = out.logits
        self.peak_cells = max(self.peak_cells, len(self.memory.positions()))
        if self._step_ends:
            self._close_segment()
            self._compute()

    # --- leaving the recent window -----------------------------------------------------------------------------

    def _leave_window(self) -> None:
        """Segments older than the recent window give up what is not an anchor, a sink or pinned."""
        leaving = range(self._left, max(self._left, self.current - self.config.recent_window))
        for segment in leaving:
            span = self.ledger.span(segment)
            if self.choice.needs and span[-1] >= self._pending_from:
                self._compute()
            self.choice.leave(segment, self.current, self.ledger, self.memory)
            self._left = segment + 1
            state, anchors = self.ledger.column("state")[span], self.ledger.column("anchor")[span]
            gone = span[(state == State.WHOLE) & ~anchors]
            self.ledger.mark(gone, State.DROPPED, self.choice.why_dropped)
        if leaving:
            self.choice.fit_budget(self._left, self.current, self.ledger)
            self._stale = True
        self._free()

    def _free(self) -> None:
        """Free every held cell that no later query can see."""
        if not self._stale:
            return
        keys = self.memory.positions()
        # A segment whose anchors are still to be chosen stays; and tokens entered but not computed yet are queries
        # still to come: what they see must stay.
        segment = min(self.current, self._left + self.config.recent_window)
        if self._pending_from < len(self.ledger):
            segment = int(self.ledger.column("segment")[self._pending_from])
        else:
            self._stale = False
        unseen = keys[~visible_from(self.ledger.layout(), segment, keys)]
        if len(unseen):
            self.memory.drop(unseen)

    # --- recall ------------------------------------------------------------------------------------------------

    def recall(self, segment: int, reason: str) -> bool:
        """Make `segment` visible again, token for token, by running it once more against what precedes it.

        Exact with w = 0 and nothing evicted before it: its cells depend only on itself and on the anchors before it.
        With w > 0 it once saw whole neighbours that are gone: approximate, and the ledger says so.
        Returns False when nothing of it is dropped.
        """
        span = self.ledger.span(segment)
        lost = span[self.ledger.column("state")[span] == State.DROPPED]
        if not len(lost):
            return False
        self._compute()
        positions = self.memory.positions()
        earlier = positions[positions < span[0]]
        anchors = self.ledger.column("anchor")[earlier] | self.ledger.column("always")[earlier]
        self.memory.decode(
            self.ledger.tokens[span].tolist(), int(span[0]), visible=earlier[anchors], logits=False
        )
        self.ledger.recalls.append(Recalled(segment, len(self.ledger), NEVER))
        gone = bool((self.ledger.column("evicted")[: span[0]] != NEVER).any())
        kind = "exact" if self.config.recent_window == 0 and not gone else "approximate"
        self.ledger.mark(lost, State.RECALLED, f"{reason} ({kind})")
        self._recalled[segment] = lost
        self.peak_cells = max(self.peak_cells, len(self.memory.positions()))
        return True

    def release(self, segment: int, reason: str = "recall ended") -> None:
        """Drop again what `recall` brought back. Does nothing when `segment` is not recalled."""
        lost = self._recalled.pop(segment, None)
        if lost is None:
            return
        self.ledger.recalls = [
            Recalled(r.segment, r.first, len(self.ledger)) if r.segment == segment and r.last == NEVER else r
            for r in self.ledger.recalls
        ]
        self.ledger.mark(lost, State.DROPPED, reason)
        self._stale = True
        self._free()

    @property
    def recalled(self) -> dict[int, int]:
        """Recalled segments now, each with the number of cells that it brought back."""
        return {segment: len(lost) for segment, lost in self._recalled.items()}

    # --- branching, accounting ---------------------------------------------------------------------------------

    def fork(self) -> Session:
        """An independent session that continues from here; the cells are shared until one of them writes."""
        self._compute()
        other = object.__new__(Session)
        other.__dict__.update(self.__dict__)
        other.memory = self.memory.fork()
        other.ledger = self.ledger.copy()
        other.segmenter = self.segmenter.copy()
        other.choice = self.choice.copy()
        other._recalled = dict(self._recalled)
        return other

    def state(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Arrays and JSON-able fields that `restore` takes."""
        self._compute()
        ledger, fields = self.ledger.state()
        arrays = {f"ledger.{name}": values for name, values in ledger.items()}
        arrays |= {f"memory.{name}": values for name, values in self.memory.state().items()}
        arrays |= {f"recalled.{segment}": lost for segment, lost in self._recalled.items()}
        chosen, choice = self.choice.state()
        arrays |= chosen
        if self.logits is not None:
            arrays["logits"] = self.logits
        own = {
            "current": self.current, "left": self._left, "peak_cells": self.peak_cells,
            "ledger": fields, **choice,
        }
        return arrays, own

    @classmethod
    def restore(
        cls, engine: Engine, config: AnchorConfig, arrays: dict[str, npt.NDArray[Any]], fields: dict[str, Any]
    ) -> Session:
        """A session as `state` gave it. Raises KeyError, TypeError or ValueError when the parts do not fit."""

        def part(prefix: str) -> dict[str, npt.NDArray[Any]]:
            return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}

        session = cls(engine, config)
        session.memory.close()
        session.memory = engine.restore(part("memory."))
        session.ledger = Ledger.restore(part("ledger."), fields["ledger"])
        session.choice.restore(arrays, fields)
        session.current, session._left = int(fields["current"]), int(fields["left"])
        session.peak_cells = int(fields["peak_cells"])
        session._recalled = {int(segment): lost for segment, lost in part("recalled.").items()}
        session.logits = arrays.get("logits")
        session._pending_from = len(session.ledger)
        session._replay()
        return session

    def _replay(self) -> None:
        """Bring segmenter and scorer to where they were: both follow from the tokens and the ledger alone."""
        segment, added = self.ledger.column("segment"), self.ledger.column("added")
        real = np.flatnonzero(~added)
        for at, position in enumerate(real):
            ended = self.segmenter.push(int(self.ledger.tokens[position]))
            follows = real[at + 1] if at + 1 < len(real) else None
            number = self.current if follows is None else segment[follows]
            if not ended and number != segment[position]:
                self.segmenter.end()

    def accounting(self) -> Accounting:
        """Cells and bytes now, at the peak, and for a full cache of the same text."""
        cell, full = self.engine.info.cell_bytes, self.ledger.real_tokens()
        return Accounting(
            kept_cells=self.memory.nbytes() // cell, peak_cells=self.peak_cells, full_cells=full,
            kept_bytes=self.memory.nbytes(), peak_bytes=self.peak_cells * cell, full_bytes=full * cell,
        )

    def close(self) -> None:
        """Free the cells. A closed session must not be used."""
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def next_logits(session: Session) -> Floats:
    """The logits after the last token read. Raises AnchorKVError when nothing was read."""
    if session.logits is None:
        raise AnchorKVError("Nothing has been read yet: read at least one token before asking what comes next.")
    return session.logits
