"""The policies, the text and the chunkings on which every engine is held to the rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anchorkv.config import AnchorConfig, preset
from anchorkv.scorers import Learned

POLICIES = {
    "paper-ep": preset("paper-ep"),
    "paper-ac": preset("paper-ac"),
    "ac-3-sinks": AnchorConfig(anchors=("AC",), ac_tokens=3, sinks=3, recent_window=0, min_segment=4, recall="off"),
    "ac-2-see": AnchorConfig(anchors=("AC",), ac_tokens=2, anchors_see_anchors=True, recent_window=2, max_segment=24),
    "ep-see-recent": AnchorConfig(anchors=("EP",), anchors_see_anchors=True, sinks=2, recent_window=1, max_segment=20),
    "sel": AnchorConfig(reduction=4, recent_window=1, max_segment=24, scorer="frequency"),
    "sel-for-good": AnchorConfig(reduction=4, recent_window=1, max_segment=24, scorer="frequency", aging=0),
    "sel-nothing-recent": AnchorConfig(
        reduction=4, recent_window=0, sinks=0, max_segment=24, scorer="frequency", aging=0
    ),
    "sel-surprise": AnchorConfig(reduction=4, recent_window=1, max_segment=24, scorer="surprise"),
    "ep-and-sel": AnchorConfig(anchors=("EP", "SEL"), reduction=6, recent_window=1, max_segment=24, scorer="frequency"),
    "ep-sel-ac": AnchorConfig(anchors=("EP", "SEL", "AC"), reduction=5, recent_window=0, scorer="frequency"),
    "budget": AnchorConfig(
        reduction=3, recent_window=1, max_segment=16, min_segment=4, cell_budget=48, scorer="frequency"
    ),
    "sepllm": preset("sepllm"),
    "separators-blind": AnchorConfig(
        anchors=("EP",), segments="separator", min_segment=8, max_segment=24, recent_window=1
    ),
    "fixed": AnchorConfig(anchors=("EP",), segments="fixed", max_segment=16, recent_window=1),
    "full": preset("full"),
}
TEXT = (
    "It was late. The ship, grey and slow, came in at 3.14 knots! Dr. Brown stood there; nobody spoke.\n\n"
    "# Orders\n- one rope\n- two lamps\n「もう遅い。」と言った。 The end? Not yet: they waited, and waited, "
    "and then it rained. "
)


def chunks(count: int, how: str) -> list[slice]:
    random = np.random.default_rng(count)
    cuts = {
        "whole": [], "token": list(range(1, count)),
        "chunks": sorted(set(random.integers(1, count, size=9).tolist())),
    }[how]
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]


def random_head(width: int, path: Path) -> AnchorConfig:
    """A policy whose scorer is a random head on the cells of a model with `width` features, saved at `path`."""
    rng = np.random.default_rng(5)
    learned = Learned(
        np.zeros(width, dtype=np.float32), np.ones(width, dtype=np.float32),
        rng.standard_normal(width).astype(np.float32), np.float32(0),
    )
    learned.save(path)
    return AnchorConfig(reduction=4, recent_window=1, max_segment=24, scorer=str(path))
