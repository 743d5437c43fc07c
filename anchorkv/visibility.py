"""The rule (AnSAN): which token sees which. The only definition; masks, drops and audit derive from it.

Query q, in segment S(q), sees token j iff j <= q and at least one holds:

1. same segment: S(j) = S(q)
2. j is an anchor of an earlier segment (and has not been evicted by the cell budget)
3. j is a sink, or pinned
4. S(q) - S(j) <= w
5. S(j) was recalled for q

A *blind* query (an EP or AC anchor unless anchors_see_anchors) sees by 1 alone: AnLLM, arXiv 2402.07616, equation 4.

`rule` uses only operators that numpy arrays, torch tensors and FlexAttention's traced scalars share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

NEVER = np.iinfo(np.int64).max
"""`evicted` of an anchor that the cell budget has not removed."""


def rule(
    q: Any, q_segment: Any, q_blind: Any, j: Any, j_segment: Any, j_anchor: Any, j_always: Any, j_evicted: Any,
    recalled: Any, window: int,
) -> Any:
    """Whether q sees j, elementwise. `j_always`: sink or pinned; `j_evicted`: first segment that j is gone for."""
    same = j_segment == q_segment
    anchor = j_anchor & (q_segment < j_evicted)
    recent = q_segment - j_segment <= window
    return (j <= q) & (same | ((anchor | j_always | recent | recalled) & ~q_blind))


@dataclass(frozen=True)
class Recalled:
    """Segment `segment` is visible again to the queries at positions first <= q < last."""

    segment: int
    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """What the rule needs to know of a stream of n tokens; arrays of shape [n], indexed by position."""

    segment: Ints
    anchor: Bools
    always: Bools
    blind: Bools
    evicted: Ints
    window: int
    recalls: Sequence[Recalled] = field(default=())

    def __len__(self) -> int:
        return len(self.segment)

    def recalled(self, queries: Ints, keys: Ints) -> Bools:
        """Rule 5 as a matrix [len(queries), len(keys)]."""
        out = np.zeros((len(queries), len(keys)), dtype=bool)
        for recall in self.recalls:
            rows = (queries >= recall.first) & (queries < recall.last)
            out |= rows[:, None] & (self.segment[keys] == recall.segment)[None, :]
        return out


def dense_mask(layout: Layout, queries: Ints | None = None, keys: Ints | None = None) -> Bools:
    """The rule as a matrix [len(queries), len(keys)] of booleans; positions default to the whole stream."""
    q = np.arange(len(layout)) if queries is None else np.asarray(queries, dtype=np.int64)
    j = np.arange(len(layout)) if keys is None else np.asarray(keys, dtype=np.int64)
    seen: Bools = rule(
        q[:, None], layout.segment[q][:, None], layout.blind[q][:, None],
        j[None, :], layout.segment[j][None, :], layout.anchor[j][None, :], layout.always[j][None, :],
        layout.evicted[j][None, :], layout.recalled(q, j), layout.window,
    )
    return seen


def visible_from(layout: Layout, segment: int, keys: Ints) -> Bools:
    """Which of `keys` (positions, [m]) some query of `segment` or a later one can still see. The others may be freed.

    Visibility only ever shrinks as segments pass (recall apart), so the first query of `segment` decides.
    """
    q = np.asarray([len(layout)], dtype=np.int64)
    seen: Bools = rule(
        q[:, None], np.asarray([[segment]]), np.asarray([[False]]),
        keys[None, :], layout.segment[keys][None, :], layout.anchor[keys][None, :], layout.always[keys][None, :],
        layout.evicted[keys][None, :], layout.recalled(q, keys), layout.window,
    )
    first: Bools = seen[0]
    return first


def flex_mask_mod(layout: Layout, device: Any = "cpu") -> Callable[[Any, Any, Any, Any], Any]:
    """The rule as a FlexAttention `mask_mod(batch, head, q, kv)`; needs torch."""
    import torch

    def tensor(values: npt.NDArray[Any]) -> Any:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    segment, anchor, always = tensor(layout.segment), tensor(layout.anchor), tensor(layout.always)
    blind, evicted = tensor(layout.blind), tensor(layout.evicted)
    recalls = [(r.segment, r.first, r.last) for r in layout.recalls]

    def mask_mod(batch: Any, head: Any, q: Any, j: Any) -> Any:
        recalled = q < 0
        for number, first, last in recalls:
            recalled = recalled | ((q >= first) & (q < last) & (segment[j] == number))
        return rule(
            q, segment[q], blind[q], j, segment[j], anchor[j], always[j], evicted[j], recalled, layout.window
        )

    return mask_mod
