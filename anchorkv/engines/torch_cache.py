"""Key/value cells for transformers models: a `Cache` that can forget from the middle, and a batch of such caches.

A cell's physical row says nothing about its position: the caller keeps positions apart (`CellCache.held`) and gives
the model explicit `position_ids` and masks. To transformers, the cache is as long as the rows it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from anchorkv.engines.base import Ints
from anchorkv.errors import ModelError

STEP = 64
"""Buffers grow to multiples of this many cells."""


class CellLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's buffers, keys and values [1, kv_heads, capacity, head_dim], of which the first `length` rows hold.

    An append writes behind the held rows and holds nothing until `CellCache.commit`: a forward that fails half-way
    leaves the cache as it was.
    """

    is_sliding = False  # sliding windows are the caller's, by mask: rows are never dropped here on their own

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, kv_heads, capacity, head_dim]. Raises ModelError when the layer never wrote any."""
        if self.keys is None or self.values is None:
            raise ModelError("A layer of this model keeps no keys and values.")
        return self.keys, self.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Empty buffers of the shapes [1, kv_heads, _, head_dim], types and device of the arguments."""
        self.keys = key_states.new_empty((1, key_states.shape[1], 0, key_states.shape[3]))
        self.values = value_states.new_empty((1, value_states.shape[1], 0, value_states.shape[3]))
        self.is_initialized = True

    def resize(self, capacity: int) -> None:
        """Move the held rows to buffers of `capacity` rows of their own."""
        held, moved = self.length, []
        for old in self.buffers:
            new = old.new_empty((1, old.shape[1], capacity, old.shape[3]))
            new[:, :, :held] = old[:, :, :held]
            moved.append(new)
        self.keys, self.values = moved

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write n new rows [1, kv_heads, n, head_dim] behind the held ones; returns views of held + n rows."""
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            # Half as much again: appends cost amortised O(1) copies a row.
            self.resize(-(-max(end, self.capacity * 3 // 2) // STEP) * STEP)
        keys, values = self.buffers
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows: torch.Tensor, first: int) -> None:
        """Let the rows from `first` on be `rows` [m] of the present ones, in that order."""
        for buffer in self.buffers:
            buffer[:, :, first : first + len(rows)] = buffer.index_select(2, rows)
        self.length = first + len(rows)

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [1, kv_heads, length, head_dim] of the held keys and values."""
        keys, values = self.buffers
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        # Physical on purpose: transformers pairs it with get_mask_sizes; positions are given explicitly.
        return self.length

    def get_max_length(self) -> int:
        return -1


