"""docs/benchmarks.md out of results/*.json and results/eval/*.json: no figure in it is written by hand.

    python benchmarks/document.py

What fails is a row with its sentence; what is worse than the full cache stands in the same table as what is better.
"""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from anchorkv.errors import AnchorKVError
from anchorkv.evaluate.plan import SHARED, TASKS
from anchorkv.evaluate.report import cell_of, columns_of, verdict_of
from anchorkv.evaluate.ways import FULL

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "benchmarks.md"
COMMAND = "python benchmarks/document.py"
HEAD = f"""# Benchmarks

Written by `{COMMAND}` from `results/`. What was learned: [performance.md](performance.md).

## Where anchors fail

By kind of text and of token, with the worst examples: [where-anchors-fail.md](where-anchors-fail.md)."""
Found = Row = dict[str, Any]
Column = tuple[str, str, Any]
"""Heading, field, format, as tasks of `anchorkv eval` have them."""


# --- one section ---------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], columns: Sequence[Column] = ()) -> str:
    """Markdown. columns: none means all fields of the rows. One that no row has is left out; whether a row is better
    than the full cache, and why it failed, stand in columns of their own."""
    every = columns or [(name, name, _number) for name in dict.fromkeys(name for row in rows for name in row)]
    shown = [column for column in every if any(row.get(column[1]) is not None for row in rows)]
    parts = [
        (heading, any(isinstance(row.get(name), str) for row in rows), [cell_of(row, name, form).plain for row in rows])
        for heading, name, form in shown
    ]
    further = (("than full", lambda row: verdict_of(row).plain), ("failed", lambda row: row.get("error") or ""))
    for heading, of in further:
        if any(map(of, rows)):
            parts.append((heading, True, [of(row) for row in rows]))
    lines = zip(*([heading, "---" if words else "---:", *texts] for heading, words, texts in parts), strict=True)
    # A cell is one line, and a bar in it no border.
    clean = [[" ".join(text.split()).replace("|", "\\|") for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in clean)


def _number(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def machine(found: Found) -> str:
    """What it was measured on and with, in one line."""
    where = found.get("environment", found)
    hardware = where.get("hardware", where)
    versions = where.get("versions") or {**where.get("packages", {}), "anchorkv": where.get("anchorkv")}
    cores = hardware.get("usable_cores") or hardware.get("cores") or "some"
    parts = [f"{hardware.get('processor') or 'an unknown processor'}, {cores} cores"]
    parts += dict.fromkeys(f"{m['name']} {m['weights']} ({m['engine']})" for m in where.get("models", []))
    parts.append(", ".join(f"{name} {number}" for name, number in sorted(versions.items()) if number))
    return f"Measured {where.get('date', 'at an unknown date')} on {'; '.join(parts)}."


def options(settings: Found) -> str:
    """As they stand on the command line. Where data lie is the user's own affair."""
    said = ""
    for name, value in settings.items():
        if name == "out" or value in (None, "", False, "False"):
            continue
        parts = ["DATA"] if name == "data" else value if isinstance(value, list) else [value]
        said += f" --{name.replace('_', '-')}"
        said += "" if value is True and name != "data" else "".join(f" {shlex.quote(str(part))}" for part in parts)
    return said


# --- benchmarks/*.py -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """results/NAME.json, which benchmarks/NAME.py or benchmarks/NAME/run.py writes.

    means: how its figures are defined. tables: the rows of each (a field of the file, or what makes them of it) and
    its columns. settings: the command's options, where the file does not hold them. A file that several runs wrote has
    the settings and the environment of each in "runs".
    """

    name: str
    title: str
    means: str
    tables: Sequence[tuple[str | Callable[[Found], list[Row]], Sequence[Column]]]
    settings: Callable[[Found], Found] = lambda found: found.get("settings", {})
    script: str = ""

    def text(self, found: Found) -> str:
        rows = [(of(found) if callable(of) else found.get(of), columns) for of, columns in self.tables]
        script = f"python benchmarks/{self.script or self.name}.py"
        runs = [f"`{script}{options(self.settings(run))}`  \n{machine(run)}" for run in found.get("runs", [found])]
        tables = [table(*part) for part in rows if part[0]]
        return "\n\n".join([f"## {self.title}", *runs, *tables, self.means])


def _with_data(found: Found) -> Found:
    return {"data": True, **found.get("settings", {})}


def _paper(found: Found) -> list[Row]:
    return [{"anchors": kind, **line} for kind, lines in found.get("paper", {}).items() for line in lines]


def _training(found: Found) -> list[Row]:
    speeds, losses = found["tokens_per_second"], found["held_out_loss"]
    return [
        {"way": way, "speed": speed, "ratio": speed / speeds["obvious"], "loss": losses[way]}
        for way, speed in speeds.items()
    ]


def _resident(found: Found) -> list[Row]:
    memory = found.get("memory")
    return [{**memory, **memory["above_model"]}] if memory else []


def _peers(task: str) -> Callable[[Found], list[Row]]:
    return lambda found: [{**row, "score_stderr": row.get("stderr")} for row in found["rows"] if row["task"] == task]


def _served(found: Found) -> list[Row]:
    rows = [{**found[side], "side": side} for side in ("anchorkv", "peer") if side in found]
    if len(rows) == 2:
        rows.append({"side": "ratio", "ratio": found["sessions_ratio"], "faster": found["decode_throughput_ratio"],
                     "gap": found["p95_between_tokens_ratio"]})
    return rows


def _soak(found: Found) -> list[Row]:
    soak = found.get("soak")
    return [{**soak, "passed": "passed" if soak["passed"] else "failed"}] if soak else []


POLICY, KEPT, TO_FULL = ("policy", "policy", ""), ("full / kept", "reduction", "{:.1f}×"), ("to full", "ratio", ".3f")
TOKENS, RECOVERED = ("tokens", "context", ","), ("recovered", "context_recovered", ".1%")
PREFILL, DECODE = ("to full", "prefill_ratio", "{:.2f}×"), ("to full", "decode_ratio", "{:.2f}×")
PEERS = (
    ("method", "method", ""), ("asked", "requested", "{:g}×"), KEPT, ("KV cache", "kv_bytes", mib),
    ("cells at the end", "end_cells", ".0f"),
    ("score", "score", ".3f"), TO_FULL, ("gain", "difference", "+.3f"), ("answer loss", "answer_loss", ".2f"),
    ("than full's", "loss_verdict", ""), ("behind ours", "behind", "+.3f"), ("than ours", "behind_verdict", ""),
    ("prefill tok/s", "prefill_tok_s", ".0f"), PREFILL, ("decode tok/s", "decode_tok_s", ".1f"), DECODE,
)
BENCHMARKS = (
    Benchmark(
        "adapter", "Perplexity with the shipped adapter",
        "*To full*: to the perplexity of the full cache, the same weights on both sides. *To base*: to that of the "
        "full cache without the adapter. *Recovered*: (no memory - anchored) / (no memory - full), where no memory "
        "keeps sinks and the recent window alone. The last two columns: the same without the adapter. *window*: the "
        "newest text whole instead of anchors, as many cells. The second table, where there is one: the paper's "
        "anchors while they are trained, on held-out books.",
        [
            ("perplexity", [
                ("text", "text", ""), POLICY, KEPT, ("perplexity", "perplexity", ".2f"), TO_FULL,
                ("to base", "ratio_to_base", ".3f"), RECOVERED, ("to full, without", "base_ratio", ".3f"),
                ("recovered, without", "base_context_recovered", ".1%"),
            ]),
            (_paper, [
                ("anchors", "anchors", ""), ("tokens trained", "tokens", ","), KEPT, ("full", "perplexity_full", ".1f"),
                ("anchored", "perplexity_anchored", ".1f"), ("no memory", "perplexity_no_memory", ".1f"), RECOVERED,
            ]),
        ],
        _with_data,
    ),
    Benchmark(
        "inference", "Speed and memory",
        "Tokens/s of both sides in turns, in one process; above 1× is faster than the full cache at the fastest of its "
        "settings. Cells after the text, and at the peak. Memory: peak resident bytes above the model itself, each "
        "side in a process of its own.",
        [
            ("rows", [
                ("engine", "engine", ""), ("weights", "weights", ""), POLICY, TOKENS,
                ("prefill", "prefill_anchored", ".0f"), ("full's", "prefill_full", ".0f"), PREFILL,
                ("decode", "decode_anchored", ".1f"), ("full's", "decode_full", ".1f"), DECODE,
                ("kept cells", "kept_cells", ","), ("at the peak", "peak_cells", ","),
                ("full's settings", "full_settings", ""), ("note", "note", ""),
            ]),
            (_resident, [
                POLICY, TOKENS, ("anchored", "anchored", mib), ("full's", "full", mib), ("ratio", "ratio", "{:.1f}×"),
            ]),
        ],
    ),
    Benchmark(
        "peers", "Beside other methods",
        "The same base model and cases. Tables: continuation (score: perplexity, less is better), reading (F1), needle "
        "(share found). *Answer loss*: mean -log p of the right answer's tokens; tells more where few answers are "
        "right. Ratios, gains and verdicts are to the full cache of the same engine and weights, paired case by case; "
        "a difference below two standard errors is a tie. *Behind ours*: how much more loss (nats a token; the "
        "answer's where there is one) than anchorkv with as many cells, with recall where a question is asked. Peers "
        "run in fp32 on PyTorch, anchorkv on llama.cpp: compare speeds by their ratios.",
        [(_peers(task), PEERS) for task in ("continuation", "reading", "needle")],
        _with_data, script="peers/run",
    ),
    Benchmark(
        "serving", "Many conversations in the same KV memory",
        "*anchorkv*: the server, under load from a second process; *peer*: llama.cpp's full cache at its best, "
        "with as many slots as fit. *Live*: conversations whose next turn is not read again. *Decode*: tokens/s of all "
        "together while all write. *Gap*: 95 % of an answer's tokens came within so many seconds of the one before, "
        "while all write and new conversations come in. Where there is a last table: `python benchmarks/soak.py`, the "
        "server at its memory limit; *lost*: answers that a client got and no record tells of.",
        [
            (_served, [
                ("", "side", ""), ("settings", "settings", ""), ("conversations", "conversations", ","),
                ("live", "sessions", ","), ("", "ratio", "{:.1f}×"), ("decode", "decode_tokens_per_second", ".1f"),
                ("", "faster", "{:.2f}×"), ("gap", "p95_seconds_between_tokens", ".2f"), ("", "gap", "{:.2f}×"),
            ]),
            (_soak, [
                ("soak", "passed", ""), ("seconds", "seconds", ".0f"), ("answers", "acknowledged", ","),
                ("lost", "acknowledged_and_lost", ","), ("memory's growth", "rss_growth", "+.1%"),
                ("cells taken", "cells_taken_mean", ".0%"), ("time with a queue", "share_of_time_with_a_queue", ".0%"),
            ]),
        ],
    ),
    Benchmark(
        "recall_threshold", "When recall starts by itself",
        "Share of questions for which `auto` recalls at a threshold (of the highest score that the ranker could give), "
        "with and without the answer in the text: the first should be high, the second low.",
        [("rows", [
            ("threshold", "threshold", "g"), ("answer in the text", "answer_present", ".0%"),
            ("answer not in it", "answer_absent", ".0%"),
        ])],
        lambda found: {"data": True, "questions": found["questions"]},
    ),
    Benchmark(
        "training", "Training speed",
        "Median tokens/s of a step after the first. *Obvious*: transformers' Trainer with a dense mask. *Loss*: that "
        "of the next token in a text that no way was trained on, after as many steps.",
        [(_training, [
            ("way", "way", ""), ("tokens/s", "speed", ".1f"), ("to obvious", "ratio", "{:.2f}×"),
            ("loss", "loss", ".4f"),
        ])],
        lambda found: {"length": found["length"], "steps": found["steps"]},
    ),
    Benchmark(
        "adapter_loading", "An adapter merged, or loaded beside the weights", "Tokens/s by batch, and seconds.",
        [("speeds", ()), (lambda found: [found["seconds"]], ())],
    ),
    Benchmark(
        "llama_kernels", "Where llama.cpp's time goes",
        "Prefill tokens/s by weights and batch; milliseconds a decoded token by cells held and attention kernel.",
        [("prefill_tokens_per_second", ()), ("decode_milliseconds", ())],
    ),
)


# --- anchorkv eval -------------------------------------------------------------------------------------------------

TIE = "Every way is measured on the same items; a difference below two standard errors is a tie."


def evaluation(path: Path, found: Found) -> Iterator[str]:
    """A section a task of one file that `anchorkv eval` wrote."""
    failed = found.get("failures", [])
    for task in dict.fromkeys(row["task"] for row in [*found["rows"], *failed]):
        rows = [row for row in found["rows"] if row["task"] == task and not row.get("detail")]
        if not any("error" in row for row in rows):
            whys = {one["way"]: f"{one['item']}: {one['error']}" for one in reversed(failed) if one["task"] == task}
            rows += [{"policy": way, "error": why} for way, why in reversed(whys.items())]
        given = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.get("tasks", {}).get(task, {}).items()
        }
        about, columns, usual = _known(task, given, rows)
        given = {name: value for name, value in given.items() if value is not None and value != usual.get(name)}
        yield f"## `anchorkv eval`: {task} ({path.stem})\n\n`{_command(task, given, rows)}`  \n{machine(found)}"
        yield from (table(rows, columns), f"{about} {TIE}".strip())


def _known(task: str, given: Found, rows: Sequence[Row]) -> tuple[str, Sequence[Column], Found]:
    """What its module says of its figures, the columns that the command line shows, and the usual options. Of a task
    that is unknown, or that has other options by now: words and numbers in their order."""
    plain = [column for column in columns_of(rows) if column[1] != "error"]
    if task not in TASKS:
        return "", plain, {}
    name, _, kind = TASKS[task].partition(":")
    module = importlib.import_module(name)
    about = " ".join((module.__doc__ or "").split())
    try:
        made = getattr(module, kind)(**given)
    except (TypeError, AnchorKVError):
        return about, plain, {}
    return about, getattr(made, "columns", plain), {field.name: field.default for field in fields(made)}


def _command(task: str, given: Found, rows: Sequence[Row]) -> str:
    own = ",".join(
        f"{name}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in given.items() if name not in SHARED
    )
    ways = dict.fromkeys(row["policy"] for row in rows if row.get("policy", FULL) != FULL)
    policies = "".join(options({"policy": way}) for way in ways)
    shared = options({name: given[name] for name in SHARED if name in given})
    return f"anchorkv eval {f'{task}:{own}' if own else task}{policies}{shared}"


# --- the document --------------------------------------------------------------------------------------------------


def document(results: Path = ROOT / "results") -> str:
    """docs/benchmarks.md as `results` has it."""
    parts = [HEAD]
    for benchmark in BENCHMARKS:
        path = results / f"{benchmark.name}.json"
        if path.is_file():
            parts.append(benchmark.text(json.loads(path.read_text(encoding="utf-8"))))
    for path in sorted((results / "eval").glob("*.json")):
        parts += evaluation(path, json.loads(path.read_text(encoding="utf-8")))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
