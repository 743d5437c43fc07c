"""The benchmarks through lm-eval: rows, prompts, what is measured, and the figures made of it."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from fake_engine import FakeEngine

from anchorkv.config import AnchorConfig
from anchorkv.errors import ConfigError, DataError
from anchorkv.evaluate.harness_tasks.benchmark import BENCHMARKS, chosen, dataset, read
from anchorkv.evaluate.run import Models, Record, Store, run, settings_of
from anchorkv.evaluate.tasks.icl import ICL
from anchorkv.evaluate.tasks.qa import AVERAGE, QA, TASK_FILES, lm_eval_version
from anchorkv.evaluate.ways import Way, way, ways
from anchorkv.models import Model

needs_lm_eval = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "datasets")), reason="needs lm-eval"
)
ANCHORED = Way("anchored", AnchorConfig(
    scorer="frequency", reduction=8, aging=0, sinks=1, recent_window=0, min_segment=8, max_segment=64, recall="off",
))


def question(benchmark: str, number: int) -> dict[str, Any]:
    choices = [f"the {thing} of {number}" for thing in ("pump", "worn seal", "old red wire")]
    row: dict[str, Any] = {"question": f"What failed on day {number}?", "choices": choices, "answer": number % 3}
    if benchmark == "piqa":
        row["choices"] = choices[:2]
    elif benchmark == "hellaswag":
        row["question"] = f"Pumping: Day {number} began. The pump"
    elif benchmark == "winogrande":
        row |= {"question": f"The pump hit the seal on day {number} and _ broke.", "choices": ["the pump", "the seal"]}
    elif benchmark == "boolq":
        row |= {"passage": f"It was day {number}.", "title": "Pumps", "choices": ["no", "yes"]}
    elif benchmark == "sciq":
        row["support"] = f"On day {number} it failed." if number % 2 else ""
    return {**row, "answer": number % len(row["choices"]), "id": str(number)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for benchmark in BENCHMARKS:
        (folder / "qa" / benchmark).mkdir(parents=True)
        for split, numbers in (("train", range(100, 106)), ("test", range(12))):
            rows = [json.dumps(question(benchmark, number)) for number in numbers]
            with gzip.open(folder / "qa" / benchmark / f"{split}.jsonl.gz", "wt") as file:
                file.write("\n".join(rows) + "\n")
    return folder


class FakeModels(Models):
    """Every way on one engine without a model."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.engine_ = FakeEngine()

    def of(self, way: Way) -> Model:
        return Model(self.engine_, way.policy)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("benchmark", "changes", "problem"), [
    ("arc_easy", {"answer": 3}, "the answer is 3, and the 3 choices are counted from 0"),
    ("arc_easy", {"answer": -1}, "the answer is -1"),
    ("arc_easy", {"answer": "0"}, "'answer' is str, not int"),
    ("arc_easy", {"choices": ["a", ""]}, "one of the 'choices' is no text, or empty"),
    ("arc_easy", {"choices": ["a"], "answer": 0}, "one choice"),
    ("arc_easy", {"question": None}, "'question' is NoneType, not str"),
    ("boolq", {"passage": ""}, "'passage' is empty"),
    ("sciq", {"support": 3}, "'support' is no text"),
    ("winogrande", {"question": "No gap.", "choices": ["a", "b"], "answer": 0}, "no one gap '_'"),
])
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, benchmark: str, changes: dict[str, Any], problem: str) -> None:
    path = tmp_path / "qa" / benchmark / "test.jsonl"
    path.parent.mkdir(parents=True)
    rows = [question(benchmark, 0), {**question(benchmark, 1), **changes}, question(benchmark, 2)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"test\.jsonl:2: .*") as error:
        read(tmp_path, benchmark, "test")
    assert problem in str(error.value)
    good, bad = read(tmp_path, benchmark, "test", skip_bad=True)
    assert len(good) == 2
    assert len(bad) == 1


