"""The report's pictures, each with what it says in words and its numbers as a table. Drawn from the report alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from anchorkv.poc.report.place import Place
from anchorkv.poc.report.selection import chosen, way_of
from anchorkv.poc.report.svg import COLOURS, drawing, label, svg
from anchorkv.poc.report.words import Words

WIDTH = 400
"""CSS pixels: drawn for a phone, so that its text is read there, and enlarged a little elsewhere."""
SHAPES = ("o", "s", "^", "D", "v", "P")
"""Markers of policies; colours tell modes of recall apart."""
SIZES = {"full": 8, "off": 11, "auto": 8.5, "on": 6.5}
"""Of marks: two modes of recall that do alike are both seen."""
_ROW, _CHARACTERS = 46, 46


@dataclass(frozen=True)
class Cell:
    """A number of a table: where it stands in the report and what kind of number it is."""

    place: Place
    kind: str


@dataclass(frozen=True)
class Picture:
    name: str
    svg: Markup
    legend: Sequence[tuple[str, str, Any]]
    """shape, colour, text"""
    columns: Sequence[Any]
    rows: Sequence[Sequence[Any]] = field(default=())
    """The first of each row is its heading; Cells are numbers."""


def pictures(report: Place, w: Words) -> list[Picture]:
    """All pictures for which there is something to draw."""
    found = (_memory(report, w), _quality(report, w), _answers(report, w), _speed(report, w))
    return [picture for picture in found if picture]


def _memory(report: Place, w: Words) -> Picture | None:
    """KV cache against tokens read: the longest document; the others thin behind it."""
    documents = sorted((one for one in report.documents if len(one.memory_curve)), key=lambda one: -one.tokens.raw)
    if not documents:
        return None
    mib = report.model.cell_bytes.raw / 2**20
    with drawing(WIDTH, 290) as figure:
        panel = figure.add_subplot()
        for document in reversed(documents):
            read, full, kept = zip(*document.memory_curve.raw, strict=True)
            first = document is documents[0]
            if first:
                panel.plot(read, [cells * mib for cells in full], color=COLOURS["full"], linestyle="--")
            panel.plot(read, [cells * mib for cells in kept], color=COLOURS["auto"], linewidth=2.5 if first else 0.8,
                       alpha=1 if first else 0.5)
        _axes(panel, x_from_zero=True)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    longest = documents[0]
    last = longest.memory_curve[len(longest.memory_curve) - 1]
    description = w("picture.memory.description", tokens=w.number(last[0].raw, "count"),
                    full=w.number(last[1].raw, "count"), kept=w.number(last[2].raw, "count"))
    return Picture(
        "memory", _svg(figure, "memory", w, description),
        legend=[("dashes", "full", w("way.full")), ("line", "auto", w("picture.memory.anchored"))]
        + ([("thin", "auto", w("picture.memory.others"))] if len(documents) > 1 else []),
        columns=[w("picture.memory.x"), w("picture.memory.full"), w("picture.memory.kept")],
        rows=[[Cell(point[0], "count"), Cell(point[1], "count"), Cell(point[2], "count")]
              for point in _thinned(list(longest.memory_curve), 12)],
    )


def _quality(report: Place, w: Words) -> Picture | None:
    """Right answers against the full cache's, over the reduction of memory: every way, the chosen one in a ring."""
    ways = [way for way in report.overall.ways if way.answering.share_of_full.number.raw is not None
            and way.reduction.number.raw is not None]
    if len(ways) < 2:
        return None
    limits, policies = report.thresholds, _policies(report)
    with drawing(WIDTH, 300) as figure:
        panel = figure.add_subplot()
        best = chosen(report.overall)
        for way in ways:
            x, y = way.reduction.number.raw, way.answering.share_of_full.number.raw
            panel.errorbar(x, y, way.answering.share_of_full.stderr.raw or 0, color=COLOURS[_colour(way)], elinewidth=1,
                           marker=_shape(way, policies), markersize=SIZES[_colour(way)], linestyle="none")
            if way.where == best.where:
                panel.plot(x, y, marker="o", markersize=19, linestyle="none", markerfacecolor="none",
                           markeredgecolor=COLOURS["ink"])
        _axes(panel)
        right = max(limits.memory_reduction.raw, *(way.reduction.number.raw for way in ways)) * 1.08
        low, high = panel.get_ylim()
        low, high = min(low, limits.quality_share.raw - 0.05), max(high, 1.04)
        panel.set(xlim=(0, right), ylim=(max(low, -0.05), high))
        panel.fill_between([limits.memory_reduction.raw, right], limits.quality_share.raw, high, color=COLOURS["good"],
                           linewidth=0, zorder=0)
        panel.yaxis.set_major_formatter(PercentFormatter(1, 0))
    reduction, share = best.reduction.number.raw, best.answering.share_of_full.number.raw
    description = w("picture.quality.description", way=way_of(w, best), reduction=w.number(reduction, "fewer"),
                    share=w.number(share, "share"))
    legend = [(_shape(way, policies), _colour(way), way_of(w, way)) for way in ways]
    return Picture(
        "quality", _svg(figure, "quality", w, description),
        legend=[*legend, ("ring", "ink", w("picture.quality.chosen")), ("area", "good", w("picture.quality.good"))],
        columns=[w("table.way"), w("figure.reduction"), w("figure.share_of_full")],
        rows=[[way_of(w, way), Cell(way.reduction, "fewer"), Cell(way.answering.share_of_full, "share")]
              for way in ways],
    )


