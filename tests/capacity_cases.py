"""Models, assumptions and strategies that the tests of capacity share."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from anchorkv.poc import shapes
from anchorkv.poc.capacity import BLOCKS, CapacityInputs, ModelShape


def inputs(**changes: Any) -> CapacityInputs:
    return CapacityInputs(**changes)


def shape(name: str = "Llama-3-8B") -> ModelShape:
    return next(known for known in shapes.known() if known.name == name)


assumptions = st.builds(
    dict, memory=st.integers(1, 2**43), reserve=st.floats(0, 0.99), weights=st.sampled_from(sorted(BLOCKS)),
    kv_type=st.sampled_from(["f32", "f16", "q8_0", "q4_0"]), context=st.integers(1, 10**7), users=st.integers(1, 10**7),
    price=st.floats(0, 1e7), reduction=st.floats(1, 1000), sinks=st.integers(0, 500), recent_window=st.integers(0, 8),
    segment=st.integers(1, 600), recall_cells=st.integers(0, 2000), reading_cells=st.integers(0, 600),
    cell_budget=st.none() | st.integers(1, 10**5),
)


@st.composite
def any_shape(draw: st.DrawFn) -> dict[str, Any]:
    layers = draw(st.integers(1, 128))
    sliding = draw(st.integers(0, layers))
    return {
        "name": "m", "layers": layers, "kv_heads": draw(st.integers(1, 64)), "head_dim": draw(st.integers(1, 256)),
        "window": draw(st.integers(0, 10**6)), "parameters": draw(st.integers(1, 10**12)),
        "weight_bytes": draw(st.just(0) | st.integers(1, 2**40)), "hybrid": draw(st.booleans()),
        "sliding_layers": sliding, "sliding_window": draw(st.integers(1, 10**5)) if sliding else 0,
        "numbers": draw(st.just(0) | st.integers(1, 10**6)),
    }
