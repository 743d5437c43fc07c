"""Attention under the anchor rule that computes little more than what is seen.

A dense mask makes every query meet every token before it; under the rule a query meets the anchors and a few segments.
So queries go in chunks, each against only the tokens that one of its queries sees (CPU). On CUDA the same mask becomes
a FlexAttention block mask, whose empty blocks are skipped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from anchorkv.engines.base import Bools

NAME = "anchorkv_sparse"
"""Under which the sparse attention is known to transformers."""
CHUNK = 64
"""Queries that meet the same tokens: fewer see less that is masked, more make larger matrix products."""


@dataclass(frozen=True)
class Chunk:
    """Queries first <= q < last of one row, and the tokens that any of them sees."""

    row: int
    first: int
    last: int
    seen: torch.Tensor
    """Their indices [c]."""
    bias: torch.Tensor
    """[last - first, c]: 0 where the query sees the token, -inf where not."""


def chunks(masks: Sequence[Bools]) -> list[Chunk]:
    """Split rows of queries into chunks. masks: a row's [m, m] each; every query must see a token."""
    found = []
    for row, mask in enumerate(masks):
        for first in range(0, len(mask), CHUNK):
            part = mask[first : first + CHUNK]
            seen = np.flatnonzero(part.any(axis=0))
            bias = np.where(part[:, seen], np.float32(0), np.float32(-np.inf))
            found.append(Chunk(row, first, first + len(part), torch.from_numpy(seen), torch.from_numpy(bias)))
    return found


class _Sparse(torch.autograd.Function):
    """softmax(q k' scale + mask) v, chunk by chunk, with the backward written out: nothing of size m * m exists."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Sequence[Chunk], scale: float
    ) -> torch.Tensor:
        """query [rows, kv heads, queries a kv head, m, d]; key, value [rows, kv heads, m, d]. Returns query's shape."""
        out, shares = torch.zeros_like(query), []
        for part in parts:
            asked, keys, values = _met(query, key, value, part)
            scores = torch.bmm(asked, keys.transpose(1, 2)).mul_(scale)
            scores.view(*_grouped(query, part), -1).add_(part.bias.to(scores.dtype))
            share = scores.softmax(dim=-1)
            out[part.row, :, :, part.first : part.last] = (share @ values).view(*_grouped(query, part), -1)
            shares.append(share)
        ctx.save_for_backward(query, key, value, *shares)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *shares = ctx.saved_tensors
        to_query, to_key, to_value = (torch.zeros_like(tensor) for tensor in (query, key, value))
        for part, share in zip(ctx.parts, shares, strict=True):
            asked, keys, values = _met(query, key, value, part)
            told = grads[0][part.row, :, :, part.first : part.last].reshape(asked.shape)
            to_value[part.row].index_add_(1, part.seen, share.transpose(1, 2) @ told)
            scores = told @ values.transpose(1, 2)
            scores.sub_((scores * share).sum(dim=-1, keepdim=True)).mul_(share).mul_(ctx.scale)
            to_query[part.row, :, :, part.first : part.last] = (scores @ keys).view(*_grouped(query, part), -1)
            to_key[part.row].index_add_(1, part.seen, scores.transpose(1, 2) @ asked)
        return to_query, to_key, to_value, None, None


def _met(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Chunk
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A chunk's queries [kv heads, queries a kv head * n, d]; the keys and values that they meet [kv heads, c, d]."""
    asked = query[part.row, :, :, part.first : part.last].reshape(query.shape[1], -1, query.shape[-1])
    return asked, key[part.row].index_select(1, part.seen), value[part.row].index_select(1, part.seen)


def _grouped(query: torch.Tensor, part: Chunk) -> tuple[int, int, int]:
    return query.shape[1], query.shape[2], part.last - part.first


_reading: list[Sequence[Chunk]] = []


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [rows, heads, m, d], key and value [rows, kv heads, m, d] in,
    [rows, m, heads, d] out."""
    rows, heads, width, dim = query.shape
    scale = scaling if scaling is not None else float(dim**-0.5)
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width, dim)
    out = _Sparse.apply(grouped, key, value, _reading[-1], scale).view(rows, heads, width, dim)
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def masked(model: Any, masks: Sequence[Bools] | None, plain: bool, kind: str | None = None) -> Iterator[Any]:
    """While it lasts, `model` attends under `masks` ([m, m] a row; None: causal). Yields the attention_mask to call it
    with.

    plain: see `is_plain`; other models get a dense mask and keep their own attention.
    kind: "sparse", "flex" or "dense"; None takes what is fastest on the model's device.
    """
    if masks is None:
        yield None
        return
    kind = kind or (_fastest(model) if plain else "dense")
    if kind == "sparse":
        with _instead(model, NAME):
            _reading.append(chunks(masks))
            try:
                # A 4-D mask is handed on untouched; the attention does not read it.
                yield torch.ones(len(masks), 1, 1, 1, dtype=torch.bool)
            finally:
                _reading.pop()
    elif kind == "flex":
        with _instead(model, "flex_attention"):
            yield _block_mask(_stacked(model, masks))
    else:
        yield _stacked(model, masks)[:, None]


def _fastest(model: Any) -> str:
    if model.device.type == "cpu":
        return "sparse"
    # FlexAttention is compiled with triton, for heads of a power of two, and knows no dropout.
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    able = dim >= 16 and dim & (dim - 1) == 0 and not getattr(config, "attention_dropout", 0)
    return "flex" if model.device.type == "cuda" and able and importlib.util.find_spec("triton") else "dense"


def _stacked(model: Any, masks: Sequence[Bools]) -> torch.Tensor:
    """[rows, m, m] on the model's device."""
    return torch.from_numpy(np.stack(masks)).to(model.device)


def _block_mask(seen: torch.Tensor) -> Any:
    """FlexAttention's block mask of booleans [rows, m, m]; transformers takes it as an attention_mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Any, head: Any, query: Any, token: Any) -> Any:
        return seen[row, query, token]

    rows, width, _ = seen.shape
    return create_block_mask(sees, B=rows, H=None, Q_LEN=width, KV_LEN=width, device=seen.device)


@contextmanager
def _instead(model: Any, attention: str) -> Iterator[None]:
    """While it lasts, the model computes the attention that transformers knows under this name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = attention
    try:
        yield
    finally:
        model.config._attn_implementation = before


def is_plain(model: Any, kinds: Sequence[str]) -> bool:
    """Whether the model's attention is the plain one in every layer, so that this module may stand in for it."""
    return model.config._attn_implementation == "sdpa" and set(kinds) == {"full_attention"}
