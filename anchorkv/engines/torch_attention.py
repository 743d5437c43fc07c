"""Where a transformers model's attention goes: an attention function that also adds up what each key gets.

It is registered through the library's own `AttentionInterface`, so that models with grouped heads, sliding layers or
capped scores keep their ways. Weights are summed layer by layer and let go: nothing of [layers, heads, n, k] is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface

from anchorkv.errors import ModelError

NAME = "anchorkv_shares"
BLOCK = 128
"""Queries whose weights are held at once."""


class Shares:
    """What the keys of one forward got so far, by the last `rows` of its queries."""

    def __init__(self, rows: int) -> None:
        self.rows, self.layers = rows, 0
        self.total: torch.Tensor | None = None
        """[k]: for each layer the mean over heads and rows, summed over layers."""

    def add(self, got: torch.Tensor) -> None:
        """got: [k], of one layer."""
        self.total = got if self.total is None else self.total + got
        self.layers += 1


_shares: ContextVar[Shares] = ContextVar("shares")


@contextmanager
def watched(model: Any, rows: int) -> Iterator[Shares]:
    """Within, every forward of `model` adds to the shares; afterwards its attention is as before.

    A model that does not call its attention through the interface adds nothing.
    """
    before, shares = model.config.get_text_config(decoder=True)._attn_implementation, Shares(rows)
    AttentionInterface.register(NAME, _attend)
    token = _shares.set(shares)
    try:
        model.set_attn_implementation(NAME)
        yield shares
    finally:
        model.set_attn_implementation(before)
        _shares.reset(token)


def _attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, softcap: float | None = None,
    s_aux: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:
    """Plain attention of query [1, heads, n, d] over key and value [1, kv_heads, k, d].

    attention_mask: [1, 1, n, k], booleans or added to the scores; None: causal, the last query sees every key.
    Returns [1, n, heads, d]. Raises ModelError for a model whose heads may attend to nothing (`s_aux`): no shares sum
    to 1 there.
    """
    if s_aux is not None:
        raise ModelError("This model's heads may attend to nothing, so it has no shares of attention.")
    shares, n, k, least = _shares.get(), query.shape[2], key.shape[2], torch.finfo(query.dtype).min
    key, value = (side.repeat_interleave(query.shape[1] // side.shape[1], dim=1) for side in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None:
        attention_mask = torch.ones(n, k, dtype=torch.bool, device=query.device).tril(k - n)[None, None]
    out, got = [], torch.zeros(k, device=query.device)
    for first in range(0, n, BLOCK):
        scores = query[:, :, first : first + BLOCK] @ key.transpose(2, 3) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        mask = attention_mask[:, :, first : first + BLOCK]
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(dim=-1, dtype=torch.float32)  # [1, heads, block, k]
        counted = weights[:, :, max(0, n - shares.rows - first) :]
        got += counted.mean(dim=1).sum(dim=(0, 1))
        out.append(weights.to(value.dtype) @ value)
    shares.add(got / shares.rows)
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None
