"""One session's cells in llama.cpp: a sequence id, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from anchorkv.engines.base import SURPRISE, Bools, Cells, Floats, Ints, Output
from anchorkv.engines.llama_state import META, read_cells
from anchorkv.errors import ModelError

if TYPE_CHECKING:
    from anchorkv.engines.llama import LlamaEngine

SCRATCH, ALIAS, FIRST = 0, 1, 2
"""Sequence ids: what a token decoded aside may see; one cell on its way there; the first of those of sessions."""


class LlamaMemory:
    """Implements `engines.base.Memory` as one sequence id. `held`: positions held, ascending, [m]."""

    def __init__(self, engine: LlamaEngine, sequence: int, held: Ints) -> None:
        self._engine, self.sequence, self.held = engine, sequence, held
        self.last_logits: Floats | None = None

    def decode(
        self, tokens: Sequence[int], start: int, *, visible: Ints | None = None, mask: Bools | None = None,
        needs: frozenset[str] = frozenset(), logits: bool = True,
    ) -> Output:
        """As the protocol says; takes no mask."""
        if mask is not None:
            raise ModelError("The llama engine takes no mask: llama.cpp decides visibility by sequences.")
        if needs - {SURPRISE}:
            raise ModelError(f"The llama engine cannot give {', '.join(sorted(needs - {SURPRISE}))}.")
        engine, before = self._engine, self.last_logits
        recalled = len(self.held) > 0 and start < int(self.held[-1])
        surprise: list[Floats] = []
        for first in range(0, len(tokens), engine.batch):
            part = tokens[first : first + engine.batch]
            last = first + len(part) == len(tokens)
            seen = None if visible is None else np.concatenate([visible, np.arange(start, start + first)])
            self._decode_part(part, start + first, seen, SURPRISE in needs, logits and last)
            if SURPRISE in needs:
                surprise.append(self._surprise(part))
            wanted = SURPRISE in needs or (logits and last)
            self.last_logits = engine._logits(len(part) - 1) if wanted else None
        given = self.last_logits if self.last_logits is not None else np.zeros(0, dtype=np.float32)
        if recalled:  # what old tokens predict is not what comes next
            self.last_logits = before
        return Output(given, np.concatenate(surprise) if surprise else None)

    def _decode_part(self, tokens: Sequence[int], start: int, visible: Ints | None, every: bool, last: bool) -> None:
        engine, kv = self._engine, self._engine._kv
        count = len(tokens)
        wanted = [every or (last and index == count - 1) for index in range(count)]
        new = np.arange(start, start + count)
        if visible is None and self.continues_at(start):
            rows = zip(tokens, new.tolist(), [self.sequence] * count, wanted, strict=True)
            engine._run(list(rows))
            self.held = np.concatenate([self.held, new])
            return
        seen = self.held[self.held < start] if visible is None else visible
        try:
            for first, end in self._intervals(np.isin(self.held, seen)):
                llama_cpp.llama_memory_seq_cp(kv, self.sequence, SCRATCH, first, end)
            if len(seen) and seen[-1] != start - 1:
                engine._alias(SCRATCH, int(seen[-1]), start - 1)
            engine._run(list(zip(tokens, new.tolist(), [SCRATCH] * count, wanted, strict=True)))
            kv = engine._kv  # the context may have grown
            kept = new[~np.isin(new, self.held)]
            for first, end in _runs(kept):
                llama_cpp.llama_memory_seq_cp(kv, SCRATCH, self.sequence, first, end)
        finally:
            llama_cpp.llama_memory_seq_rm(engine._kv, SCRATCH, -1, -1)
            llama_cpp.llama_memory_seq_rm(engine._kv, ALIAS, -1, -1)
        self.held = np.union1d(self.held, kept)

    def continues_at(self, position: int) -> bool:
        """Whether llama.cpp lets the sequence itself go on at `position`."""
        return not len(self.held) or int(self.held[-1]) == position - 1

    def _surprise(self, tokens: Sequence[int]) -> Floats:
        """-log p of each token, [n]; the first by the logits before it (log of the vocabulary if there are none)."""
        rows = self._engine._all_logits(len(tokens))
        before = self.last_logits
        size = rows.shape[1]
        out = np.empty(len(tokens), dtype=np.float32)
        out[0] = np.log(size) if before is None else _nll(before[None, :], np.asarray(tokens[:1]))[0]
        for first in range(0, len(tokens) - 1, 64):
            last = min(first + 64, len(tokens) - 1)
            out[first + 1 : last + 1] = _nll(rows[first:last], np.asarray(tokens[first + 1 : last + 1]))
        return out

    def drop(self, positions: Ints) -> None:
        gone = np.isin(self.held, positions)
        for first, end in self._intervals(gone):
            llama_cpp.llama_memory_seq_rm(self._engine._kv, self.sequence, first, end)
        self.held = self.held[~gone]

    def _intervals(self, chosen: Bools) -> Iterator[tuple[int, int]]:
        """Chosen held positions as few intervals [first, end) that hold no other held position."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]])))
        for first, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            yield int(self.held[first]), int(self.held[end - 1]) + 1

    def fork(self) -> LlamaMemory:
        engine = self._engine
        sequence = engine._take_sequence()
        llama_cpp.llama_memory_seq_cp(engine._kv, self.sequence, sequence, -1, -1)
        other = LlamaMemory(engine, sequence, self.held.copy())
        other.last_logits = self.last_logits
        return other

    def positions(self) -> Ints:
        return self.held

    def nbytes(self) -> int:
        """From the size of the sequence's state, which llama.cpp counts over its own cells."""
        engine = self._engine
        cells = (engine._state_size(self.sequence) - engine._state_base) // (engine.info.cell_bytes + META.itemsize)
        return max(0, cells) * engine.info.cell_bytes

    def read_cells(self, positions: Ints) -> Cells:
        """As the protocol says."""
        engine = self._engine
        for first, end in _runs(positions):
            llama_cpp.llama_memory_seq_cp(engine._kv, self.sequence, ALIAS, first, end)
        try:
            found, cells = read_cells(engine._state_blob(ALIAS))
        finally:
            llama_cpp.llama_memory_seq_rm(engine._kv, ALIAS, -1, -1)
        if not np.array_equal(found, positions):
            raise ModelError("Cells that are not held cannot be read.")
        return cells

    def state(self) -> dict[str, npt.NDArray[Any]]:
        state: dict[str, npt.NDArray[Any]] = {
            "positions": self.held.copy(), "cells": self._engine._state_blob(self.sequence),
        }
        if self.last_logits is not None:
            state["logits"] = self.last_logits
        return state

    def close(self) -> None:
        if self.sequence >= 0:
            self._engine._give_back(self.sequence)
            self.sequence = -1


def _runs(positions: Ints) -> Iterator[tuple[int, int]]:
    """Consecutive positions as intervals [first, end)."""
    if len(positions):
        for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
            yield int(run[0]), int(run[-1]) + 1


def _nll(logits: Floats, tokens: Ints) -> Floats:
    """-log softmax(logits)[token], rows [n, vocabulary] and tokens [n] to [n]."""
    top = logits.max(axis=1, keepdims=True)
    total: Floats = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0] - logits[np.arange(len(tokens)), tokens]
    return total
