"""`anchorkv inspect`: what of a text is kept, what is dropped, and why; on the terminal and as a web page."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Argument, Option

from anchorkv.cli.asking import Side, ask_one
from anchorkv.cli.options import JsonOption, ModelOptions, PolicyOptions, SamplingOptions, takes_options
from anchorkv.cli.run import read_document
from anchorkv.cli.screen import note, print_json, stdout, write_file
from anchorkv.extract import extract, title_of
from anchorkv.ledger import Accounting
from anchorkv.views.page import PageInput, render_page
from anchorkv.views.segments import SegmentInfo, counts_of, segment_infos
from anchorkv.views.terminal import terminal_view


@takes_options
def inspect(
    documents: Annotated[list[str], Argument(
        metavar="DOC…", show_default=False, help="Files (txt, md, html, pdf, docx); '-' is standard input.")],
    *,
    html: Annotated[Path | None, Option(metavar="FILE", help="Write a self-contained web page.")] = None,
    terminal: Annotated[bool | None, Option(
        "--terminal/--no-terminal", help="Print the coloured text; without it only if there is no --html.")] = None,
    ask: Annotated[str | None, Option("--ask", "-a", metavar="TEXT", help="Show what a question recalls.")] = None,
    as_json: JsonOption = False,
    model: ModelOptions,
    policy: PolicyOptions,
    sampling: SamplingOptions,
) -> None:
    """Show what of a text is kept, dropped, pinned and recalled, and why."""
    chosen, draw = policy.chosen(), sampling.sampling()
    text = "\n\n".join(extract(source) for source in documents)
    console = Console(quiet=True) if as_json else stdout()
    with ExitStack() as stack:
        loaded = stack.enter_context(model.load(chosen))
        document = stack.enter_context(read_document(loaded, text, title_of(documents), loaded.policy, quiet=as_json))
        ledger, cells, question, answer = document.ledger, document.accounting(), "", ""
        if ask is not None:
            side = Side("", document)
            ask_one(console, side, ask, sampling.max_tokens, draw)
            ledger, cells, question, answer = side.ledgers[-1], side.answers[-1].accounting, ask, side.answers[-1].text
        segments = segment_infos(ledger, loaded.engine.tokenizer)
        name = loaded.engine.info.name
        if html is not None:
            page = PageInput(document.title, name, loaded.policy, segments, cells, question, answer)
            write_file(html, render_page(page))
            note(f"Wrote {html}; open it in a browser.")
        if as_json:
            print_json(_report(document.title, name, segments, cells, question, answer))
        elif terminal if terminal is not None else html is None:
            print_view(console, document.title, segments, cells)


def print_view(console: Console, title: str, segments: Sequence[SegmentInfo], cells: Accounting) -> None:
    """The coloured text; with marks instead of colours where the console has none."""
    for part in terminal_view(title, segments, cells, colours=console.color_system is not None):
        console.print()
        console.print(part)


def _report(
    title: str, model: str, segments: Sequence[SegmentInfo], cells: Accounting, question: str, answer: str
) -> dict[str, Any]:
    out: dict[str, Any] = {
        "title": title, "model": model, "accounting": cells.as_dict(), "counts": counts_of(segments),
        "segments": [
            {
                "number": segment.number, "first": segment.first, "tokens": segment.tokens, "kept": segment.kept,
                "counts": segment.counts, "runs": [[run.state, run.text] for run in segment.runs],
                "why": dict(segment.why()),
            }
            for segment in segments
        ],
    }
    return out | ({"question": question, "answer": answer} if question else {})
