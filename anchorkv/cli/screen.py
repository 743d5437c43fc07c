"""What the commands share towards the terminal: the two consoles, a progress bar, and how figures are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from anchorkv.errors import AnchorKVError


def stdout() -> Console:
    """Answers and tables. Made anew each time, because tests and pipes replace sys.stdout."""
    return Console(file=sys.stdout, highlight=False)


def stderr() -> Console:
    """Progress, notes and errors: what must not get into a pipe."""
    return Console(file=sys.stderr, highlight=False)


def note(text: str) -> None:
    """One line on standard error that is no error."""
    stderr().print(f"Note: {text}", style="yellow", markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One object on standard output, and nothing else."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


def interactive() -> bool:
    """Whether a person can be asked something."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def write_file(path: str | Path, text: str) -> None:
    """Raises AnchorKVError when the file cannot be written."""
    try:
        Path(path).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise AnchorKVError(f"{path} cannot be written ({error.strerror}); choose another place.") from None


@contextmanager
def work_bar(title: str, unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, as a callback (units done, units in all). "bytes" are shown in kB, MB …"""
    amount = (DownloadColumn(True),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn(), *amount,
        TimeRemainingColumn(compact=True),
    )
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def reading_bar(title: str, window: int, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as the callback (tokens done, tokens in all) that reading takes.

    window: the model's context length; a longer text gets one note, for the model never learned such positions.
    """
    warned = False
    with work_bar(f"Reading {title}", "tokens", quiet) as bar:

        def report(done: int, total: int) -> None:
            nonlocal warned
            if total > window and not warned:
                warned = True
                note(
                    f"{title} has {total:,} tokens, the model was trained for {window:,}; positions beyond that were "
                    "never trained, and answers on them may be poor."
                )
            bar(done, total)

        yield report


def count(number: float) -> str:
    return f"{number:,.0f}"


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them (1 MiB = 2**20)."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} GiB"


def speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}/s" if tokens_per_second >= 10 else f"{tokens_per_second:,.1f}/s"


def seconds(value: float) -> str:
    return f"{value:,.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 0.095 else f"{value * 1000:,.0f} ms"


def times(value: float) -> str:
    """A ratio: "11×", "3.4×"."""
    return f"{value:,.0f}×" if value >= 100 else f"{value:.1f}×"


def middle(values: list[float]) -> float:
    """The median of what was measured; 0 when nothing was."""
    measured = [value for value in values if value > 0]
    return median(measured) if measured else 0.0
