"""anchorkv beside what a user would pick instead: the same base model, the same texts, the same budget of KV bytes.

    python benchmarks/peers/run.py --data ../shared/data                      # all of it: hours on two cores
    python benchmarks/peers/run.py --data ../shared/data --reductions 10 20 --tasks continuation

Peers run from their own code (methods.py) in an environment of their own, which the first run builds; anchorkv and
what needs llama.cpp alone run here (ours.py). What is measured is kept in --work, so a stopped run goes on, and more
cases or reductions extend an earlier one. Writes results/peers.json and results/peers.png; of a task that is not among
--tasks, the rows that are there stay.

- continuation: books and articles; the context is compressed, and what follows it is predicted. Score: perplexity.
- reading: SQuAD questions, the passage among others; the context is read before the question is known. Score: F1.
- needle: a made-up fact in a book. Score: share found.

For the last two also the loss of the right answer, mean -log p a token: it tells more where few answers are right.

Differences are to the full cache of the same engine and the same weights, paired case by case; `behind` is to anchorkv
with as many cells. Torch peers run in fp32 on PyTorch, anchorkv on llama.cpp with Q8_0 weights: compare their speeds
through `*_ratio`, to the full cache of the same engine. Torch peers compress when the context has been read, so at that
moment they hold all of it. "kv_bytes" counts f16 cells for all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import platformdirs

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cases as case_files
import ours
from cases import CONTINUATION, NEEDLE, READING, Case
from environment import PeerFailed, environment
from methods import METHODS as PEERS
from picture import draw
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anchorkv.evaluate.environment import environment as machine
from anchorkv.evaluate.run import Store
from anchorkv.evaluate.statistics import bootstrap, difference, mean, verdict
from anchorkv.models import builtin

ROOT = Path(__file__).resolve().parents[2]
TORCH_FULL, LLAMA_FULL, ADAPTER_FULL = "full (torch)", "full (llama.cpp)", "full + adapter"
TASKS = (CONTINUATION, READING, NEEDLE)
LOSS = {CONTINUATION: "score", READING: "answer_loss", NEEDLE: "answer_loss"}
OURS = {CONTINUATION: "anchorkv", READING: "anchorkv, recall auto", NEEDLE: "anchorkv, recall auto"}
"""What a method is compared to, by task: anchorkv as it would be used for it."""
console = Console(stderr=True)
Record = dict[str, Any]


class Worker:
    """worker.py in the peers' environment: a job in, its result out."""

    def __init__(self, python: Path, threads: int | None) -> None:
        command = [str(python), str(Path(__file__).with_name("worker.py")), str(builtin())]
        command += ["--threads", str(threads)] if threads else []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, job: dict[str, Any]) -> Record:
        """Raises PeerFailed when the worker has died."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise PeerFailed("The peers' process has no pipes.")
        try:
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerFailed(f"The peers' process ended (exit code {self._process.wait()}) at {job['method']}.")
        found: Record = json.loads(line)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def way(method: str, reduction: float) -> str:
    """What a method at a reduction is called in the store."""
    return f"{method} {reduction:g}"


def wanted(
    reductions: Sequence[float], tasks: Sequence[str], names: Sequence[str] = ()
) -> Iterator[tuple[str, float, str]]:
    """(method, reduction, task) of everything to be measured; 0 for a method whose reduction is its own.

    names: the methods; all of them where empty."""
    every = _every(reductions, tasks)
    return (job for job in every if job[0] in names) if names else every


def _every(reductions: Sequence[float], tasks: Sequence[str]) -> Iterator[tuple[str, float, str]]:
    for task in tasks:
        for name, method in ours.METHODS.items():
            if not method.tasks or task in method.tasks:
                yield from ((name, reduction, task) for reduction in ([0.0] if method.fixed else reductions))
        for name in PEERS:
            own = name == "full"
            yield from ((TORCH_FULL if own else name, r, task) for r in ([0.0] if own else reductions))


def job_of(case: Case, method: str, reduction: float, stop: Sequence[int]) -> dict[str, Any]:
    name = "full" if method == TORCH_FULL else method
    job = {"id": case.id, "method": name, "reduction": reduction or 1, "context": case.context}
    if case.task == CONTINUATION:
        return {**job, "kind": "continuation", "continuation": case.continuation}
    return {
        **job, "kind": "generate", "question": list(case.asked), "gold": list(case.gold),
        "max_tokens": case.max_tokens, "stop": list(stop),
    }


def scored(case: Case, found: Record, engines: ours.Engines) -> Record:
    """The result and its score; whatever a method said stays in the record."""
    if "error" in found:
        return {"error": found["error"]}
    if case.task == CONTINUATION:
        return {**{k: v for k, v in found.items() if k != "losses"}, "score": float(np.mean(found["losses"]))}
    answer = found["answer"] if "answer" in found else engines.get().tokenizer.decode(found["tokens"])
    return {**{k: v for k, v in found.items() if k != "tokens"}, "answer": answer, "score": case.score(answer.strip())}


def measure(
    store: Store, all_cases: Sequence[Case], jobs: Sequence[tuple[str, float, str]], engines: ours.Engines,
    python: Path | None, threads: int | None,
) -> None:
    """Fill `store`. python: of the peers' environment, None where it could not be built."""
    work = [
        (case, method, reduction) for case in all_cases for method, reduction, task in jobs
        if task == case.task and (task, way(method, reduction), case.id) not in store
    ]
    stop = sorted(engines.get().tokenizer.eos_ids)
    worker: Worker | None = None
    try:
        # Each engine on its own, so that neither waits for the other's spinning threads.
        for case, method, reduction in track(
            sorted(work, key=lambda job: job[1] not in ours.METHODS), "measuring", console=console, transient=True
        ):
            if method in ours.METHODS:
                found = ours.METHODS[method].run(engines, case, reduction)
            elif python is None:
                continue
            else:
                if worker is None:
                    worker = Worker(python, threads)
                    worker.run(job_of(case, TORCH_FULL, 0, stop))  # the first job of all is slow
                found = worker.run(job_of(case, method, reduction, stop))
            record = {"task": case.task, "way": way(method, reduction), "item": case.id, "cells": len(case.context)}
            store.add({**record, **scored(case, found, engines)})
    finally:
        if worker:
            worker.__exit__()


