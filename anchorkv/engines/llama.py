"""The llama.cpp engine: quantised models on CPUs and on every GPU llama.cpp supports; unmodified llama.cpp, no torch.

One context holds many sessions as sequence ids; a cell may belong to several (a fork costs nothing). A token sees the
cells of its own sequence at lower positions, so what a token must not see is either dropped or the token is decoded in
a *scratch* sequence that holds only what it may see, and its cells are then handed to the session's sequence.

llama.cpp insists that a sequence continues at its last position + 1, which a thinned past may have dropped. The scratch
sequence then carries one visible cell under that position (its keys keep their true rotation, so attention is exact).
"""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from anchorkv.engines.base import Floats, ModelInfo, Output, Tokenizer
from anchorkv.engines.llama_batch import Batch
from anchorkv.engines.llama_file import describe, fast_copy, open_model
from anchorkv.engines.llama_memory import ALIAS, FIRST, SCRATCH, LlamaMemory
from anchorkv.engines.llama_scoring import score_together
from anchorkv.engines.llama_state import META, metas
from anchorkv.engines.llama_vocab import LlamaTokenizer
from anchorkv.errors import CapacityError, ModelError, SavedStateError

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
        self.threads = threads or len(os.sched_getaffinity(0))
        self._options = (sessions + FIRST, flash_attention, kv_type)
        self._context: Any = None
        self._grows = self._owns_model = True
        try:
            self._open_context(cells)
        except CapacityError:
            llama_cpp.llama_model_free(self._model)
            raise
        self._batch = Batch(batch)
        self._free_sequences = self._all_sequences()
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

    def decode_together(self, steps: Sequence[tuple[Any, int, int]], parts: int = 1) -> list[Output]:
        """One token for each memory in one batch; a memory whose past was thinned up to its end goes alone."""
        self._use(max(1, self.threads // parts))
        try:
            return self._decode_together(steps)
        finally:
            self._use(self.threads)

    def _decode_together(self, steps: Sequence[tuple[Any, int, int]]) -> list[Output]:
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

    def score_together(self, memory: LlamaMemory, start: int, texts: Sequence[Sequence[int]]) -> list[Floats]:
        """As `ScoresTogether` says."""
        return score_together(self, memory, start, texts)

    def merge(self, source: LlamaMemory, target: LlamaMemory) -> None:
        """Hand the cells of `source` to `target` and close `source`."""
        llama_cpp.llama_memory_seq_cp(self._kv, source.sequence, target.sequence, -1, -1)
        target.held = np.union1d(target.held, source.held)
        source.close()

    def close(self) -> None:
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            if self._owns_model:
                llama_cpp.llama_model_free(self._model)
            self._context = self._model = None

    def fix(self, cells: int, sessions: int) -> None:
        """Size the context once and for all, as a server wants it: `cells` KV cells, of which whoever asks for more
        gets CapacityError, and `sessions` sessions. It must hold no session yet.

        Raises CapacityError when it cannot be allocated; the engine is then as before.
        """
        old, options = self._context, self._options
        # With many sessions in one context only flash attention is fast.
        self._options = (sessions + FIRST, True, options[2])
        try:
            self._open_context(cells)
        except CapacityError:
            self._context, self._options = old, options
            raise
        llama_cpp.llama_free(old)
        self._free_sequences, self._grows = self._all_sequences(), False

    def beside(self) -> LlamaEngine:
        """A further context of the same loaded model, sized as this one; close it before this engine.

        Raises CapacityError when it cannot be allocated.
        """
        other = copy.copy(self)
        other._owns_model, other._context = False, None
        other._open_context(self.cells)
        other._batch, other._free_sequences = Batch(self.batch), self._all_sequences()
        return other

    @property
    def vocab(self) -> Any:
        """llama.cpp's own pointer to the vocabulary, for its samplers. It lives as long as the engine."""
        return llama_cpp.llama_model_get_vocab(self._model)

    def allocated_bytes(self) -> int:
        """Bytes of the KV buffers as allocated now, held or not."""
        return self.cells * self.info.cell_bytes

    # --- the context -------------------------------------------------------------------------------------------

    def _open_context(self, cells: int) -> None:
        sequences, flash, kv_type = self._options
        params = llama_cpp.llama_context_default_params()
        # llama.cpp caps a batch at the context's size, and aborts on a larger one.
        self.cells = -(-max(cells, self.batch) // 256) * 256
        params.n_ctx, params.n_batch, params.n_ubatch = self.cells, self.batch, self.batch
        params.n_seq_max, params.kv_unified = sequences, True
        params.n_threads = params.n_threads_batch = self.threads
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
        if self._grows and more > self.cells // 2:
            self._grow(self.cells + more)

    def _grow(self, cells: int) -> None:
        """Move everything into a larger context. The old one stays if the new one cannot be allocated."""
        if not self._grows:
            raise CapacityError(f"All {self.cells} KV cells of the server are in use.")
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

    def _use(self, threads: int) -> None:
        llama_cpp.llama_set_n_threads(self._context, threads, threads)

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

    def _all_sequences(self) -> list[int]:
        return list(range(self._options[0] - 1, FIRST - 1, -1))

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
        # Alone: OpenMP's threads of the thread that loads would stay, and make those of a server's engine thread sleep
        # at each layer's end, for more of them than cores.
        self._use(1)
        self._run([(0, 0, SCRATCH, False)])
        one = self._state_size(SCRATCH)
        self._run([(0, 1, SCRATCH, False)])
        two = self._state_size(SCRATCH)
        self._use(self.threads)
        llama_cpp.llama_memory_seq_rm(self._kv, SCRATCH, -1, -1)
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
        llama_cpp.llama_memory_seq_cp(kv, sequence, ALIAS, position, position + 1)
        blob = self._state_blob(ALIAS)
        metas(blob)["position"] = at
        llama_cpp.llama_memory_seq_rm(kv, ALIAS, -1, -1)
        llama_cpp.llama_memory_seq_rm(kv, sequence, position, position + 1)
        data = (ctypes.c_uint8 * len(blob)).from_buffer_copy(blob.tobytes())
        if llama_cpp.llama_state_seq_set_data(self._context, data, len(blob), ALIAS) == 0:
            raise CapacityError(f"No free cell in a context of {self.cells}.")
        llama_cpp.llama_memory_seq_cp(kv, ALIAS, sequence, at, at + 1)
        llama_cpp.llama_memory_seq_rm(kv, ALIAS, -1, -1)
