"""A proof of concept from a plan to its report: documents -> questions -> records -> report.json, report.html, rollout.

    run = Run(plan, models)    # everything that can be wrong is told here
    run.measure(progress)      # what was measured is kept, and never measured again
    run.report()               # writes the files; PocReport

Within a time budget every area has its first document on every way before any area has its second; what did not fit is
named in the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, groupby
from pathlib import Path

from anchorkv import samples
from anchorkv.errors import ConfigError
from anchorkv.evaluate.metrics import contains
from anchorkv.evaluate.run import Models, Record, Store
from anchorkv.optional import library
from anchorkv.poc import files, measure, speed, summary
from anchorkv.poc.cloze import cloze
from anchorkv.poc.documents import Source, collect, cut
from anchorkv.poc.measure import Job
from anchorkv.poc.plan import Plan
from anchorkv.poc.questions import KINDS, BadRow, Question, own_questions
from anchorkv.poc.results import PocReport, Remark, Skipped

HOME = Path("poc")
"""Where runs without a folder of their own have theirs."""
TITLES = {"en": "Sample documents", "ja": "サンプル文書"}
NAMED = 3
"""Documents that a sentence names."""
TASKS = ("document", "speed", "ground")


class Run:
    """One proof of concept. `folder` holds all that it writes."""

    def __init__(
        self, plan: Plan, models: Models, *, fresh: bool = False,
        merging: Callable[[int, int], None] | None = None,
    ) -> None:
        """models: of the plan's model; the caller closes them. fresh: forget what an earlier run measured. merging: as
        `Models.own` calls it.

        Raises ConfigError, DocumentError, DataError, ModelError or SavedStateError, one sentence each.
        """
        self.started = time.perf_counter()
        library("yaml", "rollout plans")
        plan.resolved()  # an unknown policy should be told before a model is loaded
        asked = _questions_file(plan)
        sources, self.skipped = collect(
            plan.folder or samples.folder(), max_bytes=plan.max_file_bytes,
            leave=[path for path in (asked, plan.out, HOME) if path is not None],
        )
        self.plan = plan if plan.title else plan.changed(title=_title(plan))
        self.left_out: list[Remark] = []
        own = self._own_questions(asked, sources)
        self.models = models
        self.ways = measure.ways_of(plan.resolved(models.own(merging)))
        engine = models.of(self.ways[0]).engine
        most = max(2, min(engine.info.window - measure.ROOM, plan.max_tokens_document or engine.info.window))
        read = [cut(source, engine.tokenizer, most) for source in sources]
        self.items = measure.items(read, [*self._asked(own, read), *_made(read, own, plan)], plan)
        self.jobs = measure.jobs(self.items, self.ways)
        self._tell_cut(sources, read, most)
        self.store = self._open(fresh)
        self.folder = self.store.folder
        self.before: float = sum(record["seconds"] for record in self.records())
        """Seconds that earlier runs took for what is in the store."""
        self.now: Job | None = None

    # --- before anything is measured -------------------------------------------------------------------------------

    def _own_questions(self, path: Path | None, sources: Sequence[Source]) -> list[Question]:
        if path is None:
            return []
        bad: list[BadRow] = []
        found = own_questions(path, sources, bad=bad if self.plan.skip_bad_rows else None)
        self.skipped += [
            Skipped(path=f"{path.name}:{row.line}", reason=row.reason, key=row.key, values=row.values) for row in bad
        ]
        return found

    def _asked(self, own: Sequence[Question], read: Sequence[Source]) -> list[Question]:
        """The user's questions on what is read of the documents."""
        texts = {source.id: source.text for source in read}
        found = [q for q in own if (q.passage and q.passage in texts[q.document]) or
                 (not q.passage and contains(texts[q.document], q.answers))]
        if len(found) < len(own):
            missing = len(own) - len(found)
            self.left_out.append(Remark(
                text=f"{_of(missing, 'question')} not asked: the answer stands in a part of the document that was not "
                "read.", key="not_asked", values={"n": f"{missing:,}"},
            ))
        return found

    def _tell_cut(self, sources: Sequence[Source], read: Sequence[Source], most: int) -> None:
        shorter = [source.id for source, part in zip(sources, read, strict=True) if part is not source]
        if shorter:
            self.left_out.append(Remark(
                text=f"Only the first {most:,} tokens were read of {_named(shorter)}.", key="cut",
                values={"tokens": f"{most:,}", **_names(shorter)},
            ))

    def _open(self, fresh: bool) -> Store:
        """The store in the plan's folder, or in the first one of its name that holds no other run."""
        settings = {**measure.settings(self.plan, self.items, self.ways, self.models), "seed": self.plan.seed}
        if self.plan.out is not None:
            folder = self.plan.out.expanduser()
            if fresh:
                files.clear(folder)
            return Store(folder, settings)
        place = self.plan.folder.expanduser().resolve().name if self.plan.folder else "samples"
        name = files.slug(place) or "documents"
        for number in count(1):
            folder = HOME / (name if number == 1 else f"{name}-{number}")
            try:
                store = Store(folder, settings)
            except ConfigError:  # of other documents, policies or questions
                continue
            if fresh:
                files.clear(folder)
                store = Store(folder, settings)
            return store
        raise RuntimeError("numbers ended")

    # --- measuring -------------------------------------------------------------------------------------------------

    def measure(self, progress: Callable[[Run], None] | None = None) -> None:
        """Everything that the store does not hold yet, as far as the budget goes. progress: called before each job and
        at the end. Raises SavedStateError when a record cannot be written; those before stay."""
        left: list[Job] = []
        for jobs in _together(self.jobs):
            todo = [job for job in jobs if job.key not in self.store]
            if todo and not self._fits(todo):
                left += todo
                continue
            for job in todo:
                self.now = job
                _tell(progress, self)
                self.store.add(measure.measured(self.models, job, self.plan))
        self.now = None
        self.left_out += self._not_measured(left)
        _tell(progress, self)

    def records(self) -> list[Record]:
        return [record for task in TASKS for record in self.store.of(task)]

    @property
    def done(self) -> int:
        return sum(job.key in self.store for job in self.jobs)

    @property
    def seconds(self) -> float:
        """Of this run and of those that it goes on from."""
        return self.before + time.perf_counter() - self.started

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Whether the budget has the time that these jobs will take. The very first document is always read: without
        it there would be nothing to report."""
        if self.plan.budget_minutes is None or jobs[0].key == self.jobs[0].key:
            return True
        left = 60 * self.plan.budget_minutes - (time.perf_counter() - self.started)
        return sum(map(self._expected, jobs)) <= left

    def _expected(self, job: Job) -> float:
        """Seconds, by what the same kind of job took, by its way where that is known."""
        alike = [record for record in self.store.of(job.task) if "error" not in record]
        same = [record for record in alike if record["way"] == job.way.name] or alike
        if job.task == "speed":
            spent = [float(record["seconds"]) for record in same]
            return max(spent, default=sum(speed.SECONDS.values()))
        if not same:  # a ground is read as a document is, and asked nothing
            same = [{**record, "seconds": record["read_seconds"]} for record in self.store.of("document")
                    if "read_seconds" in record]
        sizes: dict[str, int] = {item.id: len(item.source.text) for item in self.items}
        read = sum(sizes[record["item"]] for record in same)
        seconds: float = sum(record["seconds"] for record in same)
        return seconds / read * sizes[job.item.id] if read else 0.0

    def _not_measured(self, left: Sequence[Job]) -> Iterator[Remark]:
        """A remark for each kind of job that the budget left out."""
        if not left:
            return
        up, minutes = f"The {self.plan.budget_minutes:g} minutes were up", {"minutes": f"{self.plan.budget_minutes:g}"}
        documents = list(dict.fromkeys(job.item.id for job in left if job.task == "document"))
        if documents:
            yield Remark(
                text=f"{up}: {len(documents)} of {len(self.items)} documents were not measured ({_named(documents)}).",
                key="documents_left",
                values={**minutes, "n": f"{len(documents):,}", "all": f"{len(self.items):,}", **_names(documents)},
            )
        areas = list(dict.fromkeys(job.item.source.area for job in left if job.task == "speed"))
        if areas:
            yield Remark(
                text=f"{up}: speed was not measured in {_named(areas)}.", key="speed_left",
                values={**minutes, **_names(areas)},
            )
        grounds = {job.item.id for job in left if job.task == "ground"} - set(documents)
        if grounds:
            yield Remark(
                text=f"{up}: what anchors recover of the context was not measured for "
                f"{_of(len(grounds), 'document', '')}.", key="ground_left",
                values={**minutes, "n": f"{len(grounds):,}"},
            )

    # --- the report ------------------------------------------------------------------------------------------------

    def report(self) -> PocReport:
        """The report, which is written into the folder. Raises DataError when nothing was measured, SavedStateError
        when a file cannot be written."""
        found = summary.report(
            self.plan, self.items, self.records(), self.ways, self.models, skipped=self.skipped,
            left_out=self.left_out, seconds=round(self.seconds, 1),
        )
        files.save(found, self.records(), self.folder)
        return found


def run(plan: Plan, progress: Callable[[Run], None] | None = None, *, fresh: bool = False) -> PocReport:
    """All of it. Raises what Run and its methods do."""
    models = Models(plan.model, engine=plan.engine, threads=plan.threads)
    with models:
        running = Run(plan, models, fresh=fresh)
        running.measure(progress)
        return running.report()


# --- helpers -------------------------------------------------------------------------------------------------------


def _questions_file(plan: Plan) -> Path | None:
    """The plan's, else those that lie in the folder, else the samples' own for the samples."""
    if plan.questions is not None:
        return plan.questions.expanduser()
    if plan.folder is None:
        return samples.questions()
    beside = [plan.folder.expanduser() / f"questions{kind}" for kind in KINDS]
    return next((path for path in beside if path.is_file()), None)


def _made(sources: Sequence[Source], own: Sequence[Question], plan: Plan) -> list[Question]:
    """Cloze questions for the documents that the user asks nothing about."""
    asked = {question.document for question in own}
    return [
        question for source in sources if source.id not in asked
        for question in cloze(source, plan.questions_per_document, plan.seed)
    ]


def _together(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs that say little without each other: all ways of one document."""
    for _, same in groupby(jobs, key=lambda job: (job.task, job.item.id)):
        yield list(same)


def _title(plan: Plan) -> str:
    if plan.folder is None:
        return TITLES[plan.lang]
    return plan.folder.expanduser().resolve().name.replace("_", " ")[:200] or TITLES[plan.lang]


def _tell(progress: Callable[[Run], None] | None, running: Run) -> None:
    if progress:
        progress(running)


def _of(number: int, what: str, verb: str = "were") -> str:
    one = number == 1
    return f"{number} {what}{'' if one else 's'} {('was' if one else verb) if verb else ''}".strip()


def _names(names: Sequence[str]) -> dict[str, str]:
    """For the words of a remark, in any language."""
    return {"names": _some(names, " …")}


def _named(names: Sequence[str]) -> str:
    return _some(names, f" and {len(names) - NAMED} more")


def _some(names: Sequence[str], more: str) -> str:
    """The first of `names`, and `more` where there are more."""
    return ", ".join(names[:NAMED]) + (more if len(names) > NAMED else "")
