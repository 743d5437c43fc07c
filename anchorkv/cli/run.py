"""`anchorkv run`: read documents once, answer questions on them, beside the full cache if wanted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Argument, Option

from anchorkv.cli import tables
from anchorkv.cli.asking import Side, ask_both, ask_one, recalled_texts
from anchorkv.cli.options import JsonOption, ModelOptions, PolicyOptions, SamplingOptions, takes_options
from anchorkv.cli.screen import interactive, note, print_json, reading_bar, stdout, write_file
from anchorkv.config import AnchorConfig, preset
from anchorkv.document import Document
from anchorkv.errors import ConfigError, DocumentError
from anchorkv.extract import extract, title_of
from anchorkv.models import Model


@takes_options
def run(
    documents: Annotated[list[str] | None, Argument(
        metavar="DOC…", show_default=False, help="Files (txt, md, html, pdf, docx); '-' is standard input.")] = None,
    *,
    ask: Annotated[list[str] | None, Option("--ask", "-a", metavar="TEXT", help="A question; repeatable.")] = None,
    questions: Annotated[Path | None, Option(metavar="FILE", help="Questions, one a line.")] = None,
    compare: Annotated[bool, Option("--compare", help="Answer with the full cache as well, side by side.")] = False,
    show_recalled: Annotated[bool, Option("--show-recalled", help="Print what recall brought back.")] = False,
    save: Annotated[Path | None, Option(metavar="FILE", help="Save what was read, to ask again later.")] = None,
    open_: Annotated[Path | None, Option("--open", metavar="FILE", help="Ask a saved document instead of DOC.")] = None,
    policy_out: Annotated[Path | None, Option(metavar="FILE", help="Write the policy as JSON.")] = None,
    as_json: JsonOption = False,
    model: ModelOptions,
    policy: PolicyOptions,
    sampling: SamplingOptions,
) -> None:
    """Read documents and answer questions on them.

    Without --ask or --questions it asks you, on a terminal.
    """
    sources = documents or []
    chosen, asked, draw = policy.chosen(), _questions(ask, questions), sampling.sampling()
    _check(sources, open_, policy, compare)
    prompting = not asked and not save
    if prompting and (as_json or not interactive()):
        raise ConfigError("There is no question; give one with --ask or a file of them with --questions.")
    text = None if open_ else "\n\n".join(extract(source) for source in sources)

    with ExitStack() as stack:
        loaded = stack.enter_context(model.load(chosen))
        if policy_out:
            write_file(policy_out, loaded.policy.to_json() + "\n")
        if text is None:
            document = stack.enter_context(loaded.open(open_ or ""))
        else:
            document = stack.enter_context(
                read_document(loaded, text, title_of(sources), loaded.policy, quiet=as_json)
            )
        if save:
            document.save(save)
            note(f"Saved to {save}; ask it again with --open {save}.")
        sides = [Side("Anchors", document)]
        if compare and text is not None:
            # Sessions of one llama.cpp context pay for each other's cells, so the full cache gets a context of its own.
            other = stack.enter_context(model.load(chosen)) if loaded.engine.name == "llama" else loaded
            sides.append(Side("Full cache", stack.enter_context(
                read_document(other, text, title_of(sources), preset("full"), quiet=as_json, label=" (full cache)")
            )))
        console = Console(quiet=True) if as_json else stdout()
        interrupted = False
        for question in _prompts(console) if prompting else asked:
            try:
                if len(sides) == 2:
                    ask_both(console, sides[0], sides[1], question, sampling.max_tokens, draw)
                else:
                    ask_one(console, sides[0], question, sampling.max_tokens, draw)
            except KeyboardInterrupt:
                console.print("\n(stopped)", style="yellow")
                if not prompting:
                    interrupted = True
                    break
            if show_recalled:
                _print_recalled(console, sides[0])
        if as_json:
            print_json(_report(loaded, sides, interrupted))
        else:
            _print_figures(console, sides, loaded.adapter)
    if interrupted:
        raise typer.Exit(130)


def read_document(
    model: Model, text: str, title: str, policy: AnchorConfig, *, quiet: bool = False, label: str = ""
) -> Document:
    """Read `text` under a progress bar, and note a text longer than the model's window (when `label` is "")."""
    window = sys.maxsize if label else model.engine.info.window
    with reading_bar(f"{title}{label}", window, quiet) as progress:
        return model.read_text(text, title=title, policy=policy, progress=progress)


def _check(sources: list[str], open_: Path | None, policy: PolicyOptions, compare: bool) -> None:
    if open_ is None and not sources:
        raise DocumentError("There is no document; name one or several files, '-' for standard input, or use --open.")
    if open_ is not None:
        if sources:
            raise ConfigError("Give either documents or --open, not both.")
        if compare:
            raise ConfigError("--compare reads the text again, which --open has not; name the document itself.")
        if policy.given():
            raise ConfigError(f"A saved document keeps the policy it was read with; leave out {policy.given()[0]}.")
    if sources.count("-") > 1:
        raise DocumentError("Standard input ('-') can be read once; name it once.")


def _questions(ask: list[str] | None, file: Path | None) -> list[str]:
    asked = [question.strip() for question in ask or []]
    if not all(asked):
        raise ConfigError("A question given with --ask is empty; ask something.")
    if file is not None:
        lines = [line.strip() for line in extract(file).splitlines()]
        asked += [line for line in lines if line and not line.startswith("#")]
        if not asked:
            raise ConfigError(f"{file} has no question in it; write one a line.")
    return asked


def _prompts(console: Console) -> Iterator[str]:
    """Questions typed by the user, until an empty line or the end of input."""
    console.print("Ask about the document; an empty line ends.", style="dim")
    while True:
        try:
            question = console.input("[bold]Question:[/] ").strip()
        except EOFError:
            console.print()
            return
        if not question:
            return
        yield question


def _print_recalled(console: Console, side: Side) -> None:
    for number, text in recalled_texts(side):
        console.print(f"  recalled {number}: ", style="cyan", end="")
        console.print(text, style="dim", markup=False)


def _print_figures(console: Console, sides: list[Side], adapter: str) -> None:
    first = sides[0]
    info, policy = first.document.session.engine.info, first.document.session.config
    console.print()
    console.print(
        f"{first.document.title}: {first.document.accounting().full_cells:,} tokens, read by {info.name} "
        f"({info.weights or first.document.session.engine.name}) "
        + (f"with its anchor adapter ({adapter})" if adapter else "without an adapter")
        + f", anchors {'+'.join(policy.anchors) or 'none'}",
        style="dim", markup=False,
    )
    if len(sides) == 2:
        console.print(tables.comparison(first.document, first.answers, sides[1].document, sides[1].answers))
    else:
        console.print(tables.figures(first.document, first.answers))


def _report(model: Model, sides: list[Side], interrupted: bool) -> dict[str, Any]:
    info, document = model.engine.info, sides[0].document
    out: dict[str, Any] = {
        "title": document.title,
        "model": {"name": info.name, "engine": model.engine.name, "weights": info.weights, "window": info.window,
                  "adapter": model.adapter or None},
        "policy": document.session.config.model_dump(mode="json"),
        **sides[0].as_dict(),
    }
    if len(sides) == 2:
        out["full"] = sides[1].as_dict()
    if interrupted:
        out["interrupted"] = True
    return out
