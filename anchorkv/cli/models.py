"""`anchorkv models`: what can be loaded, and what a token costs in its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from anchorkv.catalog import Entry, describe, find
from anchorkv.cli.options import JsonOption
from anchorkv.cli.screen import count, print_json, size, stdout


def models(
    specs: Annotated[list[str] | None, Argument(
        metavar="SPEC…", show_default=False,
        help="GGUF files, folders or hub ids; without any, what is found here and in the Hugging Face cache.")] = None,
    search: Annotated[list[Path] | None, Option(
        "--search", metavar="DIR", help="Look here as well, with all it holds; repeatable.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List models, with the size of their KV cache. Weights are not loaded."""
    named = [describe(spec) for spec in specs or []]
    entries = [*named, *(find(search or ()) if search or not named else ())]
    if as_json:
        print_json({"models": [entry.as_dict() for entry in entries]})
    else:
        _print(entries)
    if any(entry.problem for entry in named):
        raise typer.Exit(2)


def _print(entries: list[Entry]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for heading in ("Model", "Kind", "Weights", "Layers", "Window", "KV/token", "KV/window", "Engine"):
        right = heading in ("Layers", "Window", "KV/token", "KV/window")
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for entry in entries:
        if entry.problem and not entry.layers:
            continue  # nothing is known of it; the sentence below says why
        table.add_row(
            Text(entry.name), Text(entry.architecture),
            f"{entry.weights} {size(entry.weight_bytes)}" if entry.weight_bytes else "–",
            count(entry.layers) if entry.layers else "–", count(entry.window) if entry.window else "–",
            size(entry.cell_bytes) if entry.cell_bytes else "–", size(entry.full_bytes) if entry.full_bytes else "–",
            ", ".join(entry.engines) or "–",
        )
    console = stdout()
    if table.row_count:
        console.print(table)
        console.print("KV/token and KV/window: what a full cache holds, in f16.", style="dim")
    for entry in entries:
        if entry.problem or entry.note:
            style = "red" if entry.problem else "dim"
            console.print(f"{entry.name}: {entry.problem or entry.note}", style=style, markup=False, soft_wrap=True)
