"""The half of the peers benchmark that runs here: what becomes a row, and which rows of earlier runs stay."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).resolve().parent.parent / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def run() -> Any:
    """benchmarks/peers/run.py; it runs as a script, so it is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PEERS))
        found = importlib.import_module("run")
        yield found
    for name in ("run", "cases", "ours", "picture"):
        sys.modules.pop(name, None)


def record(item: str, **fields: Any) -> dict[str, Any]:
    return {
        "item": item, "cells": 100, "kept_cells": 10, "kv_bytes": 1000, "prefill_seconds": 1.0, "decode_seconds": 1.0,
        "decode_tokens": 4, "score": 0.0, **fields,
    }


def test_the_loss_of_the_right_answer_is_compared_case_by_case(run: Any) -> None:
    full = {name: record(name, answer_loss=2.0) for name in "abc"}
    mine = {name: record(name, answer_loss=loss) for name, loss in zip("abc", (3.0, 3.1, 2.9), strict=True)}
    row = run._figures("reading", mine, full)
    assert (row["answer_loss"], row["loss_difference"]) == (pytest.approx(3.0), pytest.approx(-1.0))
    assert (row["verdict"], row["loss_verdict"]) == ("tie", "worse")
    assert row["reduction"] == 10


def test_rows_of_tasks_that_were_not_run_stay_with_the_runs_that_made_them(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    assert run.earlier(path, ["reading"]) == {"rows": [], "runs": []}
    rows = [{"task": task, "method": "a"} for task in ("continuation", "reading", "needle")]
    runs = [{"settings": {"tasks": tasks}} for tasks in (["continuation", "reading"], ["reading"], ["needle"])]
    path.write_text(json.dumps({"rows": rows, "runs": runs}), encoding="utf-8")
    kept = run.earlier(path, ["reading"])
    assert [row["task"] for row in kept["rows"]] == ["continuation", "needle"]
    assert kept["runs"] == [runs[0], runs[2]]


def test_a_run_says_the_options_that_its_tasks_depend_on(run: Any) -> None:
    options = argparse.Namespace(
        tasks=["reading"], reductions=[10], texts=4, length=2048, questions=8, passages=11, needles=5
    )
    assert run.said(options) == {"tasks": ["reading"], "reductions": [10], "questions": 8, "passages": 11}


def test_a_method_is_compared_to_anchorkv_on_the_cases_that_both_could_do(run: Any) -> None:
    losses = zip("abc", (3.0, 3.1, 2.9), strict=True)
    theirs = {name: record(name, answer_loss=loss) for name, loss in losses} | {"d": record("d", answer_loss=9.0)}
    own = {name: record(name, answer_loss=2.0, score=5.0) for name in "abc"} | {"d": {"item": "d", "error": "no"}}
    found = run._behind("reading", theirs, own)
    assert (found["behind"], found["behind_verdict"]) == (pytest.approx(1.0), "worse")
    assert run._behind("continuation", theirs, own)["behind_verdict"] == "better", "there the score is the loss"
    assert run._behind("reading", theirs, {}) == {}


def test_rows_say_how_far_each_method_is_behind_anchorkv_at_its_own_reduction(run: Any, tmp_path: Path) -> None:
    case = argparse.Namespace(id="a")
    store = run.Store(tmp_path, {})
    for name, loss in (("anchorkv 10", 2.0), ("anchorkv 20", 2.5), ("TOVA 10", 2.2), ("TOVA 20", 2.3)):
        store.add({"task": "continuation", "way": name, **record("a", score=loss, end_cells=20)})
    jobs = [(method, reduction, "continuation") for method in ("anchorkv", "TOVA") for reduction in (10.0, 20.0)]
    rows = run.rows(store, jobs, [case], "")
    assert [row.get("behind") for row in rows] == [None, None, pytest.approx(0.2), pytest.approx(-0.2)]