def test_fewer_questions_are_the_first_of_more(data: Path) -> None:
    rows = read(data, "piqa", "test")[0]
    assert chosen(rows, "piqa", 0, 4) == chosen(rows, "piqa", 0, 9)[:4]
    assert sorted(map(str, chosen(rows, "piqa", 0))) == sorted(map(str, rows))
    assert chosen(rows, "piqa", 0) != rows
    assert chosen(rows, "piqa", 0) != chosen(rows, "piqa", 1)


def test_options_that_fit_nothing_are_one_sentence(data: Path, tmp_path: Path) -> None:
    for options, problem in (
        ({"benchmarks": ("piqa", "mmlu")}, "no benchmark 'mmlu'"), ({"benchmarks": ()}, "No benchmark"),
        ({"shots": (-1,)}, "0 or more"), ({"shots": ()}, "0 or more"), ({"limit": 0}, "0 questions"),
    ):
        with pytest.raises(ConfigError, match=problem):
            QA(data=data, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="--data"):
        QA().items()
    with pytest.raises(DataError, match="There is no qa/openbookqa"):
        QA(data=tmp_path).items()
    with pytest.raises(DataError, match="has 6 rows"):
        QA(data=data, shots=(7,)).items()
    assert QA(data=data, limit=100, benchmarks=("piqa",)).notes(FakeModels(), []) == [
        "piqa has 12 of the 100 questions asked for."
    ]


