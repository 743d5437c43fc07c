"""One picture of all methods: score against KV bytes, a panel a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

LABELS = {"continuation": "perplexity (less is better)", "reading": "F1", "needle": "needles found"}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """PNG at `path`. Without matplotlib nothing is drawn."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    good = [row for row in rows if "error" not in row]
    tasks = [task for task in LABELS if any(row["task"] == task for row in good)]
    if not tasks:
        return
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(6 * len(tasks), 5), squeeze=False, layout="constrained")
    marks = cycle("ovs^DPX*<>hd")
    styles = {name: next(marks) for name in dict.fromkeys(row["method"] for row in good)}
    for axis, task in zip(axes[0], tasks, strict=True):
        for name, mark in styles.items():
            mine = sorted((r for r in good if r["task"] == task and r["method"] == name), key=lambda r: r["kv_bytes"])
            own = name.startswith("anchorkv")
            axis.errorbar(
                [row["kv_bytes"] / 2**20 for row in mine], [row["score"] for row in mine],
                [0 if math.isnan(row["stderr"]) else row["stderr"] for row in mine], marker=mark, markersize=5,
                linewidth=2.2 if own else 0.9, alpha=1 if own else 0.7, capsize=2, label=name,
            )
        axis.set(title=task, xlabel="KV cache (MiB, log)", ylabel=LABELS[task], xscale="log")
        if task == "continuation":
            axis.set_yscale("log")
        axis.grid(alpha=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
