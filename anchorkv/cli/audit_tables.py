"""How `anchorkv audit` shows records. Everything that a tenant wrote is printed without control characters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anchorkv.cli.asking import printable
from anchorkv.cli.screen import count

if TYPE_CHECKING:
    from anchorkv.serve.audit.chain import Entry, Report
    from anchorkv.serve.audit.replay import Comparison

_STATES = ("tokens", "kept", "dropped", "pinned", "recalled")


def print_report(console: Console, report: Report, noted: bool) -> None:
    """What verification found."""
    if report.sound:
        console.print(
            f"Sound: {count(report.records)} records, {count(report.retired)} of them retired.", style="green"
        )
        console.print(f"Head: {report.head}", soft_wrap=True)
        if not noted:
            console.print("To rule out that the end was cut off, give a head noted earlier (--head).", style="dim")
        return
    console.print(f"Damaged: {count(report.damaged)} faults in {count(report.records)} records.", style="bold red")
    for fault in report.faults:
        console.print(f"  {fault}", markup=False, soft_wrap=True)
    if report.damaged > len(report.faults):
        console.print(f"  … and {count(report.damaged - len(report.faults))} more", style="dim")


def print_list(console: Console, entries: Sequence[Entry]) -> None:
    """A line a record."""
    table = _table("no.", "time (UTC)", "tenant", "model", "policy", "fallback", "kept", "full", "id")
    for entry in entries:
        found = entry.as_dict()
        figures = found.get("figures") or {}
        table.add_row(
            str(entry.sequence), found["time"][:19].replace("T", " "), _text(entry.tenant), _text(entry.model),
            _text(entry.policy), str(entry.fallback or ""), _figure(figures.get("kept_cells")),
            _figure(figures.get("full_cells")), _text(entry.id + (" (retired)" if entry.retired else "")),
        )
    console.print(table)


def print_entry(console: Console, entry: Entry) -> None:
    """All of one record."""
    found = entry.as_dict()
    head = _table("", "")
    for name, value in found.items():
        if not isinstance(value, (dict, list)) and value not in (None, "") and name != "answer":
            head.add_row(name, _text(value))
    console.print(head)
    if entry.retired:
        console.print("The content was retired; its hash is still part of the chain.", style="yellow")
    for name in ("figures", "policy_config", "details"):
        _print_mapping(console, name, found.get(name))
    _print_steps(console, found.get("fallback") or [])
    _print_segments(console, found.get("segments") or [])
    if found.get("request") is not None:
        console.print("request", style="bold")
        console.print(_text(found["request"]), soft_wrap=True)
    if found.get("answer") is not None:
        console.print("answer", style="bold")
        console.print(_text(found["answer"]), soft_wrap=True)


def print_comparisons(console: Console, comparisons: Sequence[Comparison]) -> None:
    """What differs, recorded beside now; one line when nothing does."""
    differing = [item for item in comparisons if not item.same]
    if not differing:
        console.print(f"The same answer: {len(comparisons)} of {len(comparisons)} things agree.", style="green")
        return
    table = _table("", "recorded", "now")
    for item in differing:
        table.add_row(item.name, _text(item.recorded), _text(item.now))
    console.print(table)
    console.print(f"{len(differing)} of {len(comparisons)} things differ.", style="yellow")


def _print_mapping(console: Console, title: str, values: Any) -> None:
    if not isinstance(values, Mapping) or not values:
        return
    table = _table(title, "")
    for name, value in values.items():
        table.add_row(_text(name), _text(value))
    console.print(table)


def _print_steps(console: Console, steps: Sequence[Any]) -> None:
    if not steps:
        return
    console.print("fallback steps", style="bold")
    for number, step in enumerate(steps, start=1):
        console.print(Text(f"  {number}. ") + _text(step), soft_wrap=True)


def _print_segments(console: Console, segments: Sequence[Any]) -> None:
    rows = [item for item in segments if isinstance(item, Mapping)]
    if not rows:
        return
    table = _table("segment", "span", *_STATES, "why")
    for item in rows:
        why = item.get("why")
        table.add_row(
            _text(item.get("number", "")), _text(f"{item.get('start', '')}–{item.get('stop', '')}"),
            *(_figure(item.get(name)) for name in _STATES),
            _text("; ".join(map(str, why)) if isinstance(why, list) else why or ""),
        )
    console.print(table)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_header=any(headings))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _figure(value: Any) -> str:
    return count(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else ""


def _text(value: Any) -> Text:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Text(printable(shown).encode("utf-8", "replace").decode())
