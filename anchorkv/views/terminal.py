"""The text in a terminal, coloured by what became of each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from anchorkv.ledger import Accounting
from anchorkv.views.segments import STATES, Run, SegmentInfo, counts_of

STYLES = {
    "whole": "default", "anchor": "bold black on yellow", "sink": "bold black on cyan", "pinned": "bold white on blue",
    "recalled": "black on green", "evicted": "red strike", "dropped": "dim",
}
MARKS = {
    "whole": ("", ""), "anchor": ("[", "]"), "sink": ("<", ">"), "pinned": ("{", "}"), "recalled": ("+", "+"),
    "evicted": ("x", "x"), "dropped": ("", ""),
}
"""What stands around a run where there are no colours. Dropped and whole text is then told apart by its segment."""
_SHORT = {
    "whole": "recent, whole", "anchor": "anchor", "sink": "sink", "pinned": "pinned", "recalled": "recalled",
    "evicted": "evicted anchor", "dropped": "dropped",
}


def terminal_view(
    title: str, segments: Sequence[SegmentInfo], accounting: Accounting, colours: bool = True
) -> Iterator[RenderableType]:
    """Legend and counts, one row a segment, and the sum. colours: False marks states with brackets instead."""
    yield Text(title, style="bold")
    yield legend(segments, colours)
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for segment in segments:
        bar = Text(_bar(segment.density), style="yellow" if segment.dropped else "default")
        table.add_row(
            str(segment.number), f"{segment.kept}/{segment.tokens}", bar, _text(segment.runs, colours)
        )
    yield table
    yield Text(
        f"{accounting.kept_cells:,} of {accounting.full_cells:,} cells kept, {accounting.reduction:.1f} times fewer; "
        f"at the peak {accounting.peak_cells:,}",
        style="bold",
    )


def legend(segments: Sequence[SegmentInfo], colours: bool) -> Text:
    """The states that occur, as they are shown, with their counts of tokens."""
    line = Text()
    for state, tokens in counts_of(segments).items():
        if tokens:
            line.append("   " if line.plain else "")
            before, after = ("", "") if colours else MARKS[state]
            line.append(f"{before}{_SHORT[state]}{after}", style=STYLES[state] if colours else "")
            line.append(f" {tokens:,}")
    return line


def describe_states() -> Iterator[str]:
    """One line a state: what it means."""
    for state, meaning in STATES.items():
        yield f"{_SHORT[state]}: {meaning}"


def _text(runs: Sequence[Run], colours: bool) -> Text:
    line = Text()
    for run in runs:
        before, after = ("", "") if colours else MARKS[run.state]
        line.append(before + _one_line(run.text) + after, style=STYLES[run.state] if colours else "")
    return line


def _one_line(text: str) -> str:
    """Line breaks as a sign, other control characters gone: a row is a segment."""
    shown = text.replace("\r", "").replace("\n", "⏎").replace("\t", " ")
    return "".join(character for character in shown if character.isprintable())


def _bar(density: float) -> str:
    """One character from empty to full."""
    return " ▁▂▃▄▅▆▇█"[min(8, round(density * 8 + 0.49))] if density else " "
