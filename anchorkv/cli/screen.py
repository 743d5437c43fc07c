"""What the commands share towards the terminal: the two consoles, a progress bar, and how figures are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

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


@contextmanager
def goes_on(folder: Path) -> Iterator[None]:
    """Whoever interrupts is told where what was measured is."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"What was measured is in {folder}; the same command goes on from there.")
        raise


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


class Bar(Progress):
    """One piece of work: called with (units done, units in all). `say` puts a line of figures under it."""

    _figures = ""

    def __call__(self, done: int, total: int) -> None:
        self.update(self.task_ids[0], completed=done, total=total)

    def say(self, title: str, figures: str) -> None:
        self._figures = figures
        self.update(self.task_ids[0], description=title)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self._figures:
            yield Text(self._figures, style="cyan", no_wrap=True, overflow="ellipsis")


@contextmanager
def work_bar(title: str, unit: str, quiet: bool) -> Iterator[Bar]:
    """A progress bar on standard error, as a callback (units done, units in all). "bytes" are shown in kB, MB …"""
    amount = (DownloadColumn(True),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn(), *amount,
        TimeRemainingColumn(compact=True),
    )
    console = stderr()
    # The time left is judged by the last ten minutes: rich's own half a minute may be less than one training step.
    with Bar(
        *columns, console=console, transient=True, speed_estimate_period=600,
        disable=quiet or not console.is_terminal,
    ) as bar:
        bar.add_task(title, total=None)
        yield bar


@contextmanager
def merging_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar (bytes done, bytes in all) that appears when it is first called: most loads merge nothing."""
    with ExitStack() as stack:
        bars: list[Bar] = []

        def report(done: int, total: int) -> None:
            if not bars:
                note("Merging the built-in adapter into the built-in model, once; --no-adapter leaves it out.")
                bars.append(stack.enter_context(work_bar("Merging", "bytes", quiet=False)))
            bars[0](done, total)

        yield report


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
