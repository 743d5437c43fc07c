"""docs/benchmarks.md says what results/ say; what failed, ties and losses are in it as what succeeded is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from document import BENCHMARKS, COMMAND, HEAD, TARGET, document, table

from anchorkv.evaluate.plan import TASKS

MACHINE = {
    "versions": {"anchorkv": "9.9", "torch": None}, "hardware": {"processor": "Z80", "cores": 4, "usable_cores": 2},
    "date": "2001-02-03", "models": [{"name": "tiny", "weights": "Q8_0", "engine": "llama"}],
}


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def written(folder: Path, name: str, found: dict[str, Any]) -> str:
    """The document of `folder` with one file in it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")
    return document(folder)


def evaluated(folder: Path, task: str, rows: list[dict[str, Any]], **more: Any) -> str:
    found = {**MACHINE, "rows": [{"task": task, **row} for row in rows], **more}
    return written(folder, "eval/some.json", found)


def test_the_document_is_in_step_with_the_results() -> None:
    there = TARGET.read_text(encoding="utf-8") if TARGET.is_file() else ""
    if there != document():
        pytest.fail(f"{TARGET.name} is not what results/ says; run {COMMAND}", pytrace=False)


def test_every_known_file_of_results_has_its_section() -> None:
    text = document()
    for benchmark in BENCHMARKS:
        if (TARGET.parents[1] / "results" / f"{benchmark.name}.json").is_file():
            assert f"## {benchmark.title}\n\n`python benchmarks/{benchmark.script or benchmark.name}.py" in text
    assert "None" not in text


def test_scripts_and_links_are_there() -> None:
    for benchmark in BENCHMARKS:
        assert (TARGET.parents[1] / "benchmarks" / f"{benchmark.script or benchmark.name}.py").is_file()
    assert "(where-anchors-fail.md)" in HEAD


def test_nothing_measured_is_a_document_too(tmp_path: Path) -> None:
    assert document(tmp_path) == HEAD + "\n"


# --- tables --------------------------------------------------------------------------------------------------------


def test_a_table_leaves_out_what_no_row_has_and_marks_gaps() -> None:
    columns = [("way", "way", ""), ("loss", "loss", ".2f"), ("never", "never", "")]
    rows = [{"way": "a|b\nc", "loss": 1.234, "loss_stderr": 0.5}, {"way": "d", "loss": float("nan")}, {"way": "e"}]
    assert table(rows, columns).splitlines() == [
        "| way | loss |", "| --- | ---: |", "| a\\|b c | 1.23 ±0.50 |", "| d | – |", "| e | – |",
    ]


def test_a_table_without_columns_has_all_fields() -> None:
    assert table([{"batch": 1024, "F32": 2.25}]).splitlines()[::2] == ["| batch | F32 |", "| 1,024 | 2.2 |"]


def test_failures_ties_and_losses_stand_beside_the_rest() -> None:
    rows = [
        {"policy": "full", "score": 1.0, "difference": 0.0, "difference_stderr": 0.0},
        {"policy": "a", "score": 0.9, "difference": -0.1, "difference_stderr": 0.02},
        {"policy": "b", "score": 0.99, "difference": -0.01, "difference_stderr": 0.02},
        {"policy": "c", "verdict": "better"},
        {"policy": "d", "error": "No cell was left."},
    ]
    found = table(rows, [("policy", "policy", ""), ("score", "score", ".2f")]).splitlines()
    assert found[0] == "| policy | score | than full | failed |"
    assert found[2:] == [
        "| full | 1.00 |  |  |", "| a | 0.90 | worse |  |", "| b | 0.99 | tie |  |", "| c | – | better |  |",
        "| d | – |  | No cell was left. |",
    ]


# --- files that are not there yet ----------------------------------------------------------------------------------


def test_peers(tmp_path: Path) -> None:
    row = {
        "method": "ours", "task": "reading", "requested": 10, "reduction": 9.5, "kv_bytes": 2**21, "score": 0.5,
        "stderr": 0.1, "difference": -0.02, "difference_stderr": 0.03, "verdict": "tie", "prefill_tok_s": 100.4,
        "prefill_ratio": 1.5, "decode_tok_s": 9.0, "decode_ratio": float("nan"), "answer_loss": 2.5,
        "answer_loss_stderr": 0.25, "loss_verdict": "worse",
    }
    failed = {"method": "theirs", "task": "reading", "requested": 10, "error": "It needs\na GPU."}
    text = written(tmp_path, "peers.json", {
        "rows": [row, failed], "runs": [
            {"settings": {"tasks": ["continuation"]}, "environment": {**MACHINE, "date": "2001-02-02"}},
            {"settings": {"reductions": [4, 10], "tasks": ["reading"]}, "environment": MACHINE},
        ],
    })
    assert lines(text, "`python") == [
        "`python benchmarks/peers/run.py --data DATA --tasks continuation`  ",
        "`python benchmarks/peers/run.py --data DATA --reductions 4 10 --tasks reading`  ",
    ]
    assert [line.split()[1] for line in lines(text, "Measured")] == ["2001-02-02", "2001-02-03"]
    assert "Measured 2001-02-03 on Z80, 2 cores; tiny Q8_0 (llama); anchorkv 9.9." in text
    ours, = lines(text, "| ours")
    assert "| 10× | 9.5× | 2.0 MiB | 0.500 ±0.100 | -0.020 ±0.030 | 2.50 ±0.25 | worse | 100 |" in ours
    assert ours.endswith("| 1.50× | 9.0 | – | tie |  |")
    assert lines(text, "| theirs")[0].endswith("It needs a GPU. |")


