"""The llama.cpp engine: quantised models on CPUs and on every GPU llama.cpp supports; unmodified llama.cpp, no torch.

One context holds many sessions as sequence ids; a cell may belong to several (a fork costs nothing). A token sees the
cells of its own sequence at lower positions, so what a token must not see is either dropped or the token is decoded in
a *scratch* sequence that holds only what it may see, and its cells are then handed to the session's sequence.

llama.cpp insists that a sequence continues at its last position + 1, which a thinned past may have dropped. The scratch
sequence then carries one visible cell under that position (its keys keep their true rotation, so attention is exact).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from anchorkv.engines.base import SURPRISE, Bools, Cells, Floats, Ints, ModelInfo, Output, Tokenizer
from anchorkv.engines.llama_file import describe, fast_copy, open_model
from anchorkv.engines.llama_state import META, metas, read_cells
from anchorkv.engines.llama_vocab import LlamaTokenizer
from anchorkv.errors import CapacityError, ModelError, SavedStateError

_SCRATCH, _ALIAS, _FIRST = 0, 1, 2
_KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}


class LlamaEngine:
    """Implements `engines.base.Engine`."""

    name = "llama"
    masks = False

    def __init__(
        self, path: Path, *, threads: int | None = None, cells: int = 1024, sessions: int = 62, batch: int = 512,
        flash_attention: bool = False, kv_type: str = "f16", gpu_layers: int = -1,
    ) -> None:
        """cells: KV cells allocated at first; the context grows when a policy needs more.

        Raises ModelError when the file cannot be used, CapacityError when the context cannot be allocated.
        """
        if kv_type not in _KV_TYPES:
            raise ModelError(f"KV cells are stored as {', '.join(_KV_TYPES)}, not {kv_type}.")
        if kv_type != "f16" and not flash_attention:
            flash_attention = True  # llama.cpp quantises V only there
        self.path, self.batch = path, batch
        self._model = open_model(path, gpu_layers)
        self._options = (threads or len(os.sched_getaffinity(0)), sessions + _FIRST, flash_attention, kv_type)
        self._context: Any = None
        try:
            self._open_context(cells)
        except CapacityError:
            llama_cpp.llama_model_free(self._model)
            raise
        self._batch = _Batch(batch)
        self._free_sequences = list(range(sessions + _FIRST - 1, _FIRST - 1, -1))
        self.info: ModelInfo = describe(self._model, path, self._measure_cell())
        template = llama_cpp.llama_model_chat_template(self._model, None)
        self.tokenizer: Tokenizer = LlamaTokenizer(self._model, template.decode() if template else None)

    @classmethod
    def load(
        cls, path: str | Path, *, threads: int | None = None, weights: str = "fast", **options: Any
    ) -> LlamaEngine:
        """weights: "fast" reads a file whose quantisation llama.cpp runs slowly from a cached Q8_0 copy (see
        docs/performance.md), "as-is" never does."""
        path = Path(path)
        if weights == "fast":
            path = fast_copy(path)
        return cls(path, threads=threads, **options)

    # --- the protocol ------------------------------------------------------------------------------------------

    def open(self) -> LlamaMemory:
        """Raises CapacityError when all sequence ids are taken."""
        return LlamaMemory(self, self._take_sequence(), np.zeros(0, dtype=np.int64))

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> LlamaMemory:
        positions = np.asarray(state["positions"], dtype=np.int64)
        blob = np.ascontiguousarray(state["cells"], dtype=np.uint8)
        sequence = self._take_sequence()
        self._reserve(len(positions))
        buffer = (ctypes.c_uint8 * len(blob)).from_buffer_copy(blob.tobytes())
        if len(positions) and llama_cpp.llama_state_seq_set_data(self._context, buffer, len(blob), sequence) == 0:
            self._give_back(sequence)
            raise SavedStateError("llama.cpp did not accept the saved cells; read the document again.")
        memory = LlamaMemory(self, sequence, positions)
        if "logits" in state:
            memory.last_logits = np.asarray(state["logits"], dtype=np.float32)
        return memory

    def decode_together(self, steps: Sequence[tuple[Any, int, int]]) -> list[Output]:
        """One token for each memory in one batch; a memory whose past was thinned up to its end goes alone."""
        outputs: dict[int, Output] = {}
        joint: list[tuple[int, LlamaMemory, int, int]] = []
        for index, (memory, token, position) in enumerate(steps):
            if memory.continues_at(position) and len(joint) < self.batch:
                joint.append((index, memory, token, position))
            else:
                outputs[index] = memory.decode([token], position)
        if joint:
            self._run([(token, position, memory.sequence, True) for _, memory, token, position in joint])
            for row, (index, memory, _, position) in enumerate(joint):
                memory.held = np.append(memory.held, position)
                memory.last_logits = self._logits(row)
                outputs[index] = Output(memory.last_logits)
        return [outputs[index] for index in range(len(steps))]

    def merge(self, source: LlamaMemory, target: LlamaMemory) -> None:
        """Hand the cells of `source` to `target` and close `source`."""
        llama_cpp.llama_memory_seq_cp(self._kv, source.sequence, target.sequence, -1, -1)
        target.held = np.union1d(target.held, source.held)
        source.close()

    def close(self) -> None:
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            llama_cpp.llama_model_free(self._model)
            self._context = self._model = None

    def allocated_bytes(self) -> int:
        """Bytes of the KV buffers as allocated now, held or not."""
        return self.cells * self.info.cell_bytes

    # --- the context -------------------------------------------------------------------------------------------

    def _open_context(self, cells: int) -> None:
        threads, sequences, flash, kv_type = self._options
        params = llama_cpp.llama_context_default_params()
        # llama.cpp caps a batch at the context's size, and aborts on a larger one.
        self.cells = -(-max(cells, self.batch) // 256) * 256
        params.n_ctx, params.n_batch, params.n_ubatch = self.cells, self.batch, self.batch
        params.n_seq_max, params.kv_unified = sequences, True
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1 if flash else 0
        params.type_k = params.type_v = _KV_TYPES[kv_type]
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            self._context = None
            raise CapacityError(
                f"A context of {self.cells} cells cannot be allocated; lower the cell budget or free memory."
            )
        self._kv = llama_cpp.llama_get_memory(self._context)

    def _reserve(self, more: int) -> None:
        """Make sure that `more` cells fit beside what all sessions hold (an upper bound: forks share cells)."""
        if more > self.cells // 2:
            self._grow(self.cells + more)

    def _grow(self, cells: int) -> None:
        """Move everything into a larger context. The old one stays if the new one cannot be allocated."""
        old, old_cells, old_kv = self._context, self.cells, self._kv
        size = llama_cpp.llama_state_get_size(old)
        blob = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_get_data(old, blob, size)
        try:
            self._open_context(cells)
        except CapacityError:
            self._context, self.cells, self._kv = old, old_cells, old_kv
            raise
        if llama_cpp.llama_state_set_data(self._context, blob, size) == 0:
            llama_cpp.llama_free(self._context)
            self._context, self.cells, self._kv = old, old_cells, old_kv
            raise CapacityError("llama.cpp could not move the cells into a larger context.")
        llama_cpp.llama_free(old)

    def _run(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Decode one batch of (token, position, sequence, wants logits). Grows the context when it is full."""
        batch = self._batch.fill(rows)
        status = llama_cpp.llama_decode(self._context, batch)
        if status == 1:
            self._grow(max(self.cells * 3 // 2, self.cells + len(rows)))
            status = llama_cpp.llama_decode(self._context, batch)
        if status == 1:
            raise CapacityError(f"No room for {len(rows)} more cells in a context of {self.cells}.")
        if status != 0:
            raise ModelError(f"llama.cpp could not decode a batch (status {status}).")

    def _logits(self, row: int) -> Floats:
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self.info.vocabulary,)).copy()

    def _all_logits(self, rows: int) -> Floats:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (rows * self.info.vocabulary,)).reshape(
            rows, self.info.vocabulary
        )

    def _take_sequence(self) -> int:
        if not self._free_sequences:
            raise CapacityError("All sessions of this engine are in use; close one or load with more.")
        return self._free_sequences.pop()

    def _give_back(self, sequence: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._kv, sequence, -1, -1)
        self._free_sequences.append(sequence)

    def _state_size(self, sequence: int) -> int:
        return int(llama_cpp.llama_state_seq_get_size(self._context, sequence))

    def _measure_cell(self) -> int:
        """Bytes of keys and values a cell takes in all layers, from two states of the engine itself."""
        self._run([(0, 0, _SCRATCH, False)])
        one = self._state_size(_SCRATCH)
        self._run([(0, 1, _SCRATCH, False)])
        two = self._state_size(_SCRATCH)
        llama_cpp.llama_memory_seq_rm(self._kv, _SCRATCH, -1, -1)
        self._state_base = one - (two - one)
        return two - one - META.itemsize

    # --- sequences ---------------------------------------------------------------------------------------------

    def _state_blob(self, sequence: int) -> npt.NDArray[np.uint8]:
        size = self._state_size(sequence)
        blob = np.empty(size, dtype=np.uint8)
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if llama_cpp.llama_state_seq_get_data(self._context, pointer, size, sequence) != size:
            raise ModelError("llama.cpp could not give out the cells of a sequence.")
        return blob

    def _alias(self, sequence: int, position: int, at: int) -> None:
        """In `sequence`, show the cell of `position` under the position `at`, its keys as they are."""
        kv = self._kv
        llama_cpp.llama_memory_seq_cp(kv, sequence, _ALIAS, position, position + 1)
        blob = self._state_blob(_ALIAS)
        metas(blob)["position"] = at
        llama_cpp.llama_memory_seq_rm(kv, _ALIAS, -1, -1)
        llama_cpp.llama_memory_seq_rm(kv, sequence, position, position + 1)
        data = (ctypes.c_uint8 * len(blob)).from_buffer_copy(blob.tobytes())
        if llama_cpp.llama_state_seq_set_data(self._context, data, len(blob), _ALIAS) == 0:
            raise CapacityError(f"No free cell in a context of {self.cells}.")
        llama_cpp.llama_memory_seq_cp(kv, _ALIAS, sequence, at, at + 1)
        llama_cpp.llama_memory_seq_rm(kv, _ALIAS, -1, -1)


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
                llama_cpp.llama_memory_seq_cp(kv, self.sequence, _SCRATCH, first, end)
            if len(seen) and seen[-1] != start - 1:
                engine._alias(_SCRATCH, int(seen[-1]), start - 1)
            engine._run(list(zip(tokens, new.tolist(), [_SCRATCH] * count, wanted, strict=True)))
            kv = engine._kv  # the context may have grown
            kept = new[~np.isin(new, self.held)]
            for first, end in _runs(kept):
                llama_cpp.llama_memory_seq_cp(kv, _SCRATCH, self.sequence, first, end)
        finally:
            llama_cpp.llama_memory_seq_rm(engine._kv, _SCRATCH, -1, -1)
            llama_cpp.llama_memory_seq_rm(engine._kv, _ALIAS, -1, -1)
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
            llama_cpp.llama_memory_seq_cp(engine._kv, self.sequence, _ALIAS, first, end)
        try:
            found, cells = read_cells(engine._state_blob(_ALIAS))
        finally:
            llama_cpp.llama_memory_seq_rm(engine._kv, _ALIAS, -1, -1)
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


class _Batch:
    """A llama_batch whose columns are numpy views, filled without a Python loop a token."""

    def __init__(self, size: int) -> None:
        self._batch = llama_cpp.llama_batch_init(size, 0, 1)
        self._tokens = np.ctypeslib.as_array(self._batch.token, (size,))
        self._positions = np.ctypeslib.as_array(self._batch.pos, (size,))
        self._logits = np.ctypeslib.as_array(self._batch.logits, (size,))
        self._sequences = np.zeros(size, dtype=np.int32)
        base = self._sequences.ctypes.data
        for index in range(size):
            self._batch.n_seq_id[index] = 1
            # llama.cpp's own array behind each entry stays allocated until the program ends: a few KiB.
            self._batch.seq_id[index] = ctypes.cast(base + 4 * index, ctypes.POINTER(ctypes.c_int32))

    def fill(self, rows: Sequence[tuple[int, int, int, bool]]) -> Any:
        count = len(rows)
        table = np.asarray(rows, dtype=np.int64)
        self._tokens[:count], self._positions[:count] = table[:, 0], table[:, 1]
        self._sequences[:count], self._logits[:count] = table[:, 2], table[:, 3]
        self._batch.n_tokens = count
        return self._batch


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