def _answers(report: Place, w: Words) -> Picture | None:
    """Right answers of every area: the full cache, and the policy of its verdict in each mode of recall."""
    rows = []
    for area in report.areas:
        mine = [way for way in area.ways if way.policy.raw in ("full", area.verdict.policy.raw)
                and way.answering.correct.number.raw is not None]
        if mine:
            rows.append((area, mine))
    if not rows:
        return None
    modes = [mode for mode in ("off", "auto", "on") if mode in report.recall_modes.raw]
    with drawing(WIDTH, 52 + _ROW * len(rows)) as figure:
        panel = figure.add_subplot()
        for at, (_, ways) in enumerate(rows):
            _row(panel, at)
            for way in ways:
                full = way.policy.raw == "full"
                panel.plot(way.answering.correct.number.raw, at, linestyle="none", color=COLOURS[_colour(way)],
                           marker="|" if full else SHAPES[modes.index(way.recall.raw)],
                           markersize=17 if full else SIZES[way.recall.raw],
                           markeredgewidth=3 if full else 0, alpha=0.9)
        _rows(panel, len(rows))
        panel.set_xlim(-0.03, 1.03)
        panel.xaxis.set_major_formatter(PercentFormatter(1, 0))
    shown = {**{"full": ("bar", "full", w("way.full"))},
             **{mode: (SHAPES[at], mode, w(f"recall.{mode}")) for at, mode in enumerate(modes)}}
    return Picture(
        "answers", _svg(figure, "answers", w, w("picture.answers.description", areas=len(rows)), _names(rows)),
        legend=list(shown.values()), columns=[w("table.area"), *(text for _, _, text in shown.values())],
        rows=[[_name(area), *(Cell(found[key].answering.correct, "share") if key in found else "–" for key in shown)]
              for area, ways in rows
              for found in [{"full" if way.policy.raw == "full" else way.recall.raw: way for way in ways}]],
    )


def _speed(report: Place, w: Words) -> Picture | None:
    """Speed against the full cache's, of the way that each area's verdict is about."""
    names = ("prefill_ratio", "decode_ratio", "first_token_ratio")
    rows = [(area, chosen(area).speed) for area in report.areas
            if any(chosen(area).speed[name].number.raw is not None for name in names)]
    if not rows:
        return None
    colours = ("off", "auto", "on")
    with drawing(WIDTH, 52 + _ROW * len(rows)) as figure:
        panel = figure.add_subplot()
        panel.axvline(1, color=COLOURS["full"], linewidth=1.5, linestyle="--")
        for at, (_, speed) in enumerate(rows):
            _row(panel, at)
            for name, colour, shape in zip(names, colours, SHAPES, strict=False):
                if speed[name].number.raw is not None:
                    panel.errorbar(speed[name].number.raw, at, xerr=speed[name].stderr.raw or 0, color=COLOURS[colour],
                                   marker=shape, markersize=9, elinewidth=1, linestyle="none")
        _rows(panel, len(rows))
        panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return Picture(
        "speed", _svg(figure, "speed", w, w("picture.speed.description", areas=len(rows)), _names(rows)),
        legend=[*((shape, colour, w(f"figure.{name}")) for name, colour, shape in
                  zip(names, colours, SHAPES, strict=False)), ("dashes", "full", w("picture.speed.one"))],
        columns=[w("table.area"), *(w(f"figure.{name}") for name in names)],
        rows=[[_name(area), *(Cell(speed[name], "ratio") for name in names)] for area, speed in rows],
    )


# --- what they have in common ----------------------------------------------------------------------------------------


def _svg(figure: Figure, name: str, w: Words, description: Markup, labels: Sequence[str] = ()) -> Markup:
    return svg(figure, f"picture-{name}", w.texts[f"picture.{name}.title"], description.unescape(), labels)


def _axes(panel: Axes, x_from_zero: bool = False) -> None:
    panel.grid(linewidth=0.8)
    panel.tick_params(length=0, labelsize=12)
    panel.xaxis.set_major_locator(MaxNLocator(5))
    panel.yaxis.set_major_locator(MaxNLocator(5))
    if x_from_zero:
        panel.set(xlim=(0, None), ylim=(0, None))


def _row(panel: Axes, at: int) -> None:
    """The name above a row of marks: any length of it has room there, on a phone as well."""
    panel.axhline(at, color=COLOURS["line"], linewidth=1, zorder=0)
    panel.text(0, at - 0.3, label(at), transform=panel.get_yaxis_transform(), fontsize=12, va="bottom")


def _rows(panel: Axes, count: int) -> None:
    panel.grid(axis="x", linewidth=0.8)
    panel.tick_params(length=0, labelsize=12)
    panel.set(ylim=(count - 0.6, -0.75), yticks=[])
    panel.spines["left"].set_visible(False)
    panel.xaxis.set_major_locator(MaxNLocator(5))


def _names(rows: Sequence[tuple[Place, Any]]) -> list[str]:
    return [_short(_name(area)) for area, _ in rows]


def _name(area: Place) -> str:
    return str(area.name)


def _short(text: str) -> str:
    """As much as fits above a row; characters of East Asia take the room of two."""
    room, kept = _CHARACTERS, ""
    for character in text:
        room -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if room < 1:
            return f"{kept}…"
        kept += character
    return kept


def _policies(report: Place) -> list[str]:
    return list(report.policies.raw)


def _shape(way: Place, policies: Sequence[str]) -> str:
    return "X" if way.policy.raw == "full" else SHAPES[policies.index(way.policy.raw) % len(SHAPES)]


def _colour(way: Place) -> str:
    return "full" if way.policy.raw == "full" else str(way.recall.raw)


def _thinned(points: list[Place], most: int) -> list[Place]:
    """Evenly spread ones, the last among them."""
    step = -(-len(points) // most)
    return points[::-1][::step][::-1]