def yardstick(method: str) -> str:
    """The full cache of the same engine and the same weights."""
    if method not in ours.METHODS:
        return TORCH_FULL
    return ADAPTER_FULL if method.startswith("anchorkv") and "no adapter" not in method else LLAMA_FULL


def rows(store: Store, jobs: Sequence[tuple[str, float, str]], all_cases: Sequence[Case], failed: str) -> list[Record]:
    """A row a method, reduction and task, over the cases that it was measured on."""
    known = {case.id for case in all_cases}
    by_way: dict[tuple[str, str], dict[str, Record]] = {}
    for task in TASKS:
        for record in store.of(task):
            if record["item"] in known:
                by_way.setdefault((task, record["way"]), {})[record["item"]] = record
    out = []
    for method, reduction, task in jobs:
        records = by_way.get((task, way(method, reduction)), {})
        row: Record = {"method": method, "task": task, "requested": reduction or None, "note": _note(method)}
        good = {item: record for item, record in records.items() if "error" not in record}
        if not good:
            errors = [record["error"] for record in records.values()]
            out.append({**row, "error": errors[0] if errors else failed or "not measured"})
            continue
        full, own = (by_way.get((task, name), {}) for name in (way(yardstick(method), 0), way(OURS[task], reduction)))
        figures = {**_figures(task, good, full), **({} if method == OURS[task] else _behind(task, good, own))}
        out.append({**row, **figures, "failed": len(records) - len(good)})
    return out


def _note(method: str) -> str:
    if method in ours.METHODS:
        return ours.METHODS[method].note
    return " ".join((PEERS["full" if method == TORCH_FULL else method].__doc__ or "").split())


