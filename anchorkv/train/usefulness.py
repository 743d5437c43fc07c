"""What the full-cache model later looks at: the target that a scorer is fitted to.

A token's usefulness is how much its cell adds to what later tokens read once it is out of their recent window: for each
layer and head the largest attention that any of them gives it, times the length of what its value then writes into the
residual stream, summed (the idea of KVzip's and KVzap's targets, arXiv 2505.23416; the sum is ours, for a cell here is
kept or dropped in all layers at once). Scorers predict its logarithm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from anchorkv.engines.base import Bools, Cells, Floats
from anchorkv.engines.torch import TorchEngine
from anchorkv.engines.torch_memory import floats
from anchorkv.errors import ModelError

NAME = "anchorkv_watched"
"""Under which the watched attention is known to transformers."""
ROWS = 256
"""Queries whose attention is looked at together: [heads, ROWS, n] floats at once."""


class Watch:
    """Collects usefulness [n] while a model runs a text of n tokens; `far` [n, n]: which pairs count."""

    def __init__(self, far: Bools) -> None:
        self.far = torch.from_numpy(far)
        self.total = torch.zeros(far.shape[1])

    def look(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> None:
        """query [heads, n, dim], key and value [heads, n, dim] of one layer."""
        heads, n, dim = query.shape
        written = _lengths_written(module, value, heads, dim)
        far, most = self.far.to(query.device), torch.zeros(heads, n, device=query.device)
        for first in range(0, n, ROWS):
            scores = (query[:, first : first + ROWS] @ key.transpose(1, 2)).float() * scale
            rows = torch.arange(first, first + scores.shape[1], device=query.device)
            scores = scores.masked_fill(torch.arange(n, device=query.device) > rows[:, None], float("-inf"))
            shares = scores.softmax(dim=-1) * far[first : first + ROWS]
            most = torch.maximum(most, shares.amax(dim=1))
        self.total += (most * written).sum(dim=0).cpu()

    def usefulness(self) -> Floats:
        """log of the sum [n]; the least found anywhere for tokens that no far query can see."""
        logs = self.total.clamp_min(1e-12).log()
        return floats(logs)


def _lengths_written(module: nn.Module, value: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """Lengths [heads, n] of each head's value after the layer's output projection."""
    projection = getattr(module, "o_proj", None) or getattr(module, "dense", None) or getattr(module, "out_proj", None)
    if projection is None:
        raise ModelError(f"The output projection of {type(module).__name__} was not found, so no scorer can be fitted.")
    weight = projection.weight.view(-1, heads, dim)
    return torch.stack([(value[h] @ weight[:, h].T).norm(dim=-1) for h in range(heads)]).float()


_watching: list[Watch] = []


def _watched(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, **_: Any,
) -> tuple[torch.Tensor, None]:
    """Plain causal attention of one text, [1, heads, n, dim] in, [1, n, heads, dim] out, looked at by the watch."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = scaling if scaling is not None else float(query.shape[-1] ** -0.5)
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    for watch in _watching:
        watch.look(module, query[0], key[0], value[0], scale)
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def _watched_attention(model: Any, watch: Watch) -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _watched)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    _watching.append(watch)
    try:
        yield
    finally:
        _watching.remove(watch)
        model.config._attn_implementation = before


def watch_text(engine: TorchEngine, tokens: list[int], far: Bools) -> tuple[Floats, Cells]:
    """Run `tokens` once with the full cache. Returns their usefulness [n] to far queries, and their cells.

    far: [n, n], far[q, j] where q sees j only if j is kept. Raises ModelError for a model with other than full
    attention in every layer.
    """
    if set(engine.kinds) != {"full_attention"}:
        raise ModelError("A scorer can be fitted to models with full attention in every layer only.")
    watch, memory = Watch(far), engine.open()
    with _watched_attention(engine.model, watch):
        memory.decode(tokens, 0, logits=False)
    cells = memory.read_cells(memory.positions())
    memory.close()
    return watch.usefulness(), cells
