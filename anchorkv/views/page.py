"""The text as one self-contained web page: segments, states, reasons, and a map of the whole document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from anchorkv.config import AnchorConfig
from anchorkv.ledger import Accounting
from anchorkv.views.segments import STATES, SegmentInfo, counts_of

LABELS = {
    "whole": "Whole", "anchor": "Anchor", "sink": "Sink", "pinned": "Pinned", "recalled": "Recalled",
    "evicted": "Evicted", "dropped": "Dropped",
}
_SHOWN_ANCHORS = 24
_SHOWN_CHANGES = 12


@dataclass(frozen=True)
class PageInput:
    """What a page shows."""

    title: str
    model: str
    policy: AnchorConfig
    segments: Sequence[SegmentInfo]
    accounting: Accounting
    question: str = ""
    answer: str = ""


def render_page(page: PageInput) -> str:
    """HTML with everything inside; it asks no other place for anything. All text of the document is escaped."""
    environment = Environment(
        loader=PackageLoader("anchorkv", "views"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )
    counts = counts_of(page.segments)
    return environment.get_template("page.html.j2").render(
        page=page, cells=page.accounting, policy=_policy_line(page.policy), states=[
            {"name": name, "label": LABELS[name], "meaning": STATES[name], "count": counts[name]}
            for name in STATES if counts[name]
        ],
        bars=_map(page.segments), total=sum(segment.tokens for segment in page.segments),
        details=_json([_details(segment) for segment in page.segments]),
    )


def _details(segment: SegmentInfo) -> dict[str, Any]:
    """What the panel says of a segment; short keys, for there are hundreds."""
    anchors = [" ".join(anchor.split()) or "⏎" for anchor in segment.anchors]
    return {
        "n": segment.number, "first": segment.first, "tokens": segment.tokens, "kept": segment.kept,
        "counts": segment.counts, "anchors": anchors[:_SHOWN_ANCHORS], "more": max(0, len(anchors) - _SHOWN_ANCHORS),
        "why": segment.why(),
        "history": [[c.at, c.count, c.state, c.reason] for c in segment.changes[-_SHOWN_CHANGES:]],
    }


def _map(segments: Sequence[SegmentInfo]) -> list[dict[str, Any]]:
    """One bar a segment: as wide as its tokens, as high as its kept share (its root, so that few can be told apart)."""
    bars, x = [], 0
    for segment in segments:
        height = round(100 * segment.density**0.5, 1)
        kind = "recalled" if segment.counts.get("recalled") else "whole" if not segment.dropped else "anchor"
        bars.append({"n": segment.number, "x": x, "width": segment.tokens, "height": height, "kind": kind})
        x += segment.tokens
    return bars


def _policy_line(policy: AnchorConfig) -> str:
    parts = [f"anchors {'+'.join(policy.anchors) or 'none'}"]
    if "SEL" in policy.anchors:
        parts.append(f"scorer {policy.scorer} at {policy.reduction:g}×")
    window = "all" if policy.recent_window >= 2**31 else str(policy.recent_window)
    parts += [f"{policy.sinks} sinks", f"recent window {window}", f"recall {policy.recall}"]
    if policy.cell_budget is not None:
        budget = "of the window" if policy.cell_budget == "window" else f"{policy.cell_budget:,} cells"
        parts.append(f"budget {budget}")
    return ", ".join(parts)


def _json(value: Any) -> str:
    """JSON that is safe inside a <script> element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
