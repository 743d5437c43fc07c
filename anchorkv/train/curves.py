"""Learning curves, drawn from what a run has logged: loss, perplexities, context recovered, perplexity ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, PercentFormatter

PNG, SVG = "curves.png", "curves.svg"
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Colours that stay apart for colour-blind readers (Okabe and Ito); markers and dashes tell the lines apart as well."""
SMOOTHED = 40
"""Losses from which on a running mean is drawn over them."""

Row = Mapping[str, Any]


def save_curves(rows: Sequence[Row], folder: Path, title: str) -> None:
    """Draw `figure` as FOLDER/curves.png and curves.svg."""
    drawn = figure(rows, title)
    for name in (PNG, SVG):
        drawn.savefig(folder / name, dpi=150)


def figure(rows: Sequence[Row], title: str) -> Figure:
    """rows: the log (`progress.read_log`), by step. Without validation the loss is the only panel."""
    validated = bool(points(rows, "perplexity_anchored")[0])
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    drawn = Figure(figsize=(10, 7.4) if validated else (7, 4.2), layout=layout)
    drawn.suptitle(title, fontweight="bold")
    axes = list(drawn.subplots(2 if validated else 1, 2 if validated else 1, squeeze=False).flat)
    _loss(axes[0], rows)
    if validated:
        _perplexities(axes[1], rows)
        _recovered(axes[2], rows)
        _ratio(axes[3], rows)
        for panel in axes[1:]:
            _widen(panel, points(rows, "perplexity_anchored")[0])
    for panel in axes:
        panel.set_xlabel("tokens trained")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return drawn


def points(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Tokens, and the figure called `name` at each, where it was logged and is a number."""
    found = [row for row in rows if row.get(name) is not None]
    return [row["tokens"] for row in found], [row[name] for row in found]


def _loss(panel: Axes, rows: Sequence[Row]) -> None:
    tokens, losses = points(rows, "loss")
    many = len(losses) >= SMOOTHED
    panel.plot(tokens, losses, color=BLUE, alpha=0.35 if many else 1, linewidth=1 if many else 1.8)
    if many:
        width = len(losses) // 20 * 2 + 1
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        panel.plot(tokens[width // 2 : -(width // 2)], mean, color=BLUE, linewidth=2, label=f"mean of {width}")
        panel.legend(frameon=False)
    panel.set_title("Training loss")
    panel.set_ylabel("loss")


def _perplexities(panel: Axes, rows: Sequence[Row]) -> None:
    for name, colour, marker, dashes in (
        ("no memory", RED, "^", ":"), ("anchored", BLUE, "s", "-"), ("full", GREEN, "o", "--"),
    ):
        at, values = points(rows, f"perplexity_{name.replace(' ', '_')}")
        panel.plot(at, values, color=colour, marker=marker, linestyle=dashes, markersize=4.5, label=name)
    panel.set_title("Validation perplexity")
    panel.set_ylabel("perplexity")
    panel.margins(y=0.22)  # room for the legend, whatever the curves do
    panel.legend(frameon=False, ncols=3, loc="upper center", columnspacing=1.2, handlelength=2.4)


def _recovered(panel: Axes, rows: Sequence[Row]) -> None:
    values = _against_full(panel, rows, "context_recovered", "{:.0%}", below=True)
    panel.set_ylim(min([0, *values]), 1.04)
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    reductions = points(rows, "reduction")[1]
    panel.set_title("Context recovered" + (f" at {reductions[-1]:.1f}× fewer cells" if reductions else ""))
    panel.set_ylabel("share of what older text helps")


def _ratio(panel: Axes, rows: Sequence[Row]) -> None:
    _against_full(panel, rows, "ratio", "{:.3f}", below=False)
    panel.set_title("Perplexity ratio, anchored / full cache")
    panel.set_ylabel("ratio")
    panel.margins(y=0.12)


def _against_full(panel: Axes, rows: Sequence[Row], name: str, form: str, *, below: bool) -> list[float]:
    """A figure that is 1 with the full cache; its newest value is written out. below: it comes from there."""
    at, values = points(rows, name)
    panel.plot(at, values, color=BLUE, marker="s", markersize=4.5)
    panel.axhline(1, color=GREEN, linestyle="--", linewidth=1.2)
    panel.annotate("full cache", (0.01, 1), (0, -4 if below else 4), panel.get_yaxis_transform(), "offset points",
                   color=GREEN, va="top" if below else "bottom")
    if values:
        panel.annotate(form.format(values[-1]), (at[-1], values[-1]), (3, 8), textcoords="offset points", ha="right",
                       fontweight="bold", color=BLUE)
    return values


def _widen(panel: Axes, tokens: list[float]) -> None:
    """A logarithmic axis (that has a 0) where validation spans more than a decade: most is learned early."""
    first, last = next((at for at in tokens if at > 0), 0), tokens[-1]
    if not 0 < 10 * first < last:
        return
    panel.set_xscale("symlog", linthresh=first, linscale=0.4)
    panel.set_xlim(-0.2 * first, 1.3 * last)
    steps = (1,) if last > 500 * first else (1, 2, 5)
    powers = range(int(math.log10(first)), int(math.log10(last)) + 1)
    panel.set_xticks([0, *(at for power in powers for step in steps if first <= (at := step * 10**power) <= last)])
    panel.minorticks_off()