def _paired(name: str, *sides: dict[str, Record]) -> list[list[float]]:
    """A field of each side, over the cases that all of them could do."""
    shared = [item for item in sides[0] if all("error" not in side.get(item, {"error": ""}) for side in sides)]
    return [[side[item][name] for item in shared] for side in sides]


def _behind(task: str, theirs: dict[str, Record], own: dict[str, Record]) -> Record:
    """How much more loss a method has than anchorkv (nats a token), whatever the weights; {} where neither was run."""
    losses, yard = _paired(LOSS[task], theirs, own)
    if not losses:
        return {}
    behind = difference(losses, yard)
    # More is better for a verdict, and it is told of the method.
    told = verdict(difference(yard, losses))
    return {"behind": behind.value, "behind_stderr": behind.stderr, "behind_verdict": told}


def _figures(task: str, mine: dict[str, Record], full: dict[str, Record]) -> Record:
    shared = [item for item in mine if item in full and "error" not in full[item]]
    ours_, theirs = _paired("score", mine, full)
    values = [record["score"] for record in mine.values()]
    score, gain = mean(values), difference(ours_, theirs)
    row: Record = {"n": score.n}
    if task == CONTINUATION:  # of losses, less is better; told as perplexities
        error = bootstrap(lambda drawn: math.exp(np.mean([values[i] for i in drawn])), len(values))
        ratio = math.exp(gain.value) if shared else math.nan
        row |= {"score": math.exp(score.value), "stderr": error, "ratio": ratio, "ratio_stderr": ratio * gain.stderr}
        gain = difference(theirs, ours_)
    else:
        row |= {"score": score.value, "stderr": score.stderr}
    row |= {"difference": gain.value, "difference_stderr": gain.stderr, "verdict": verdict(gain)}
    if task != CONTINUATION:
        losses, yard = _paired("answer_loss", mine, full)
        loss, gain = mean(losses), difference(yard, losses)
        row |= {"answer_loss": loss.value, "answer_loss_stderr": loss.stderr, "loss_difference": gain.value}
        row |= {"loss_difference_stderr": gain.stderr, "loss_verdict": verdict(gain)}
    cells = sum(record["cells"] for record in mine.values())
    kept = sum(record["kept_cells"] for record in mine.values())
    row |= {"reduction": cells / kept, "kv_bytes": float(np.mean([record["kv_bytes"] for record in mine.values()]))}
    if task == CONTINUATION:
        row["end_cells"] = float(np.mean([record["end_cells"] for record in mine.values()]))
    # What follows a continuation's context is read at once by some and not by others: that is no decoding.
    for name, amount in (("prefill", "cells"), *([("decode", "decode_tokens")] if task != CONTINUATION else [])):
        row[f"{name}_tok_s"] = _speed([mine[item] for item in shared], name, amount)
        yard = _speed([full[item] for item in shared], name, amount)
        row[f"{name}_ratio"] = row[f"{name}_tok_s"] / yard if yard else math.nan
    peaks = [record["peak_bytes"] for record in mine.values() if "peak_bytes" in record]
    row["peak_bytes"] = float(np.mean(peaks)) if peaks else None
    return row


def _speed(records: Sequence[Record], name: str, amount: str) -> float:
    """Median tokens/s."""
    speeds = [r[amount] / r[f"{name}_seconds"] for r in records if r.get(f"{name}_seconds")]
    return float(np.median(speeds)) if speeds else math.nan


def show(found: Sequence[Record], tasks: Sequence[str]) -> None:
    for task in tasks:
        table = Table(title=f"{task} ({'perplexity' if task == CONTINUATION else 'score'})")
        scores = ("score", "±", "to full", "", "answer loss", "")
        for heading in ("method", "full / kept", "KV bytes", *scores, "prefill", "decode"):
            table.add_column(heading, justify="left" if heading in ("method", "") else "right")
        for row in (row for row in found if row["task"] == task):
            if "error" in row:
                table.add_row(row["method"], f"{row['requested'] or ''}", row["error"], style="yellow")
                continue
            table.add_row(
                row["method"], f"{row['reduction']:.1f}×", f"{row['kv_bytes'] / 2**20:.1f} MiB", f"{row['score']:.3f}",
                f"{row['stderr']:.3f}", f"{row.get('ratio', row['difference']):.3f}", row["verdict"],
                f"{row['answer_loss']:.2f}" if "answer_loss" in row else "–", row.get("loss_verdict", ""),
                f"{row['prefill_ratio']:.2f}×", f"{row['decode_ratio']:.2f}×" if "decode_ratio" in row else "–",
                style="bold" if row["method"].startswith("anchorkv") else None,
            )
        Console().print(table)


