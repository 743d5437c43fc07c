"""One run of an evaluation: every task measures every way on every item, and what is measured is never measured again.

    task.items() -> for each item, for each way: task.measure() -> a record in the store -> task.rows(records)

Items are chosen before anything is measured, all ways read the same ones, and they take turns item by item, so that a
noisy machine slows all of them alike.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from anchorkv.config import AnchorConfig
from anchorkv.errors import AnchorKVError, ConfigError, SavedStateError
from anchorkv.evaluate.ways import Way
from anchorkv.models import EngineName, Model, load

Record = dict[str, Any]
"""What one way gave on one item: "task", "way", "item", "seconds", and the task's own JSON-able fields."""
Row = dict[str, Any]
"""A line of results: "task", "policy" (the way's name), and figures, each `x` with an `x_stderr` where it has one."""
Progress = Callable[[int, int, str], None]
"""Called with measurements done, measurements in all, and what is being measured."""

RECORDS, SETTINGS = "records.jsonl", "settings.json"


@dataclass(frozen=True)
class Item:
    """One thing to measure, the same for all ways. `id` is unique in its task and never depends on results."""

    id: str
    fields: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """One kind of measurement. A task is a small class in a file of its own under `evaluate/tasks/`."""

    name: str

    def settings(self) -> dict[str, Any]:
        """What its items and their measurement follow from (JSON-able): a run goes on only with the same."""

    def items(self) -> Sequence[Item]:
        """Raises DataError when the data are missing or bad."""

    def ways(self, ways: Sequence[Way]) -> list[Way]:
        """The ways to measure, where the task needs others besides those asked for (no memory below a policy)."""

    def measure(self, models: Models, way: Way, item: Item) -> Record:
        """The task's own fields of a record."""

    def rows(self, records: Sequence[Record], ways: Sequence[Way]) -> list[Row]:
        """Results of the ways asked for, from all records of this task."""


class Models:
    """The model under evaluation, with and without its adapter, each loaded when it is first asked for."""

    def __init__(self, name: str | None = None, *, engine: EngineName = "auto", threads: int | None = None) -> None:
        """name: hub id, folder or GGUF file; None is the built-in model."""
        self.name, self.engine, self.threads = name, engine, threads
        self._loaded: dict[bool, Model] = {}

    def of(self, way: Way) -> Model:
        """The model that `way` runs on; its policy is the way's. Raises ModelError when it cannot be loaded."""
        # Only the built-in model has an adapter that can be left out.
        adapter = way.adapter or self.name is not None
        if adapter not in self._loaded:
            self._loaded[adapter] = load(self.name, engine=self.engine, threads=self.threads, adapter=adapter)
        model = self._loaded[adapter]
        return Model(model.engine, way.policy, model.adapter)

    def own(self, progress: Callable[[int, int], None] | None = None) -> AnchorConfig:
        """The model's own policy: what "default" means. Raises ModelError when it cannot be loaded.

        progress: called with (bytes written, bytes in all) while an adapter is merged into the built-in model, once.
        """
        if True not in self._loaded:
            self._loaded[True] = load(self.name, engine=self.engine, threads=self.threads, progress=progress)
        return self._loaded[True].policy

    def close(self) -> None:
        for model in self._loaded.values():
            model.close()
        self._loaded.clear()

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Store:
    """The records of one run, a line each in its folder, so that an interrupted run goes on where it was."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """settings: what defines the run. Raises ConfigError when `folder` holds another run, SavedStateError when it
        cannot be written or read."""
        self.folder, self.settings = folder, settings
        self._records: dict[tuple[str, str, str], Record] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check(folder / SETTINGS)
            self._read(folder / RECORDS)
        except OSError as error:
            raise SavedStateError(f"{folder} cannot be used ({error.strerror}); choose another --out.") from None

    def _check(self, path: Path) -> None:
        text = json.dumps(self.settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        if not path.is_file():
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{self.folder} holds a run of other settings or of another model; choose another --out, or --fresh to "
                "measure anew."
            )

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        whole = b""
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
                self._records[record["task"], record["way"], record["item"]] = record
            except (ValueError, TypeError, KeyError):
                break  # a killed run leaves half a line at the end
            whole += line
        if len(whole) != path.stat().st_size or not whole.endswith(b"\n"):
            path.write_bytes(whole if whole.endswith(b"\n") or not whole else whole + b"\n")

    def __contains__(self, key: tuple[str, str, str]) -> bool:
        return key in self._records

    def add(self, record: Record) -> None:
        """Raises SavedStateError when the disk is full; what was there before stays."""
        try:
            with (self.folder / RECORDS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise SavedStateError(f"{self.folder / RECORDS} cannot be written ({error.strerror}).") from None
        self._records[record["task"], record["way"], record["item"]] = record

    def of(self, task: str) -> list[Record]:
        return [record for (name, _, _), record in self._records.items() if name == task]

    @staticmethod
    def clear(folder: Path) -> None:
        """Forget an earlier run in `folder`, and nothing else that lies there."""
        for name in (RECORDS, SETTINGS):
            (folder / name).unlink(missing_ok=True)


def run(
    tasks: Sequence[Task], ways: Sequence[Way], models: Models, store: Store, progress: Progress | None = None
) -> list[Row]:
    """Measure what the store does not hold yet, and sum everything up.

    A measurement that fails with an AnchorKVError (too long for the cells there are, say) becomes a record with the
    field "error", and the run goes on: what failed is in the results, never left out in silence.
    """
    plans = [(task, task.ways(ways), task.items()) for task in tasks]
    total = sum(len(mine) * len(items) for _, mine, items in plans)
    rows: list[Row] = []
    done = 0
    for task, mine, items in plans:
        for way, item in _turns(mine, items):
            if (task.name, way.name, item.id) not in store:
                if progress:
                    progress(done, total, f"{task.name}: {way.name}, {item.id}")
                store.add(_measured(task, models, way, item))
            done += 1
        wanted = {item.id for item in items}
        records = [record for record in store.of(task.name) if record["item"] in wanted]
        rows += [{"task": task.name, **row} for row in task.rows(records, ways)]
    if progress:
        progress(done, total, "")
    return rows


def _turns(ways: Sequence[Way], items: Sequence[Item]) -> Iterator[tuple[Way, Item]]:
    return ((way, item) for item in items for way in ways)


def _measured(task: Task, models: Models, way: Way, item: Item) -> Record:
    started = time.perf_counter()
    try:
        found = task.measure(models, way, item)
    except AnchorKVError as error:
        found = {"error": str(error)}
    seconds = round(time.perf_counter() - started, 3)
    return {"task": task.name, "way": way.name, "item": item.id, "seconds": seconds, **found}


def good(records: Sequence[Record], way: Way) -> dict[str, Record]:
    """The records of `way` that are no failures, by item."""
    return {r["item"]: r for r in records if r["way"] == way.name and "error" not in r}


def failures(records: Sequence[Record], way: Way) -> list[str]:
    """What went wrong for `way`, a sentence each."""
    return [r["error"] for r in records if r["way"] == way.name and "error" in r]


def settings_of(tasks: Sequence[Task], ways: Sequence[Way], models: Models) -> dict[str, Any]:
    """What defines a run: tasks, policies, and the weights themselves by their fingerprints."""
    return {
        "tasks": {task.name: task.settings() for task in tasks},
        "ways": {way.name: way.policy.model_dump(mode="json") for way in ways},
        "fingerprints": sorted({models.of(way).engine.info.fingerprint for way in ways}),
    }


def seed_of(*parts: object) -> int:
    """A seed that follows from `parts` alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