def test_a_missing_lm_eval_is_one_sentence(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'anchorkv\[eval\]'"):
        lm_eval_version()
    with pytest.raises(ConfigError, match=r"pip install 'anchorkv\[eval\]'"):
        dataset("piqa", data=str(data))


def test_the_data_folder_of_a_task_file_comes_from_metadata_or_the_environment(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANCHORKV_DATA", raising=False)
    with pytest.raises(DataError, match="ANCHORKV_DATA"):
        dataset("piqa")
    pytest.importorskip("datasets")
    monkeypatch.setenv("ANCHORKV_DATA", str(data))
    assert dataset("piqa")["test"].to_list() == dataset("piqa", data=str(data), version=1.0)["test"].to_list()


# --- the same prompts as lm-eval's own tasks -------------------------------------------------------------------------


def _letters(row: dict[str, Any], stem: str) -> dict[str, Any]:
    labels = list("ABC")
    choices = {"text": row["choices"], "label": labels}
    return {stem: row["question"], "choices": choices, "answerKey": labels[row["answer"]]}


def _sciq(row: dict[str, Any]) -> dict[str, Any]:
    wrong = [choice for at, choice in enumerate(row["choices"]) if at != row["answer"]]
    return {
        "question": row["question"], "support": row["support"], "distractor1": wrong[0], "distractor2": wrong[1],
        "distractor3": wrong[1], "correct_answer": row["choices"][row["answer"]],
    }


ORIGINAL: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "openbookqa": ("openbookqa/openbookqa", lambda row: _letters(row, "question_stem")),
    "arc_easy": ("arc/arc_easy", lambda row: _letters(row, "question")),
    "arc_challenge": ("arc/arc_challenge", lambda row: _letters(row, "question")),
    "piqa": ("piqa/piqa", lambda row: {
        "goal": row["question"], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["answer"]}),
    "hellaswag": ("hellaswag/hellaswag", lambda row: {
        "activity_label": "Pumping", "ctx_a": row["question"][9:-9], "ctx_b": "the pump", "endings": row["choices"],
        "label": str(row["answer"])}),
    "sciq": ("sciq/sciq", _sciq),
    "boolq": ("super_glue/boolq/default", lambda row: {
        "passage": f"{row['title']} -- {row['passage']}", "question": row["question"][:-1], "label": row["answer"]}),
    "winogrande": ("winogrande/default", lambda row: {
        "sentence": row["question"], "option1": row["choices"][0], "option2": row["choices"][1],
        "answer": str(row["answer"] + 1)}),
}
"""benchmark -> lm-eval's own task file, and our rows as that task's data set has them."""


def _requests(config: dict[str, Any]) -> list[tuple[str, str]]:
    from lm_eval.api.task import ConfigurableTask

    task = ConfigurableTask(config={**{k: v for k, v in config.items() if k != "dataset_kwargs"}, "num_fewshot": 3})
    task.set_fewshot_seed(0)
    task.build_all_requests()
    return [request.args for request in task.instances]


@needs_lm_eval
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_prompts_are_those_of_lm_evals_own_task(benchmark: str, data: Path) -> None:
    import datasets
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    file, original = ORIGINAL[benchmark]
    theirs = load_yaml(Path(lm_eval.tasks.__file__).parent / f"{file}.yaml")
    rows = {
        split: [original(question(benchmark, number)) for number in numbers]
        for split, numbers in (("train", range(100, 106)), ("test", range(12)))
    }
    splits = datasets.DatasetDict({
        **{split: datasets.Dataset.from_list(some) for split, some in rows.items()},
        "validation": datasets.Dataset.from_list(rows["test"]),
    })
    expected = _requests({
        **theirs, "custom_dataset": lambda **_: splits, "test_split": "test", "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
    })
    ours = load_yaml(TASK_FILES / f"{benchmark}.yaml")
    assert [metric["metric"] for metric in ours["metric_list"]] == [m["metric"] for m in theirs["metric_list"]]
    found = _requests({**ours, "custom_dataset": lambda **_: dataset(benchmark, data=str(data))})
    assert set(found) == set(expected)


# --- measuring -------------------------------------------------------------------------------------------------------


def measured(data: Path, out: Path, **options: Any) -> tuple[list[dict[str, Any]], list[Record], QA]:
    task = QA(data=data, **options)
    asked = [way("full"), ANCHORED]
    models = FakeModels()
    store = Store(out, settings_of([task], asked, models))
    rows = run([task], asked, models, store)
    return rows, store.of("qa"), task


@needs_lm_eval
def test_every_way_answers_the_same_questions(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "limit": 5, "shots": (0, 3), "benchmarks": ("arc_easy", "winogrande", "boolq"), "reread_questions": 2,
    }
    rows, records, task = measured(data, tmp_path / "run", **options)
    assert not [record for record in records if "error" in record]
    assert len(records) == 2 * 2 * 3
    for record in records:
        assert len(record["correct"]) == len(record["times"]) == 5
        assert ("correct_norm" in record) == (record["benchmark"] == "arc_easy")
        assert all(seconds > 0 for seconds in record["times"])
        if record["shots"]:
            assert record["demonstration_tokens"] > 3 * record["demonstration_cells"] or record["way"] == "full"
        else:
            assert record["demonstration_tokens"] == 0
        if record["way"] == "full" and record["shots"]:
            assert len(record["reread_times"]) == 2
            assert record["reread_correct"] == record["correct"][:2]
    assert {row["benchmark"] for row in rows} == {"arc_easy", "winogrande", "boolq", AVERAGE}
    names = {name for row in rows for name in row}
    assert {column for _, column, _ in task.columns} <= names
    assert "anchored" in task.figures(records, [ANCHORED])
    again, _, _ = measured(data, tmp_path / "run", **options)  # the store has all of it
    assert str(again) == str(rows)


@needs_lm_eval
def test_answers_are_those_of_the_scores(data: Path) -> None:
    """Accuracy by hand, from the model's scores alone."""
    from lm_eval.api.instance import Instance

    from anchorkv.evaluate.harness import AnchorLM

    task = QA(data=data, shots=(2,), benchmarks=("arc_easy",))
    models = FakeModels()
    record = task.measure(models, ANCHORED, task.items()[0])
    shown = "".join(
        f"Question: {row['question']}\nAnswer: {row['choices'][row['answer']]}\n\n"
        for row in (question("arc_easy", number) for number in (100, 101))
    )
    lm = AnchorLM("x", model=models.of(ANCHORED), quiet=True)
    correct, norm = [], []
    for row in chosen(read(data, "arc_easy", "test")[0], "arc_easy", 0):
        before = f"{shown}Question: {row['question']}\nAnswer:"
        scores = [
            lm.loglikelihood([Instance("loglikelihood", {}, (before, f" {choice}"), 0)])[0][0]
            for choice in row["choices"]
        ]
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        correct.append(int(scores.index(max(scores)) == row["answer"]))
        norm.append(int(by_length.index(max(by_length)) == row["answer"]))
    assert record["correct"] == correct
    assert record["correct_norm"] == norm
    assert 0 < sum(correct) < 12
    assert norm != correct


@needs_lm_eval
def test_nothing_of_lm_eval_reaches_the_terminal(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    task = QA(data=data, limit=2, shots=(1,), benchmarks=("piqa",))
    task.measure(FakeModels(), way("full"), task.items()[0])
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_ways_without_the_adapter_are_the_built_in_models(data: Path) -> None:
    task = QA(data=data, benchmarks=("piqa",))
    assert [one.name for one in task.ways(ways(["default"]))] == ["full", "default"]
    assert [one.name for one in task.ways(ways(["base/default"]))] == ["full", "base/default", "base"]
    skipped = task.measure(FakeModels("other.gguf"), way("base"), task.items()[0])
    assert list(skipped) == ["skipped"]
    record = {"task": "qa", "way": "base", "item": task.items()[0].id, "seconds": 0.0, **skipped}
    assert task.rows([record], [way("base")]) == []


# --- figures ---------------------------------------------------------------------------------------------------------


def record(way: str, benchmark: str, correct: list[int], times: list[float], **more: Any) -> Record:
    return {
        "task": "qa", "way": way, "item": f"{benchmark}/5-shot", "seconds": 1.0, "benchmark": benchmark, "shots": 5,
        "correct": correct, "times": times, "demonstration_seconds": 4.0, "demonstration_cells": 100,
        "demonstration_tokens": 100, "context_reduction": 1.0, "prompt_tokens": 120.0, "longest": 130,
        "beyond_window": False, **more,
    }


def test_figures_are_paired_with_the_full_cache(data: Path) -> None:
    task = QA(data=data, shots=(5,), benchmarks=("piqa", "sciq"))
    records = [
        record("full", "piqa", [1, 1, 0, 1], [2.0] * 4, reread_times=[6.0, 6.0]),
        record("full", "sciq", [1, 0, 1, 1], [2.0] * 4, reread_times=[6.0, 6.0]),
        record("anchored", "piqa", [1, 0, 0, 0], [1.0] * 4, demonstration_cells=5),
        record("anchored", "sciq", [1, 0, 1, 1], [0.5] * 4, demonstration_cells=15, beyond_window=True),
    ]
    rows = {(row["benchmark"], row["policy"]): row for row in task.rows(records, [way("full"), ANCHORED])}
    piqa, average = rows["piqa", "anchored"], rows[AVERAGE, "anchored"]
    assert piqa["accuracy"] == 0.25
    assert piqa["difference"] == -0.5
    assert piqa["difference_stderr"] == pytest.approx(math.sqrt(1 / 3) / 2)
    assert piqa["verdict"] == "tie"  # four questions tell nothing
    assert piqa["demonstration_reduction"] == pytest.approx(0.95)
    assert piqa["acceleration_reread"] == pytest.approx(6 / 2)  # 1 s, and a fourth of 4 s
    assert piqa["acceleration_shared"] == pytest.approx(3 / 2)
    assert rows["piqa", "full"]["acceleration_reread"] == pytest.approx(6 / 3)
    assert (rows["piqa", "full"]["acceleration_shared"], rows["piqa", "full"]["acceleration_shared_stderr"]) == (1, 0)
    assert average["accuracy"] == pytest.approx((0.25 + 0.75) / 2)
    assert average["difference"] == -0.25
    assert average["difference_stderr"] == pytest.approx(piqa["difference_stderr"] / 2)
    assert average["demonstration_reduction"] == pytest.approx(0.9)
    assert average["demonstration_reduction_overall"] == pytest.approx(0.9)
    assert average["beyond_window"]
    assert rows["sciq", "anchored"]["acceleration_shared"] == pytest.approx(3 / 1.5)


def test_the_average_is_of_what_all_ways_answered(data: Path) -> None:
    task = QA(data=data, shots=(5,), benchmarks=("piqa", "sciq", "boolq"))
    records = [record(name, benchmark, [1, 0], [1.0, 1.0]) for name in ("full", "anchored") for benchmark in
               ("piqa", "sciq")]
    records += [record("full", "boolq", [0, 0], [1.0, 1.0])]
    records += [{"task": "qa", "way": "anchored", "item": "boolq/5-shot", "seconds": 0.0, "error": "no cell left"}]
    rows = task.rows(records, [way("full"), ANCHORED])
    averages = [row for row in rows if row["benchmark"] == AVERAGE]
    assert [(row["accuracy"], row["benchmarks"]) for row in averages] == [(0.5, 2), (0.5, 2)]
    assert ("boolq", "anchored") not in {(row["benchmark"], row["policy"]) for row in rows}


@needs_lm_eval
def test_icl_counts_demonstrations(data: Path) -> None:
    task = ICL(data=data, limit=3, shots=(1, 2, 4), benchmarks=("arc_easy",))
    models = FakeModels()
    records = [
        {"task": task.name, "way": one.name, "item": item.id, "seconds": 0.0, **task.measure(models, one, item)}
        for item in task.items() for one in (way("full"), ANCHORED)
    ]
    rows = task.rows(records, [way("full"), ANCHORED])
    assert [row["shots"] for row in rows if row["policy"] == "full"] == [1, 2, 4]
    tokens = [row["demonstration_tokens"] for row in rows if row["policy"] == "anchored"]
    assert tokens == sorted(tokens)
    assert tokens[1] == pytest.approx(2 * tokens[0], abs=3)
    assert all(row["demonstration_cells"] < row["demonstration_tokens"] / 3 for row in rows if row["policy"] != "full")
    assert {column for _, column, _ in task.columns} <= set(rows[0])
    assert not any("reread_times" in one for one in records)
    with pytest.raises(DataError, match="train split"):
        ICL(data=data, benchmarks=("arc_easy",)).items()


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.parametrize("by_name", [True, False], ids=["wrapper", "lm-eval"])
def test_lm_evals_own_command_line_runs_the_task_files(
    by_name: bool, data: Path, tmp_path: Path
) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf")
    wrapper = "import sys, types; from anchorkv.cli import lm_eval; "
    wrapper += "lm_eval.lm_eval(types.SimpleNamespace(args=sys.argv[1:]))"
    start = ["-c", wrapper] if by_name else ["-m", "lm_eval"]
    task = "anchorkv_arc_easy" if by_name else str(TASK_FILES / "arc_easy.yaml")
    given = [
        "run", "--model", "anchorkv", "--model_args", f"pretrained={path},policy=default:sinks=2;recent_window=0",
        "--tasks", task, "--num_fewshot", "2", "--limit", "4", "--metadata", f"data={data}", "--output_path",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run([sys.executable, *start, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "anchorkv_arc_easy" in done.stdout
    (found,) = tmp_path.glob("out*.json")
    config = json.loads(found.read_text())["config"]
    assert config["policy_fields"]["sinks"] == 2
    assert config["demonstrations_read_once"][0]["demonstrations"] == 2
