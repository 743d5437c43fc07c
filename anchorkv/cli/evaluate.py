"""`anchorkv eval`: prove it. Perplexity, questions, needles, speed: each policy beside the full cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from anchorkv.cli.options import JsonOption, ModelOption, PlannedEngineOption, ThreadsOption
from anchorkv.cli.screen import Bar, goes_on, merging_bar, note, print_json, stdout, work_bar
from anchorkv.errors import AnchorKVError, SavedStateError
from anchorkv.evaluate.environment import environment, models_of
from anchorkv.evaluate.plan import TASKS, Plan
from anchorkv.evaluate.report import RESULTS, Job, live, results, save, table
from anchorkv.evaluate.run import Models, Store, Task, run, settings_of
from anchorkv.evaluate.ways import Way


def evaluate(
    what: Annotated[list[str], Argument(
        metavar="TASK…|PLAN.yaml", show_default=False,
        help=f"{', '.join(TASKS)}, several of them, with options as in perplexity:length=2048,first=256; or a plan.")],
    policy: Annotated[list[str] | None, Option(
        "--policy", "-p", metavar="NAME[:field=value,…]", show_default=False,
        help="What to set beside the full cache: preset, window, base, base/PRESET, JSON file; repeatable.")] = None,
    data: Annotated[Path | None, Option("--data", "-d", metavar="DIR", help="Folder with the tasks' data.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Items of each kind; a larger one goes on from a smaller.")] = None,
    out: Annotated[Path | None, Option(
        "--out", "-o", metavar="DIR", help="For records, results.json and pictures.",
        show_default="evaluation/, a folder for every set of options")] = None,
    fresh: Annotated[bool, Option("--fresh", help="Measure anew what was measured already.")] = False,
    skip_bad_rows: Annotated[bool, Option("--skip-bad-rows", help="Pass over bad rows of data; count them.")] = False,
    seed: Annotated[int | None, Option(min=0, help="Of everything drawn.", show_default="0")] = None,
    model: ModelOption = None,
    engine: PlannedEngineOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure quality, memory and speed, every policy on the same items. Goes on where an interrupted run stopped."""
    plan = Plan.of(what).changed(
        policies=tuple(policy) if policy else None, data=data and data.expanduser(), limit=limit, seed=seed,
        out=out and out.expanduser(), skip_bad_rows=skip_bad_rows or None, model=model, engine=engine, threads=threads,
    )
    tasks = plan.make()
    for task in tasks:
        plan.ways(task)  # an unknown policy should be told before a model is loaded
        task.items()  # and missing data
    models = Models(plan.model, engine=plan.engine or "auto", threads=plan.threads)
    with models:
        with merging_bar() as progress:
            own = models.own(progress)
        work = [(task, plan.ways(task, own)) for task in tasks]
        settings = settings_of(tasks, _union(work), models)
        folder = plan.out or Path("evaluation") / _name(settings)
        if fresh:
            _forget(folder)
        notes = list(dict.fromkeys(text for task, ways in work for text in _notes(task, models, ways)))
        for text in notes:
            note(text)
        with goes_on(folder):
            jobs = _measure(work, models, Store(folder, settings), quiet=as_json)
        found = results(
            jobs, settings, **environment(), models=models_of(models, _union(work)), threads=plan.threads, notes=notes,
            pictures=_pictures(jobs, models, folder),
        )
    path = save(found, folder)
    if as_json:
        print_json(found)
    else:
        for job in jobs:
            stdout().print(table(job, stdout().width))
    _tell(jobs, path)


def _measure(work: Sequence[tuple[Task, list[Way]]], models: Models, store: Store, quiet: bool) -> list[Job]:
    counts = [len(task.ways(ways)) * len(task.items()) for task, ways in work]
    jobs = []
    with work_bar("Evaluating", "measurements", quiet) as bar:
        for number, (task, ways) in enumerate(work):
            progress = _Progress(bar, sum(counts[:number]), sum(counts), task, ways, store)
            rows = run([task], ways, models, store, progress)
            wanted = {item.id for item in task.items()}
            jobs.append(Job(task, ways, [r for r in store.of(task.name) if r["item"] in wanted], rows))
    return jobs


class _Progress:
    """What `run` calls: the bar over all tasks, and under it what the task can say so far."""

    def __init__(self, bar: Bar, before: int, total: int, task: Task, ways: Sequence[Way], store: Store) -> None:
        self.bar, self.before, self.total = bar, before, total
        self.task, self.ways, self.store = task, ways, store

    def __call__(self, done: int, _: int, what: str) -> None:
        self.bar(self.before + done, self.total)
        self.bar.say(what or self.task.name, live(self.task, self.store.of(self.task.name), self.ways))


def _forget(folder: Path) -> None:
    """Raises SavedStateError when what an earlier run left cannot be removed."""
    try:
        if folder.exists():
            Store.clear(folder)
            (folder / RESULTS).unlink(missing_ok=True)
    except OSError as error:
        raise SavedStateError(f"{folder} cannot be cleared ({error.strerror}); choose another --out.") from None


def _union(work: Sequence[tuple[Task, list[Way]]]) -> list[Way]:
    return list({way.name: way for _, ways in work for way in ways}.values())


def _name(settings: dict[str, Any]) -> str:
    """A folder name that the same command line finds again, and no other one."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{'-'.join(settings['tasks'])}-{digest[:8]}"


def _notes(task: Task, models: Models, ways: Sequence[Way]) -> list[str]:
    """What the task wants to say before it measures, by its method `notes`."""
    notes = getattr(task, "notes", None)
    return list(notes(models, ways)) if notes else []


def _pictures(jobs: Sequence[Job], models: Models, folder: Path) -> list[str]:
    """Drawn into `folder`; their names."""
    if importlib.util.find_spec("matplotlib") is None:
        note("Pictures need matplotlib, which is not installed: pip install 'anchorkv[eval]'.")
        return []
    from anchorkv.evaluate.pictures import draw

    rows = [row for job in jobs for row in job.rows]
    info = models.of(jobs[0].ways[0]).engine.info
    try:
        return draw(rows, folder, f"{info.name} {info.weights}".strip())
    except OSError as error:
        note(f"Pictures cannot be written to {folder} ({error.strerror}).")
        return []


def _tell(jobs: Sequence[Job], path: Path) -> None:
    """Where everything is, what failed, what was passed over. Raises AnchorKVError where nothing could be measured."""
    for job in jobs:
        if job.bad_rows:
            note(f"{job.task.name}: {len(job.bad_rows)} bad rows were passed over, the first {job.bad_rows[0]}.")
        for way in dict.fromkeys(failure["way"] for failure in job.failures):
            mine = [failure["error"] for failure in job.failures if failure["way"] == way]
            note(f"{job.task.name}: {len(mine)} measurements of {way} failed, the first so: {mine[0]}")
    note(f"Results are in {path}.")
    failures = [failure for job in jobs for failure in job.failures]
    if failures and len(failures) == sum(len(job.records) for job in jobs):
        raise AnchorKVError(f"Nothing could be measured: {failures[0]['error']}")