def given() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--reductions", type=float, nargs="+", default=[4, 10, 20, 50])
    parser.add_argument("--texts", type=int, default=4, help="continuations of books, and as many of articles")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a context")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--passages", type=int, default=11, help="in one text: about 170 tokens each")
    parser.add_argument("--needles", type=int, default=10)
    parser.add_argument("--methods", nargs="+", choices=[TORCH_FULL, *ours.METHODS, *(set(PEERS) - {"full"})],
                        default=[], metavar="NAME", help="only these; all without it")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--measured", action="store_true", help="measure nothing: show what --work holds of this")
    parser.add_argument("--no-peers", action="store_true", help="leave out what needs an environment of its own")
    caches = Path(platformdirs.user_cache_path("anchorkv"))
    parser.add_argument("--environment", type=Path, default=caches / "peers", help="of the peers; built at first use")
    parser.add_argument("--work", type=Path, default=caches / "peers-run", help="what has been measured")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "peers.json")
    return parser.parse_args()


OF_TASK = {CONTINUATION: ("texts", "length"), READING: ("questions", "passages"), NEEDLE: ("needles", "length")}
"""The options that a task's cases depend on."""


def said(options: argparse.Namespace) -> dict[str, Any]:
    """What the command said that these results depend on."""
    names = dict.fromkeys(name for task in options.tasks for name in OF_TASK[task])
    return {name: getattr(options, name) for name in ("tasks", "reductions", *names)}


def earlier(path: Path, tasks: Sequence[str]) -> dict[str, list[Record]]:
    """The rows at `path` of other tasks than these, and the runs that they are from."""
    if not path.exists():
        return {"rows": [], "runs": []}
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in found["rows"] if row["task"] not in tasks]
    others = {row["task"] for row in rows}
    return {"rows": rows, "runs": [run for run in found["runs"] if others.intersection(run["settings"]["tasks"])]}


def main() -> None:
    options = given()
    jobs = list(wanted(options.reductions, options.tasks, options.methods))
    python, failed = None, ""
    if not (options.no_peers or options.measured):
        try:
            python = environment(options.environment, lambda line: console.print(line, style="dim", highlight=False))
        except PeerFailed as error:  # said in the table, in every row that it concerns
            failed = " ".join(str(error).split())
            console.print(failed, style="red", markup=False)
    engines = ours.Engines(options.threads)
    try:
        base = engines.get()
        all_cases: list[Case] = []
        if CONTINUATION in options.tasks:
            all_cases += case_files.continuations(base, options.data, options.texts, options.length, 512)
        if READING in options.tasks:
            all_cases += case_files.readings(base, options.data, options.questions, options.passages)
        if NEEDLE in options.tasks:
            all_cases += case_files.needles(base, options.data, options.needles, options.length)
        # A case's id says its length and passages; other weights make another run.
        prints = [engines.get(adapter).info.fingerprint for adapter in (False, True)]
        store = Store(options.work, {"fingerprints": prints})
        if options.measured:
            known = {(record["task"], record["way"]) for task in TASKS for record in store.of(task)}
            jobs = [job for job in jobs if (job[2], way(job[0], job[1])) in known]
        else:
            measure(store, all_cases, jobs, engines, python, options.threads)
    finally:
        engines.close()
    found = rows(store, jobs, all_cases, failed)
    show(found, options.tasks)
    kept = earlier(options.out, options.tasks)
    kept["rows"] += found
    kept["runs"].append({"settings": said(options), "environment": machine()})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    draw(kept["rows"], options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
