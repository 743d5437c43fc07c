"""One picture of all methods: a panel a task, a line a method, a dot a reduction; the best are at the top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = {
    "continuation": ("ratio", "perplexity to the full cache's\n(less is better)"),
    "reading": ("answer_loss", "loss of the right answer\n(less is better)"),
    "needle": ("score", "share of needles found\n(more is better)"),
}
"""What is drawn of a task's rows, and what it is called."""


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """PNG at `path`. Without matplotlib nothing is drawn."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    panels = {task: _drawable(rows, task) for task in PANELS}
    panels = {task: found for task, found in panels.items() if found}
    if not panels:
        return
    asked = sorted({row["requested"] for found in panels.values() for row in found if row["requested"]})
    shades = pyplot.get_cmap("viridis_r")
    colours = {reduction: shades((n + 0.5) / len(asked)) for n, reduction in enumerate(asked)}
    shifts = {reduction: 0.18 * (n - (len(asked) - 1) / 2) for n, reduction in enumerate(asked)}
    most = max(len({row["label"] for row in found}) for found in panels.values())
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 1.6 + 0.27 * most), squeeze=False, layout="constrained"
    )
    for axis, (task, found) in zip(axes[0], panels.items(), strict=True):
        field, title = PANELS[task]
        names = _ranked(found, field, descending=task == "needle")
        for row in found:
            error = row.get(f"{field}_stderr", row["stderr"] if field == "score" else math.nan)
            axis.errorbar(
                row[field], names.index(row["label"]) + shifts.get(row["requested"], 0), marker="o", markersize=5,
                xerr=0 if math.isnan(error) else error, color=colours.get(row["requested"], "black"), elinewidth=1,
                linestyle="none",
            )
        axis.set(title=task, xlabel=title, ylim=(len(names) - 0.5, -0.5))
        axis.set_yticks(range(len(names)), names)
        for label in axis.get_yticklabels():
            if label.get_text().startswith("anchorkv"):
                label.set_fontweight("bold")
        axis.grid(alpha=0.25)
        if task == "continuation":
            axis.set_xscale("log")
            axis.set_xticks([1, 1.25, 1.5, 2, 3], ["1×", "1.25×", "1.5×", "2×", "3×"])
            axis.minorticks_off()
    marks = {"KV bytes, fewer than the full cache's:": "none", **{f"{r:g}×": c for r, c in colours.items()},
             "as the method has it": "black"}
    handles = [pyplot.Line2D([], [], color=c, marker="o", linestyle="none", label=name) for name, c in marks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(marks), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _drawable(rows: Sequence[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """The rows that have what is drawn; a method whose reduction is its own is labelled with it."""
    field = PANELS[task][0]
    good = [row for row in rows if row["task"] == task and math.isfinite(row.get(field, math.nan))]
    full = max((row["kv_bytes"] for row in good), default=0)

    def label(row: dict[str, Any]) -> str:
        fewer = full / row["kv_bytes"]
        return row["method"] if row["requested"] or fewer < 1.05 else f"{row['method']} ({fewer:.2g}×)"

    return [{**row, "label": label(row)} for row in good]


def _ranked(rows: Sequence[dict[str, Any]], field: str, descending: bool) -> list[str]:
    """By the middle one of each method's values."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["label"], []).append(row[field])
    return sorted(values, key=lambda name: sorted(values[name])[len(values[name]) // 2], reverse=descending)
