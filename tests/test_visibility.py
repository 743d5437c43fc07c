"""The rule against a brute-force reading of it, and the moment at which a cell may be freed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorkv.visibility import NEVER, Layout, Recalled, dense_mask, flex_mask_mod, visible_from


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=7))
    segment = np.repeat(np.arange(len(lengths)), lengths)
    count = len(segment)

    def bools() -> np.ndarray:
        return np.asarray(draw(st.lists(st.booleans(), min_size=count, max_size=count)))

    evicted = np.asarray(
        [draw(st.sampled_from([NEVER, int(number) + draw(st.integers(1, 4))])) for number in segment], dtype=np.int64
    )
    recalls = [
        Recalled(draw(st.integers(0, len(lengths) - 1)), first, first + draw(st.integers(0, count)))
        for first in draw(st.lists(st.integers(0, count), max_size=2))
    ]
    return Layout(segment, bools(), bools(), bools(), evicted, draw(st.integers(0, 3)), recalls)


def by_hand(layout: Layout, q: int, j: int) -> bool:
    """The five sentences of docs/design.md, one after the other."""
    if j > q:
        return False
    own, other = int(layout.segment[q]), int(layout.segment[j])
    if own == other:
        return True
    if layout.blind[q]:
        return False
    if layout.anchor[j] and own < layout.evicted[j]:
        return True
    if layout.always[j]:
        return True
    if own - other <= layout.window:
        return True
    return any(r.segment == other and r.first <= q < r.last for r in layout.recalls)


@given(layouts())
def test_the_mask_reads_as_the_rule_is_written(layout: Layout) -> None:
    mask = dense_mask(layout)
    for q in range(len(layout)):
        for j in range(len(layout)):
            assert mask[q, j] == by_hand(layout, q, j)


@given(layouts(), st.integers(0, 8))
def test_what_may_be_freed_is_what_no_later_query_sees(layout: Layout, segment: int) -> None:
    keys = np.flatnonzero(layout.segment < segment)
    free = ~visible_from(layout, segment, keys)
    recalled_now = layout.recalled(np.asarray([len(layout)]), keys)[0]
    for index, j in enumerate(keys):
        ever = any(
            (layout.anchor[j] and later < layout.evicted[j]) or layout.always[j]
            or later - layout.segment[j] <= layout.window
            for later in range(segment, segment + 8)
        )
        assert free[index] == (not ever and not recalled_now[index])


@pytest.mark.parametrize("anchors", [1, 2])
@given(data=st.data())
def test_the_paper_presets_mask(anchors: int, data: st.DataObject) -> None:
    """w = 0, no sinks, the last `anchors` tokens of a segment blind: AnLLM's equation 4 on random anchor positions."""
    lengths = data.draw(st.lists(st.integers(anchors, 7), min_size=1, max_size=6))
    segment = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.cumsum(lengths)
    anchor = np.zeros(len(segment), dtype=bool)
    for end in ends:
        anchor[end - anchors : end] = True
    none = np.zeros(len(segment), dtype=bool)
    layout = Layout(segment, anchor, none, anchor, np.full(len(segment), NEVER), 0)
    mask = dense_mask(layout)
    for q in range(len(segment)):
        own = [j for j in range(q + 1) if segment[j] == segment[q]]
        seen = own if anchor[q] else own + [j for j in range(q) if anchor[j] and segment[j] < segment[q]]
        assert np.flatnonzero(mask[q]).tolist() == sorted(seen)


@given(layouts())
def test_flex_attention_gets_the_same_mask(layout: Layout) -> None:
    torch = pytest.importorskip("torch")
    mask_mod = flex_mask_mod(layout)
    q = torch.arange(len(layout))[:, None]
    j = torch.arange(len(layout))[None, :]
    found = mask_mod(0, 0, q, j).expand(len(layout), len(layout))
    assert found.numpy().tolist() == dense_mask(layout).tolist()


def test_flex_attention_builds_a_block_mask_from_it() -> None:
    pytest.importorskip("torch")
    from torch.nn.attention.flex_attention import create_block_mask

    count = 256
    segment = np.arange(count) // 16
    anchor = np.arange(count) % 16 == 15
    none = np.zeros(count, dtype=bool)
    layout = Layout(segment, anchor, none, none, np.full(count, NEVER), 1)
    block = create_block_mask(flex_mask_mod(layout), None, None, count, count, device="cpu", BLOCK_SIZE=32)
    dense = dense_mask(layout).reshape(8, 32, 8, 32).any(axis=(1, 3))
    assert block.to_dense()[0, 0].bool().numpy().tolist() == dense.tolist()
