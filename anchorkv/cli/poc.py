"""`anchorkv poc`: from a folder of documents to a decision.

`poc init` writes a plan, `poc compare` sets two runs side by side; all else is what to run: `anchorkv poc FOLDER`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table
from typer import Argument, Option
from typer.core import TyperGroup

from anchorkv.cli.options import JsonOption, ModelOption, PlannedEngineOption, ThreadsOption
from anchorkv.cli.screen import count, goes_on, interactive, merging_bar, note, print_json, stderr, stdout
from anchorkv.errors import ConfigError
from anchorkv.evaluate.run import Models
from anchorkv.poc.capacity import nbytes
from anchorkv.poc.compare import AreaComparison, Comparison, Row
from anchorkv.poc.compare import compare as compared
from anchorkv.poc.compare import read as read_report
from anchorkv.poc.files import PAGE
from anchorkv.poc.init import ask_for_plan
from anchorkv.poc.live import VERDICTS, View, final
from anchorkv.poc.plan import Plan, is_plan
from anchorkv.poc.results import Figure, PocReport
from anchorkv.poc.run import Run

RUN = "run"
_REPORT = "Report"
_TOLD = 5
"""Skipped files that are named; the report has all of them."""


class _Default(TyperGroup):
    """What begins with no sub-command is given to `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else [RUN, *args])


app = typer.Typer(
    cls=_Default, rich_markup_mode="rich",
    help="From a folder of documents to a decision: what would anchors do for them?",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(
    RUN, epilog="`anchorkv poc init` asks what matters and writes a plan; `anchorkv poc compare A B` sets two runs "
    "side by side.",
)
def run(
    what: Annotated[Path | None, Argument(
        metavar="FOLDER|PLAN.yaml", show_default="the samples that come with anchorkv",
        help="Documents, a sub-folder for each business area; or a plan that `anchorkv poc init` wrote.")] = None,
    questions: Annotated[Path | None, Option(
        "--questions", "-q", metavar="FILE", help="Your own: jsonl, json, yaml or csv of question, answer, document.",
        show_default="questions.* in FOLDER, else made from the documents")] = None,
    skip_bad_rows: Annotated[bool, Option("--skip-bad-rows", help="Pass over bad questions; list them.")] = False,
    policy: Annotated[list[str] | None, Option(
        "--policy", "-p", metavar="NAME[:field=value,…]", show_default="default",
        help="What to set beside the full cache: preset, window, JSON file; repeatable.")] = None,
    budget_minutes: Annotated[float | None, Option(
        "--budget-minutes", show_default="until all is done",
        help="Time to measure in; what is left out is named.")] = None,
    max_tokens: Annotated[int | None, Option(
        "--max-tokens", min=64, help="Tokens read of a document.", show_default="4096")] = None,
    max_size: Annotated[str | None, Option(
        "--max-size", metavar="SIZE", help="Larger files are skipped.", show_default="32MB")] = None,
    seed: Annotated[int | None, Option(min=0, help="Of everything drawn.", show_default="0")] = None,
    fresh: Annotated[bool, Option("--fresh", help="Measure anew what was measured already.")] = False,
    out: Annotated[Path | None, Option(
        "--out", "-o", rich_help_panel=_REPORT, metavar="DIR", help="Folder of the report and of what was measured.",
        show_default="poc/ and the folder's name")] = None,
    lang: Annotated[Literal["en", "ja"] | None, Option(
        "--lang", rich_help_panel=_REPORT, help="Its language.", show_default="en")] = None,
    redact: Annotated[bool, Option(
        "--redact", rich_help_panel=_REPORT, help="Lengths and hashes instead of the documents' text.")] = False,
    title: Annotated[str | None, Option("--title", rich_help_panel=_REPORT, help="Its title.")] = None,
    model: ModelOption = None,
    engine: PlannedEngineOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Does it cut our memory, does quality hold on our texts, which jobs gain, what is saved? One report says it.

    Goes on where an interrupted run stopped. Nothing leaves this machine.
    """
    plan = _plan(what).changed(
        questions=questions, skip_bad_rows=skip_bad_rows or None, policies=policy or None,
        budget_minutes=budget_minutes, max_tokens_document=max_tokens,
        max_file_bytes=nbytes(max_size) if max_size else None, seed=seed, out=out, lang=lang, redact=redact or None,
        title=title, model=model, engine=engine, threads=threads,
    )
    models = Models(plan.model, engine=plan.engine, threads=plan.threads)
    with models:
        with merging_bar() as merging:
            running = Run(plan, models, fresh=fresh, merging=merging)
        if running.done:
            note(f"{running.done} of {len(running.jobs)} measurements are there already, in {running.folder}.")
        with goes_on(running.folder), View(stderr(), quiet=as_json) as view:
            running.measure(view)
            report = running.report()
    _tell(report, running, as_json)


@app.command("init")
def init(
    path: Annotated[Path, Argument(metavar="PLAN.yaml", help="The plan to write.")] = Path("poc.yaml"),
    yes: Annotated[bool, Option("--yes", "-y", help="Ask nothing, write the defaults.")] = False,
    force: Annotated[bool, Option("--force", help="Write over a plan that is there.")] = False,
) -> None:
    """Ask a few questions, explain each, and write the plan that `anchorkv poc PLAN.yaml` runs."""
    if not is_plan(path):
        raise ConfigError(f"A plan is a YAML file, but {path} is none by its name; call it {path.stem or 'poc'}.yaml.")
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already; name another plan, or write over it with --force.")
    if not yes and not interactive():
        note("Nobody can be asked here, so the plan has the defaults; edit it, or run this in a terminal.")
        yes = True
    (Plan() if yes else ask_for_plan(_ask, lambda text: stderr().print(text, style="red", markup=False))).save(path)
    stdout().print(f"The plan is in {path}; run it with: anchorkv poc {path}", markup=False, soft_wrap=True)


@app.command("compare")
def compare(
    a: Annotated[Path, Argument(metavar="A", help="report.json of one run, or its folder.")],
    b: Annotated[Path, Argument(metavar="B", help="The other's.")],
    as_json: JsonOption = False,
) -> None:
    """Two runs side by side: before and after training, two models, two policies. A * marks a clear difference."""
    found = compared(read_report(a), read_report(b))
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    for name, run in (("A", found.a), ("B", found.b)):
        model = " ".join(str(run[key]) for key in ("model", "weights") if run[key])
        adapter = f", adapter {run['adapter']}" if run["adapter"] else ""
        text = f"{name}: {run['title']}, {model}{adapter}, {', '.join(run['policies'])}, {run['created']}"
        stdout().print(text, markup=False, soft_wrap=True)
    for area in found.areas:
        stdout().print(_compared(area, found))
    for text in found.notes:
        note(text)


# --- running -------------------------------------------------------------------------------------------------------


def _plan(what: Path | None) -> Plan:
    if what is None:
        return Plan()
    if is_plan(what) and not what.expanduser().is_dir():
        return Plan.load(what.expanduser())
    return Plan(folder=what)


def _tell(report: PocReport, run: Run, as_json: bool) -> None:
    """The table, what was left out, and last where the report is."""
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        stdout().print(final(report))
    for skipped in report.skipped[:_TOLD]:
        note(f"Skipped: {skipped.path} {skipped.reason}.")
    if len(report.skipped) > _TOLD:
        note(f"{len(report.skipped) - _TOLD} more were skipped; the report lists all.")
    for remark in report.left_out:
        note(remark.text)
    if report.redacted:
        note(f"The report has no text of the documents; the records in {run.folder} do, so pass on the report alone.")
    console = stderr() if as_json else stdout()
    console.print(f"The report is in {run.folder / PAGE}", markup=False, soft_wrap=True)


def _ask(explanation: str, question: str, default: str) -> str:
    stdout().print(f"\n{explanation}", style="dim", markup=False)
    return str(typer.prompt(question, default=default, show_default=bool(default)))


# --- comparing -----------------------------------------------------------------------------------------------------


def _compared(area: AreaComparison, found: Comparison) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title=area.name or "all areas", title_justify="left"
    )
    for heading in ("", "A", "B", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("verdict", *(VERDICTS[kind][0] if kind else "–" for kind in area.verdicts), "")
    table.add_row("with", *(way or "–" for way in area.ways), "")
    for row in area.rows:
        table.add_row(row.figure, _shown(row, row.a), _shown(row, row.b), _difference(row))
    return table


def _shown(row: Row, figure: Figure) -> str:
    return "–" if figure.value is None else _number(row, figure.value)


def _number(row: Row, value: float) -> str:
    forms = {"times": f"{value:.2f}×", "share": f"{value:.0%}", "cells": count(value), "number": f"{value:.2f}"}
    return forms[row.show]


def _difference(row: Row) -> str:
    if row.difference is None:
        return "–"
    value = f"{100 * row.difference:+.0f} points" if row.show == "share" else f"{row.difference:+,.2f}"
    return f"{value} *" if row.clear else value