class CellCache(Cache):  # type: ignore[misc]
    """All layers of one memory. `held`: positions of the held rows, ascending, one for each physical row."""

    layers: list[CellLayer]

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[CellLayer() for _ in range(layers)])
        self.held: Ints = np.empty(0, dtype=np.int64)

    def commit(self, start: int, n: int) -> None:
        """Hold the n rows just appended, at positions start … start + n - 1; those held already keep their old row."""
        for layer in self.layers:
            layer.length += n
        before, new = self.held, np.arange(start, start + n)
        self.held = np.concatenate([before, new])
        if len(before) and start <= before[-1]:
            rows = np.concatenate([np.arange(len(before)), len(before) + np.flatnonzero(~np.isin(new, before))])
            self.keep(rows[np.argsort(self.held[rows])])

    def keep(self, rows: Ints) -> None:
        """Hold only these physical rows [m], in this order. Rows before the first change are not touched."""
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        first = int(moved[0]) if len(moved) else len(rows)
        for layer in self.layers:
            layer.keep(torch.from_numpy(rows[first:]).to(layer.buffers[0].device), first)
        self.held = self.held[rows]

    def trim(self) -> None:
        """Give back the capacity beyond the held rows."""
        for layer in self.layers:
            if layer.keys is not None:
                layer.resize(layer.length)

    def copy(self) -> CellCache:
        """The held rows in buffers of their own."""
        twin = CellCache(len(self.layers))
        twin.held = self.held.copy()
        for mine, layer in zip(self.layers, twin.layers, strict=True):
            layer.keys, layer.values, layer.length = mine.keys, mine.values, mine.length
            layer.is_initialized = mine.is_initialized
            if mine.keys is not None:
                layer.resize(-(-mine.length // STEP) * STEP)
        return twin

    def nbytes(self) -> int:
        """Bytes of the held rows."""
        return sum(t.nbytes for layer in self.layers if layer.is_initialized for t in layer.held())

    def capacity_bytes(self) -> int:
        """Bytes of the buffers, held or not (of a shared batch: this memory's row)."""
        both = [(layer.keys, layer.values) for layer in self.layers]
        return sum(t.nbytes for pair in both for t in pair if t is not None)


class _RowsLayer(CellLayer):
    """One layer of a batch: buffers [rows, kv_heads, capacity, head_dim], row r holding `lengths[r]` cells."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.rows = torch.arange(len(keys), device=keys.device)
        self.lengths = torch.zeros_like(self.rows)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new cell [rows, kv_heads, 1, head_dim] behind each row's own; returns views of the longest."""
        keys, values = self.buffers
        keys[self.rows, :, self.lengths] = key_states[:, :, 0]
        values[self.rows, :, self.lengths] = value_states[:, :, 0]
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]


class CellRows(Cache):  # type: ignore[misc]
    """Several memories' cells in one padded batch, for one token each.

    The memories' own buffers become rows of the batch, so nothing is copied while the same memories step on together,
    drop cells or decode alone. One that outgrows its row moves out; then `fits` is false and a new batch is made.
    """

    layers: list[_RowsLayer]

    def __init__(self, caches: Sequence[CellCache]) -> None:
        self.caches = list(caches)
        longest = max(len(cache.held) for cache in caches)
        capacity = -(-(longest + longest // 4 + 1) // STEP) * STEP
        layers = []
        for number in range(len(caches[0].layers)):
            keys, values = zip(*(cache.layers[number].held() for cache in caches), strict=True)
            layers.append(_RowsLayer(_stack(keys, capacity), _stack(values, capacity)))
        super().__init__(layers=layers)
        # Only now, with everything allocated, do the memories move in.
        self._views = [
            [(layer.buffers[0][r : r + 1], layer.buffers[1][r : r + 1]) for layer in layers]
            for r in range(len(caches))
        ]
        for cache, views in zip(caches, self._views, strict=True):
            for own, (row_keys, row_values) in zip(cache.layers, views, strict=True):
                own.keys, own.values = row_keys, row_values

    def fits(self, caches: Sequence[CellCache]) -> bool:
        """Whether exactly these memories still live here and each has room for one more cell."""
        return len(caches) == len(self.caches) and all(
            cache is mine
            and all(
                layer.keys is keys and layer.length < layer.capacity
                for layer, (keys, _) in zip(cache.layers, views, strict=True)
            )
            for cache, mine, views in zip(caches, self.caches, self._views, strict=True)
        )

    def prepare(self) -> int:
        """Read the memories' lengths before a step; returns the widest row's, the new cell included."""
        lengths = [len(cache.held) for cache in self.caches]
        for layer in self.layers:
            layer.lengths = torch.tensor(lengths, device=layer.rows.device)
            layer.length = max(lengths)
        return max(lengths) + 1


def _stack(rows: Sequence[torch.Tensor], capacity: int) -> torch.Tensor:
    """Rows [1, heads, length, dim] of any lengths in one buffer [len(rows), heads, capacity, dim]."""
    # Zeros, not empty: a padded cell is masked, but 0 * NaN in the weighted sum would not be 0.
    buffer = rows[0].new_zeros((len(rows), rows[0].shape[1], capacity, rows[0].shape[3]))
    for r, row in enumerate(rows):
        buffer[r, :, : row.shape[2]] = row[0]
    return buffer
