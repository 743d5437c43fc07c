"""Pictures of an evaluation, as PNG and SVG: one or two a task, drawn from the rows of its results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from anchorkv.evaluate.run import Row

COLOURS = ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""They stay apart for colour-blind readers (Okabe and Ito); markers and dashes tell the lines apart as well."""
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P", "X"), ("--", "-", ":", "-.")
KINDS = ("png", "svg")
GROUPS = ("set", "benchmark", "text", "passages", "shots", "length")
"""Fields that tell groups of rows apart, each with a row for every way."""

Drawn = Iterator[tuple[str, Figure]]


def draw(rows: Sequence[Row], folder: Path, model: str = "") -> list[str]:
    """All pictures of `rows` into `folder`; their names. model: what the titles say was measured."""
    names = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [{**row, "way": _way(row, rows)} for row in rows if row["task"] == task and "error" not in row]
        for name, figure in PICTURES.get(task, _bars)(task, mine, model) if mine else ():
            for kind in KINDS:
                figure.savefig(folder / f"{name}.{kind}", dpi=150)
                names.append(f"{name}.{kind}")
    return names


def _way(row: Row, rows: Sequence[Row]) -> str:
    """What the legend calls the row's way: a policy that was tried with several modes of recall is several ways."""
    modes = {other.get("recall") for other in rows if (other["task"], other["policy"]) == (row["task"], row["policy"])}
    return f"{row['policy']}, recall {row['recall']}" if len(modes) > 1 else str(row["policy"])


# --- by task -------------------------------------------------------------------------------------------------------


def _perplexity(task: str, rows: Sequence[Row], model: str) -> Drawn:
    """Perplexity against context length; and what each KV byte buys."""
    figure, panels = _panels(rows, "text", "Perplexity against context length", model)
    for panel, mine in panels:
        for row in mine:
            points = row["curve"]
            panel.plot([p["length"] for p in points], [p["perplexity"] for p in points], **_style(row, rows))
        _tokens(panel, [p["length"] for row in mine for p in row["curve"]])
        panel.set(xlabel="tokens read", ylabel="perplexity of the scored tokens so far")
    _legend(figure)
    yield f"{task}-length", figure
    figure, panels = _panels(rows, "text", "Perplexity against KV memory", model)
    for panel, mine in panels:
        for row in filter(lambda row: _number(row["ratio"]), mine):
            style = {**_style(row, rows), "linestyle": ""}
            error, above = (_error(row, name) for name in ("kv_bytes", "ratio"))
            panel.errorbar(row["kv_bytes"] / 2**20, row["ratio"], above, error / 2**20, capsize=2, **style)
        _one(panel)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set(xlabel="KV cache at the end (MiB)", ylabel="perplexity, times the full cache's (± s.e.)")
    _legend(figure)
    yield f"{task}-memory", figure


def _needle(task: str, rows: Sequence[Row], model: str) -> Drawn:
    """A heat map a way: how often the needle was found, how deep in how long a text. A picture a number of needles."""
    rows = [row for row in rows if _number(row["depth"]) and _number(row.get("score"))]
    numbers = list(dict.fromkeys(row.get("needles", 1) for row in rows))
    for needles in numbers:
        mine = [row for row in rows if row.get("needles", 1) == needles]
        lengths, depths = (sorted({row[name] for row in mine}) for name in ("length", "depth"))
        figure, panels = _panels(mine, "way", f"Needle found, {needles} in the text", model, height=3.2)
        for panel, found in panels:
            scores = np.full((len(depths), len(lengths)), np.nan)
            for row in found:
                scores[depths.index(row["depth"]), lengths.index(row["length"])] = row["score"]
            image = panel.imshow(scores, vmin=0, vmax=1, cmap="cividis", aspect="auto")
            for (y, x), score in np.ndenumerate(scores):
                if not math.isnan(score):
                    panel.text(x, y, f"{score:.0%}", ha="center", va="center", color="k" if score > 0.5 else "w")
            panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            panel.set(xlabel="tokens", ylabel="depth of the needle")
            panel.grid(False)
        figure.colorbar(image, ax=[panel for panel, _ in panels], label="found", format=PercentFormatter(1))
        yield task if len(numbers) == 1 else f"{task}-{needles}", figure


def _icl(task: str, rows: Sequence[Row], model: str) -> Drawn:
    over, seconds = _first(rows, "demonstrations", "shots"), _first(rows, "seconds", "seconds_per_question")
    scores = (("accuracy", "accuracy (± s.e.)"), (seconds, "seconds a question"))
    yield task, _lines(rows, model, "Demonstrations in context", over, "demonstrations", scores, "benchmark")


def _speed(task: str, rows: Sequence[Row], model: str) -> Drawn:
    scores = tuple((f"{name}_ratio", f"{name}, times the full cache's (± s.e.)") for name in ("prefill", "decode"))
    over = _first(rows, "tokens", "length")
    yield task, _lines(rows, model, "Speed beside the full cache's", over, "tokens in context", scores)


