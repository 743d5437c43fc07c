"""Tokens on their way into llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np


class Batch:
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
