"""The cells of one session on a TorchEngine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from anchorkv.engines.base import SURPRISE, Bools, Cells, Floats, Ints, Output
from anchorkv.engines.torch_cache import CellCache
from anchorkv.errors import CapacityError, ModelError

if TYPE_CHECKING:
    from anchorkv.engines.torch import TorchEngine

CHUNK = 256
"""Rows of the output matrix turned into probabilities at once."""


class TorchMemory:
    """The cells of one session; see `anchorkv.engines.base.Memory`, whose contract it keeps."""

    def __init__(self, engine: TorchEngine, cells: CellCache) -> None:
        self.engine = engine
        self.cells = cells
        self.ahead: tuple[int, torch.Tensor] | None = None
        """(position, logits [vocabulary] that predict the token there), of the newest decode that computed them."""

    def decode(
        self, tokens: Sequence[int], start: int, *, visible: Ints | None = None, mask: Bools | None = None,
        needs: frozenset[str] = frozenset(), logits: bool = True,
    ) -> Output:
        """As the protocol says. The surprise of the first token uses the logits of the decode that ended just before
        `start`; where no decode did, or it was told `logits=False` and not asked for surprise, it is log(vocabulary).
        `Output.logits` is empty when `logits` is false. Raises ValueError when `mask` has the wrong shape.
        """
        engine, n, held = self.engine, len(tokens), self.cells.held
        queries = np.arange(start, start + n)
        keys = np.concatenate([held, queries])
        if mask is None:
            seen = np.ones((n, len(keys)), dtype=bool)
            seen[:, : len(held)] = held < start if visible is None else (held < start) & np.isin(held, visible)
            seen[:, len(held) :] = np.tri(n, dtype=bool)
        elif mask.shape != (n, len(keys)):
            raise ValueError(f"the mask has shape {mask.shape}; {n} tokens and {len(held)} held cells need "
                             f"({n}, {len(keys)})")
        else:
            seen = mask
        if needs - {SURPRISE}:
            raise ModelError(f"The torch engine cannot give {', '.join(sorted(needs - {SURPRISE}))}.")
        rows = n if SURPRISE in needs else int(logits)
        with out_of_memory():
            out = engine.forward([list(tokens)], queries[None], keys[None], seen[None], self.cells, logits=rows)
            surprise = None
            if SURPRISE in needs:
                surprise = self._surprise(out[0], tokens, start)
            last = out[0, -1].clone() if rows else None
            output = Output(
                logits=np.empty(0, dtype=np.float32) if last is None or not logits else floats(last),
                surprise=surprise,
            )
        self.cells.commit(start, n)
        self.look_ahead(start + n, last)
        return output

    def _surprise(self, logits: torch.Tensor, tokens: Sequence[int], start: int) -> Floats:
        """-log p of each token [n], from `logits` [n, vocabulary] and those of the decode before."""
        out = np.empty(len(tokens), dtype=np.float32)
        if self.ahead is not None and self.ahead[0] == start:
            out[0] = _nll(self.ahead[1][None], tokens[:1])[0]
        else:
            out[0] = math.log(self.engine.info.vocabulary)
        for first in range(1, len(tokens), CHUNK):
            targets = tokens[first : first + CHUNK]
            out[first : first + CHUNK] = _nll(logits[first - 1 : first - 1 + len(targets)], targets)
        return out

    def look_ahead(self, position: int, logits: torch.Tensor | None) -> None:
        # A recall computes old tokens again: what it predicts is not what comes next.
        if logits is not None and (self.ahead is None or position >= self.ahead[0] or position > self.newest):
            self.ahead = (position, logits)

    @property
    def newest(self) -> int:
        """The highest position held; -1 when empty."""
        return int(self.cells.held[-1]) if len(self.cells.held) else -1

    def drop(self, positions: Ints) -> None:
        """Free the cells at `positions` [m]; those not held are ignored."""
        keep = np.flatnonzero(~np.isin(self.cells.held, positions))
        if len(keep) < len(self.cells.held):
            self.cells.keep(keep)

    def fork(self) -> TorchMemory:
        """An independent copy of the held cells. Raises CapacityError when there is no room for it."""
        with out_of_memory():
            twin = TorchMemory(self.engine, self.cells.copy())
        twin.ahead = self.ahead
        return twin

    def positions(self) -> Ints:
        """Positions held now [m], ascending: one for each row of the cache's tensors."""
        return self.cells.held.copy()

    def nbytes(self) -> int:
        """Bytes of the keys and values held now, summed over the tensors' held rows."""
        return self.cells.nbytes()

    def capacity_bytes(self) -> int:
        """Bytes of this memory's buffers, the room to grow included."""
        return self.cells.capacity_bytes()

    def trim(self) -> None:
        """Give back the room to grow, for a session that will rest."""
        self.cells.trim()

    def read_cells(self, positions: Ints) -> Cells:
        """As the protocol says."""
        rows = np.searchsorted(self.cells.held, positions)
        if not np.array_equal(self.cells.held[np.minimum(rows, len(self.cells.held) - 1)], positions):
            raise ModelError("Cells that are not held cannot be read.")
        picked = torch.from_numpy(rows)
        values, norms = [], []
        for layer in self.cells.layers:
            keys, own = (t[0].index_select(1, picked.to(t.device)).float() for t in layer.held())  # [heads, n, dim]
            values.append(own.transpose(0, 1).flatten(1))
            norms.append(keys.square().sum(dim=(0, 2)).sqrt())
        return Cells(floats(torch.cat(values, dim=1)), floats(torch.stack(norms, dim=1)))

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """positions [m] int64; dtype; keys.<layer>, values.<layer> [kv_heads, m, head_dim] (bf16 as uint16 bits);
        ahead.position and ahead.logits [vocabulary] when known."""
        state: dict[str, npt.NDArray[Any]] = {
            "positions": self.positions(), "dtype": np.frombuffer(self.engine.info.weights.encode(), dtype=np.uint8)
        }
        if len(self.cells.held):
            for number, layer in enumerate(self.cells.layers):
                for name, tensor in zip(("keys", "values"), layer.held(), strict=True):
                    state[f"{name}.{number}"] = to_numpy(tensor[0])
        if self.ahead is not None:
            state["ahead.position"] = np.array(self.ahead[0])
            state["ahead.logits"] = floats(self.ahead[1])
        return state

    def close(self) -> None:
        """Free all cells."""
        self.cells = CellCache(len(self.cells.layers))
        self.ahead = None


@contextmanager
def out_of_memory() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError on CUDA is one, the CPU allocator's has no type of its own
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise CapacityError(
            "There is no memory left for the cells: close other sessions or lower cell_budget."
        ) from None


def _nll(logits: torch.Tensor, tokens: Sequence[int]) -> Floats:
    """-log p of `tokens` [n] under `logits` [n, vocabulary]."""
    targets = torch.tensor(tokens, device=logits.device)
    return floats(nn.functional.cross_entropy(logits.float(), targets, reduction="none"))


def floats(tensor: torch.Tensor) -> Floats:
    values: Floats = tensor.detach().float().cpu().numpy()
    return values


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    tensor = tensor.detach().cpu().contiguous()
    array: npt.NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()
    return array


def from_numpy(array: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    tensor = tensor.view(torch.bfloat16) if dtype == torch.bfloat16 and tensor.dtype == torch.uint16 else tensor
    if tensor.dtype != dtype:
        raise ValueError(f"its cells are stored as {array.dtype}")
    return tensor
