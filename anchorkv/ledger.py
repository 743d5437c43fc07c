"""What is kept, dropped, pinned, recalled, and why: every token's state, every change with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from anchorkv.visibility import NEVER, Bools, Ints, Layout, Recalled


class State(IntEnum):
    """Where a token's cell is now."""

    WHOLE = 0
    """In the current segment or the recent window."""
    ANCHOR = 1
    SINK = 2
    PINNED = 3
    DROPPED = 4
    RECALLED = 5


@dataclass(frozen=True)
class Change:
    """`count` tokens of `segment` went to `state` when the stream was `at` tokens long."""

    at: int
    segment: int
    count: int
    state: str
    reason: str


@dataclass(frozen=True)
class Accounting:
    """Cells and bytes, as the engine counts them; `full_*`: what the same stream takes with nothing dropped."""

    kept_cells: int
    peak_cells: int
    full_cells: int
    kept_bytes: int
    peak_bytes: int
    full_bytes: int

    @property
    def reduction(self) -> float:
        """Full cells per kept cell, now."""
        return self.full_cells / max(1, self.kept_cells)

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "reduction": round(self.reduction, 3)}


_COLUMNS: dict[str, npt.DTypeLike] = {
    "token": np.int64, "segment": np.int64, "state": np.int8, "anchor": np.bool_, "always": np.bool_,
    "blind": np.bool_, "added": np.bool_, "evicted": np.int64, "score": np.float32,
}


class Ledger:
    """The record of one stream. Arrays are indexed by position; they grow as the stream is read."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.changes: list[Change] = []
        self.recalls: list[Recalled] = []
        self.length = 0
        self._columns = {name: np.zeros(256, dtype=kind) for name, kind in _COLUMNS.items()}

    def __len__(self) -> int:
        return self.length

    def column(self, name: str) -> npt.NDArray[Any]:
        """A writable view [len(self)] of one column: token, segment, state, anchor, always, blind, added, evicted, and
        score (of a scorer; NaN where none was asked)."""
        return self._columns[name][: self.length]

    @property
    def tokens(self) -> Ints:
        return self.column("token")

    @property
    def segments(self) -> int:
        """Number of segments begun."""
        return int(self.column("segment")[-1]) + 1 if self.length else 0

    def append(self, token: int, segment: int, *, state: State = State.WHOLE, added: bool = False) -> int:
        """Enter one token; returns its position."""
        at = self.length
        if at == len(self._columns["token"]):
            self._columns = {name: np.concatenate([old, np.zeros_like(old)]) for name, old in self._columns.items()}
        self.length += 1
        columns = self._columns
        columns["token"][at], columns["segment"][at], columns["state"][at] = token, segment, state
        columns["added"][at] = added
        columns["always"][at] = state in (State.SINK, State.PINNED)
        columns["evicted"][at] = NEVER
        columns["score"][at] = np.nan
        return at

    def layout(self) -> Layout:
        """What the rule needs, as views (later changes show through)."""
        return Layout(
            segment=self.column("segment"), anchor=self.column("anchor"), always=self.column("always"),
            blind=self.column("blind"), evicted=self.column("evicted"), window=self.window, recalls=self.recalls,
        )

    def span(self, segment: int) -> Ints:
        """Positions of `segment`, added anchors included."""
        column = self.column("segment")
        return np.arange(np.searchsorted(column, segment), np.searchsorted(column, segment, side="right"))

    def mark(self, positions: Sequence[int] | Ints, state: State, reason: str) -> None:
        """Set the state of `positions` and record why, one change a segment."""
        where = np.asarray(positions, dtype=np.int64)
        if not len(where):
            return
        self.column("state")[where] = state
        numbers, counts = np.unique(self.column("segment")[where], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            self.changes.append(Change(self.length, number, count, state.name.lower(), reason))

    def dropped_segments(self) -> list[int]:
        """Segments that have dropped tokens now, ascending."""
        numbers: list[int] = np.unique(self.column("segment")[self.column("state") == State.DROPPED]).tolist()
        return numbers

    def reasons(self, segment: int) -> Iterator[Change]:
        """Every change of `segment`, oldest first."""
        return (change for change in self.changes if change.segment == segment)

    def counts(self) -> dict[str, int]:
        """Tokens in each state now."""
        found = Counter(self.column("state").tolist())
        return {state.name.lower(): found.get(int(state), 0) for state in State}

    def real_tokens(self) -> int:
        """Tokens of the text: what a full cache would hold. Added anchors are not among them."""
        return int(self.length - self.column("added").sum())

    def held(self) -> Bools:
        """Which positions the rule says are held, [len(self)] (the engine must agree)."""
        held: Bools = self.column("state") != State.DROPPED
        return held

    def copy(self) -> Ledger:
        other = Ledger(self.window)
        other.changes, other.recalls, other.length = list(self.changes), list(self.recalls), self.length
        other._columns = {name: column.copy() for name, column in self._columns.items()}
        return other

    def state(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Arrays and JSON-able fields that `restore` takes."""
        arrays = {name: self.column(name).copy() for name in _COLUMNS}
        fields = {
            "window": self.window,
            "changes": [asdict(change) for change in self.changes],
            "recalls": [asdict(recall) for recall in self.recalls],
        }
        return arrays, fields

    @classmethod
    def restore(cls, arrays: dict[str, npt.NDArray[Any]], fields: dict[str, Any]) -> Ledger:
        """Raises KeyError, TypeError or ValueError when something is missing or of another shape."""
        ledger = cls(int(fields["window"]))
        ledger.changes = [Change(**change) for change in fields["changes"]]
        ledger.recalls = [Recalled(**recall) for recall in fields["recalls"]]
        columns = {name: np.ascontiguousarray(arrays[name], dtype=kind) for name, kind in _COLUMNS.items()}
        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1:
            raise ValueError("ledger columns differ in length")
        ledger.length = lengths.pop()
        ledger._columns = {name: np.concatenate([c, np.zeros(1, dtype=c.dtype)]) for name, c in columns.items()}
        return ledger