def test_the_adapter_with_standard_errors_and_the_papers_anchors(tmp_path: Path) -> None:
    row = {
        "text": "pg19.test", "policy": "default 12x", "reduction": 11.0, "perplexity": 20.0, "perplexity_stderr": 1.0,
        "ratio": 1.1, "ratio_stderr": 0.02, "base_ratio": None,
    }
    line = {"tokens": 5000, "reduction": 20.0, "perplexity_full": 30.0, "context_recovered": 0.25}
    text = written(tmp_path, "adapter.json", {
        "perplexity": [row], "paper": {"paper-ep": [line]},
        "settings": {"documents": 2, "length": 4096, "reductions": [12.0]},
    })
    assert "`python benchmarks/adapter.py --data DATA --documents 2 --length 4096 --reductions 12.0`" in text
    assert "| pg19.test | default 12x | 11.0× | 20.00 ±1.00 | 1.100 ±0.020 |" in text
    assert "| paper-ep | 5,000 | 20.0× | 30.0 | 25.0% |" in text


def test_adapter_loading(tmp_path: Path) -> None:
    loading = {"speeds": [{"batch": 1, "without": 10.0, "merged": 9.0, "beside": 5.0}], "seconds": {"merge, once": 3.0}}
    text = written(tmp_path, "adapter_loading.json", loading)
    assert "| 1 | 10.0 | 9.0 | 5.0 |" in text
    assert "| merge, once |" in text
    assert "on an unknown processor, some cores" in text


# --- anchorkv eval -------------------------------------------------------------------------------------------------


def test_a_task_is_shown_as_the_command_line_shows_it(tmp_path: Path) -> None:
    row = {"length": 1024, "prefill_tok_s": 100.0, "prefill_tok_s_stderr": 2.0, "reduction": 8.0, "kv_bytes": 2**20}
    text = evaluated(
        tmp_path, "speed",
        [{"policy": "full", **row, "prefill_ratio": 1.01, "prefill_ratio_stderr": 0.02},
         {"policy": "default", **row, "prefill_ratio": 0.9, "prefill_ratio_stderr": 0.02, "verdict": "worse"},
         {"policy": "window", "length": 1024, "error": "Too long."}],
        tasks={"speed": {"data": "/some/where", "lengths": [1024], "burst": 12, "rounds": 5, "limit": None}},
    )
    assert "## `anchorkv eval`: speed (some)" in text
    assert "`anchorkv eval speed:lengths=1024,rounds=5 --policy default --policy window --data DATA`" in text
    assert "/some/where" not in text
    assert "| 1,024 | default | 100 ±2 | 0.90 ±0.02× | 8.0× | 1.0 MiB | worse |  |" in text
    assert lines(text, "| 1,024 | window")[0].endswith("| Too long. |")
    assert "The way \"full\" is the full cache against itself" in text


def test_failures_that_no_row_tells_of_get_one(tmp_path: Path) -> None:
    failures = [{"task": "needle", "way": "default", "item": f"n{n}", "error": f"Reason {n}."} for n in range(3)]
    text = evaluated(tmp_path, "needle", [{"policy": "full", "score": 1.0, "length": 1024}], failures=failures)
    assert len(lines(text, "| ")) == 4
    assert "n0: Reason 0." in text
    assert "n1" not in text
    assert "--policy default" in text


def test_details_are_left_out(tmp_path: Path) -> None:
    text = evaluated(tmp_path, "qa", [{"policy": "full", "accuracy": 0.5}, {"policy": "shown", "detail": True}])
    assert "shown" not in text


def test_an_unknown_task_is_shown_as_it_is(tmp_path: Path) -> None:
    text = evaluated(tmp_path, "juggling", [{"policy": "full", "balls": 5, "fall": 0.125, "fall_stderr": 0.01}])
    assert lines(text, "| policy") == ["| policy | balls | fall |"]
    assert lines(text, "| full") == ["| full | 5 | 0.125 ±0.010 |"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_shown(tmp_path: Path, task: str) -> None:
    text = evaluated(tmp_path, task, [{"policy": "full", "length": 64, "reduction": 1.0}])
    assert f"## `anchorkv eval`: {task} (some)" in text
    assert "a tie." in text


def test_several_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        written(tmp_path, f"eval/{name}.json", {"rows": [{"task": "speed", "policy": "full", "length": 1}]})
    text = document(tmp_path)
    assert text.index("speed (a)") < text.index("speed (b)")
    assert text == document(tmp_path)
