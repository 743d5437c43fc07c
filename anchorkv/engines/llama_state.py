"""How llama.cpp writes the cells of a sequence down, as far as we read or change it.

The layout is that of `llama_kv_cache::state_write` (llama-kv-cache.cpp of llama-cpp-python 0.3.36): a header; for each
cell its position, the number of its sequences and their ids; then each layer's keys, one row a cell, and its values,
one row a cell or, without flash attention, one row a dimension.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from anchorkv.engines.base import Cells, Floats, Ints
from anchorkv.errors import ModelError

Blob = npt.NDArray[np.uint8]

META = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])
"""What stands before the keys for each cell of one sequence."""
_HEADER = np.dtype([("magic", "<u4"), ("sequence", "<i4"), ("streams", "<u4"), ("cells", "<u4")])
_UNKNOWN = "This llama.cpp keeps sequence states in another form; install llama-cpp-python 0.3.36."


def metas(blob: Blob) -> npt.NDArray[Any]:
    """A writable view [cells] of META in `blob`. Raises ModelError when the state is of another form."""
    header = blob[: _HEADER.itemsize].view(_HEADER)[0]
    end = _HEADER.itemsize + int(header["cells"]) * META.itemsize
    if header["streams"] != 1 or end > len(blob):
        raise ModelError(_UNKNOWN)
    found = blob[_HEADER.itemsize : end].view(META)
    if (found["sequences"] != 1).any():
        raise ModelError(_UNKNOWN)
    return found


def read_cells(blob: Blob) -> tuple[Ints, Cells]:
    """Positions [n], ascending, and what their cells hold. Raises ModelError when the state is of another form."""
    cells = metas(blob)
    count = len(cells)
    reader = _Reader(blob, _HEADER.itemsize + count * META.itemsize)
    transposed, layers = reader.number("<u4"), reader.number("<u4")
    norms, values = [], []
    for _ in range(layers):
        keys = reader.rows(count, reader.number("<i4"), reader.number("<u8"))
        norms.append(np.sqrt(np.square(keys).sum(axis=1)))
    for _ in range(layers):
        kind = reader.number("<i4")
        if transposed:
            element, width = reader.number("<u4"), reader.number("<u4")
            values.append(reader.rows(width, kind, element * count).T)
        else:
            values.append(reader.rows(count, kind, reader.number("<u8")))
    order = np.argsort(cells["position"])
    found = Cells(np.concatenate(values, axis=1)[order], np.stack(norms, axis=1)[order])
    return cells["position"][order].astype(np.int64), found


class _Reader:
    """Numbers and matrices, one behind the other."""

    def __init__(self, blob: Blob, at: int) -> None:
        self._blob, self._at = blob, at

    def number(self, kind: str) -> int:
        size = np.dtype(kind).itemsize
        return int(np.frombuffer(self._take(size), dtype=kind)[0])

    def rows(self, count: int, kind: int, size: int) -> Floats:
        """A matrix of `count` rows of `size` bytes each, in the ggml type `kind`, as float32."""
        data = self._take(count * size).reshape(count, size)
        return np.asarray(gguf.dequantize(data, gguf.GGMLQuantizationType(kind)), dtype=np.float32)

    def _take(self, size: int) -> Blob:
        if self._at + size > len(self._blob):
            raise ModelError(_UNKNOWN)
        self._at += size
        return self._blob[self._at - size : self._at]