def _bars(task: str, rows: Sequence[Row], model: str) -> Drawn:
    """The main score, the first that has a standard error, of every group of rows: a benchmark, a length …"""
    scores = [name for name in rows[0] if f"{name}_stderr" in rows[0]]
    scores += [name for name in rows[0] if isinstance(rows[0][name], float)]
    if not scores:
        return
    score = scores[0]
    keys = [name for name in GROUPS if name in rows[0]]
    keys = [name for name in keys if len({row.get(name) for row in rows}) > 1] or keys[:1]
    groups = list(dict.fromkeys(_group(row, keys) for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    # Many bars are read better from above to below.
    said = f"{score.removesuffix('_s')}/s" if score.endswith("_s") else score
    said = said.replace("_", " ")
    figure = _figure(f"{task}: {said}", model, 8, 1.6 + 0.24 * (len(ways) + 1) * len(groups))
    panel = _tidy(figure.add_subplot())
    height = 1 / (len(ways) + 1)
    for row in filter(lambda row: _number(row.get(score)), rows):
        at = groups.index(_group(row, keys)) + (ways.index(row["way"]) - (len(ways) - 1) / 2) * height
        panel.barh(at, row[score], height, xerr=_error(row, score), capsize=2, error_kw={"linewidth": 1},
                   color=_style(row, rows)["color"], label=row["way"], hatch="//" * (ways.index(row["way"]) // 7))
    panel.set_yticks(range(len(groups)), groups)
    panel.invert_yaxis()
    panel.grid(False, axis="y")
    panel.set_xlabel(f"{said} (± s.e.)")
    _legend(figure)
    yield task, figure


PICTURES: dict[str, Callable[[str, Sequence[Row], str], Drawn]] = {
    "perplexity": _perplexity, "needle": _needle, "icl": _icl, "speed": _speed,
}


def _group(row: Row, keys: Sequence[str]) -> str:
    words = [row[key] if isinstance(row.get(key), str) else f"{key.replace('_', ' ')} {row.get(key)}" for key in keys]
    return ", ".join(words)


def _lines(
    rows: Sequence[Row], model: str, title: str, over: str, label: str, scores: Sequence[tuple[str, str]],
    group: str = "",
) -> Figure:
    """A panel a score (field, label) over the field `over`, a line a way; ratios have a line at 1. group: a field whose
    every value has panels of its own."""
    groups = list(dict.fromkeys(row.get(group) for row in rows))
    figure = _figure(title, model, 4.6 * len(scores) + 1.6, 3.8 * len(groups) + 0.6)
    grid = figure.subplots(len(groups), len(scores), squeeze=False)
    for panels, value in zip(grid, groups, strict=True):
        mine = [row for row in rows if row.get(group) == value]
        for panel, (name, what) in zip(panels, scores, strict=True):
            for way in dict.fromkeys(row["way"] for row in mine):
                line = [row for row in mine if row["way"] == way and _number(row.get(name))]
                line.sort(key=lambda row: float(row[over]))
                if line:
                    x, y = ([row[field] for row in line] for field in (over, name))
                    panel.errorbar(x, y, [_error(row, name) for row in line], capsize=2, **_style(line[0], rows))
            _tokens(_tidy(panel), [row[over] for row in rows])
            if name.endswith("_ratio"):
                _one(panel)
            if name == "accuracy":
                panel.yaxis.set_major_formatter(PercentFormatter(1))
            panel.set(xlabel=label, ylabel=what, title="" if value is None else str(value))
    _legend(figure)
    return figure


# --- what they have in common --------------------------------------------------------------------------------------


def _panels(
    rows: Sequence[Row], name: str, title: str, model: str, height: float = 4.2
) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
    """A panel for every value of the field `name`, with its rows; at most three side by side."""
    values = list(dict.fromkeys(row[name] for row in rows))
    columns = min(len(values), 3)
    lines = math.ceil(len(values) / columns)
    figure = _figure(title, model, max(5.5, 4.6 * columns) + 1.6, lines * height + 0.6)
    found = []
    for number, panel in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
        if number < len(values):
            _tidy(panel).set_title(str(values[number]))
            found.append((panel, [row for row in rows if row[name] == values[number]]))
        else:
            panel.remove()
    return figure, found


def _figure(title: str, model: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
    figure.suptitle(f"{title}\n{model}" if model else title, fontweight="bold")
    return figure


def _tidy(panel: Axes) -> Axes:
    panel.grid(alpha=0.25)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    return panel


def _style(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """The look of the row's way, the same in all pictures of `rows`."""
    at = list(dict.fromkeys(other["way"] for other in rows)).index(row["way"])
    return {
        "color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)], "markersize": 5,
        "linestyle": DASHES[at % len(DASHES)], "label": row["way"],
    }


def _legend(figure: Figure) -> None:
    """One for all panels, beside them."""
    found: dict[str, Any] = {}
    for panel in figure.axes:
        handles, labels = panel.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside right upper", frameon=False)


def _tokens(panel: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis of base 2 with a mark at the values themselves."""
    marks = sorted({value for value in values if value > 0})
    if len(marks) > 1:
        panel.set_xscale("symlog" if min(values) <= 0 else "log", base=2)
        panel.set_xticks(sorted({*values})[:: math.ceil(len(marks) / 8)])
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _one(panel: Axes) -> None:
    panel.axhline(1, color="grey", linewidth=0.8, zorder=0)


def _first(rows: Sequence[Row], *names: str) -> str:
    """The first of these fields that the rows have."""
    return next((name for name in names if name in rows[0]), names[0])


def _error(row: Row, name: str) -> float:
    value = row.get(f"{name}_stderr")
    return float(value) if value is not None and _number(value) else 0.0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
