"""Questions about passages: which are asked, what surrounds them, what is measured, and what the figures mean."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_engine import FakeEngine

from anchorkv.config import AnchorConfig, preset
from anchorkv.document import QUESTION, Document
from anchorkv.engines.base import surprise_of
from anchorkv.errors import ConfigError, DataError
from anchorkv.evaluate.asking import compared, modes, with_full
from anchorkv.evaluate.metrics import rouge_scorer
from anchorkv.evaluate.passages import SEPARATOR, question_file, question_set
from anchorkv.evaluate.run import Models, Record, Store, run
from anchorkv.evaluate.tasks.reading import Reading
from anchorkv.evaluate.ways import Way, way
from anchorkv.models import Model
from anchorkv.recall import RecallPlan

POLICY = AnchorConfig(reduction=6, min_segment=16, max_segment=48, scorer="frequency", recall_cells=96)
FULL, ANCHORED = Way("full", preset("full")), Way("anchored", POLICY)
TOWNS = "Lisbon Oslo Vienna Prague Dublin Athens Warsaw Madrid".split()


class FakeModels(Models):
    """The fake engine, whatever the way."""

    def __init__(self, engine: FakeEngine | None = None) -> None:
        super().__init__()
        self.fake = engine or FakeEngine()

    def of(self, way: Way) -> Model:
        return Model(self.fake, way.policy)


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def passage(town: str, number: int) -> dict[str, Any]:
    return {
        "id": f"{town}-{number}", "question": f"Who bought the mill of {town}?", "answers": [f"Anna {number}", "Anna"],
        "context": f"The old mill of {town} stood by the river for years. Anna {number} bought it in spring. "
        "Nobody had asked her why she wanted it, and she never told.",
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "squad/squad_v1.test.jsonl.gz", [passage(town, n) for n, town in enumerate(TOWNS, start=10)])
    return tmp_path


def test_more_questions_extend_fewer_whatever_the_files_order(data: Path, tmp_path: Path) -> None:
    squad = question_set("squad", data)
    ids = [question.id for question in squad.chosen(len(TOWNS))]
    assert [question.id for question in squad.chosen(3)] == ids[:3]
    assert sorted(ids) != ids
    assert [question.id for question in squad.chosen(len(TOWNS), seed=1)] != ids
    rows = [passage(town, n) for n, town in reversed(list(enumerate([*TOWNS, "Bergen"], start=10)))]
    longer = question_file(write(tmp_path / "longer.jsonl", rows), name="squad")
    assert [question.id for question in longer.chosen(99) if "Bergen" not in question.id] == ids


def test_a_passage_hides_among_others_that_do_not_answer(data: Path, tmp_path: Path) -> None:
    rows = [passage(town, n) for n, town in enumerate(TOWNS, start=10)]
    rows[0]["answers"] = rows[1]["answers"] = ["Anna 10"]
    rows[1]["context"] = rows[1]["context"].replace("Anna 11", "Anna 10")
    mills = question_file(write(tmp_path / "mills.jsonl", rows))
    first = next(question for question in mills.questions if question.id == "Lisbon-10")
    assert mills.hidden(first, 1) == first.context
    few, many = (mills.hidden(first, count).split(SEPARATOR) for count in (4, 7))
    assert (len(few), len(many)) == (4, 7)
    assert first.context in few
    assert set(few) < set(many)
    assert rows[1]["context"] not in many  # it holds the answer too; only the eighth passage has to be it
    assert rows[1]["context"] in mills.hidden(first, 8)
    places = {mills.hidden(first, 7, seed).split(SEPARATOR).index(first.context) for seed in range(12)}
    assert len(places) > 3
    with pytest.raises(DataError, match="8 different passages"):
        mills.hidden(first, 9)


def test_bad_rows_are_named_or_passed_over(tmp_path: Path) -> None:
    good = passage("Oslo", 1)
    bad = [
        {**good, "answers": ["", "Anna"]}, {**good, "answers": [3]}, {**good, "context": "  "},
        {**good, "history": [["only a question"]]}, {**good, "question": 5}, "{",
    ]
    for row in bad:
        with pytest.raises(DataError, match=r"mine\.jsonl:2: "):
            question_file(write(tmp_path / "mine.jsonl", [good, row]))
    found = question_file(write(tmp_path / "mine.jsonl", [*bad, good]), skip_bad=True)
    assert [question.id for question in found.questions] == ["Oslo-1"]
    assert [line.split(":")[1] for line in found.bad] == list("123456")
    write(tmp_path / "long/qmsum.test.jsonl", [{"text": "A: So.", "queries": [{"query": "What?"}]}])
    with pytest.raises(DataError, match=r"qmsum\.test\.jsonl:1: a query"):
        question_set("qmsum", tmp_path)
    with pytest.raises(DataError, match="no question set 'race'"):
        question_set("race", tmp_path)


def test_a_conversations_earlier_turns_stand_before_the_question(tmp_path: Path) -> None:
    row = {**passage("Oslo", 1), "history": [["Where is it?", "by the river"], ["Since when?", "years"]]}
    write(tmp_path / "squad/coqa.test.jsonl", [row])
    (found,) = question_set("coqa", tmp_path).questions
    assert QUESTION.format(question=found.text).splitlines()[-5:] == [
        "Question: Where is it?", "Answer: by the river", "Question: Since when?", "Answer: years",
        "Question: Who bought the mill of Oslo?",
    ]


def test_the_same_question_twice_is_asked_once_and_shared_ids_are_told_apart(tmp_path: Path) -> None:
    rows = [passage("Oslo", 1), passage("Oslo", 1), {**passage("Oslo", 1), "question": "Why?"}]
    nameless = [{key: value for key, value in row.items() if key != "id"} for row in rows]
    for number, content in enumerate((rows, nameless)):
        found = question_file(write(tmp_path / f"{number}.jsonl", content)).questions
        assert len(found) == len({question.id for question in found}) == 2


def test_every_recall_mode_is_asked_on_the_same_reading(data: Path) -> None:
    task, models = Reading(data=data, sets=("squad",), limit=1, passages=(5,), max_tokens=8), FakeModels()
    (item,) = task.items()
    record = task.measure(models, ANCHORED, item)
    off, auto, on = (record["answers"][mode] for mode in ("off", "auto", "on"))
    question = item.fields["question"]
    assert record["stated"]
    assert not record["beyond_window"]
    assert off["recalled_cells"] == 0
    assert on["recalled_cells"] > 0
    assert on["kept_cells"] > off["kept_cells"] + on["recalled_cells"] // 2  # recalled cells count as kept
    assert on["reduction"] == on["full_cells"] / on["kept_cells"] < off["reduction"]
    assert on["kv_bytes"] == on["kept_cells"] * models.fake.info.cell_bytes
    assert not off["answer_recalled"]
    text = item.fields["part"].hidden(question, 5)
    for mode, given in zip(("off", "auto", "on"), (off, auto, on), strict=True):
        policy = POLICY.replace(recall=mode)
        with Document.read(models.fake, policy, text) as document:
            assert given["answer"] == document.ask(question.text, max_tokens=8).text
            plan = RecallPlan(document.session)
            recalled = "".join(plan.text_of(segment) for segment in plan.update(question.text))
            assert given["answer_recalled"] == ("Anna" in recalled)


def test_the_answers_loss_is_what_the_model_says(data: Path) -> None:
    task, models = Reading(data=data, sets=("squad",), limit=1, passages=(1,)), FakeModels()
    record = task.measure(models, FULL, task.items()[0])
    assert list(record["answers"]) == ["off"]
    question = task.items()[0].fields["question"]
    tokenizer = models.fake.tokenizer
    with Document.read(models.fake, preset("full"), question.context) as document, document.session.fork() as session:
        asking = QUESTION.format(question=question.text) + document.prompt.asking
        session.read(tokenizer.encode(asking, special=True))
        losses = [1.0]  # the fake engine's own for the first token of a decode
        for token, follows in zip(gold := tokenizer.encode(question.answers[0]), gold[1:], strict=False):
            session.read([token])
            assert session.logits is not None
            losses.append(surprise_of(session.logits, follows))
    assert record["answers"]["off"]["answer_loss"] == pytest.approx(sum(losses) / len(gold), rel=1e-4)


def test_only_the_first_line_is_scored_on_both_sides(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Anna\nBut that is another story."
    real = Document.ask
    monkeypatch.setattr(
        Document, "ask", lambda self, *a, **k: SimpleNamespace(**{**vars(real(self, *a, **k)), "text": said})
    )
    task = Reading(data=data, sets=("squad",), limit=1, passages=(1,), max_tokens=2)
    for one in (FULL, ANCHORED):
        for given in task.measure(FakeModels(), one, task.items()[0])["answers"].values():
            assert (given["f1"], given["exact_match"], given["contains"]) == (1, 1, 1)
            assert given["answer"] == said


def test_a_run_goes_on_with_more_questions_and_passages(data: Path, tmp_path: Path) -> None:
    measured: list[str] = []

    class Counted(Reading):
        def measure(self, models: Models, way: Way, item: Any) -> Record:
            measured.append(item.id)
            return super().measure(models, way, item)

    small = Counted(data=data, sets=("squad",), limit=1, passages=(1,), recalls=("off",), max_tokens=2)
    large = Counted(data=data, sets=("squad",), limit=2, passages=(1, 3), recalls=("off",), max_tokens=2)
    assert small.settings() == large.settings()
    models = FakeModels()
    for task in (small, large):
        rows = run([task], [FULL, ANCHORED], models, Store(tmp_path / "run", task.settings()))
    assert len(measured) == len([FULL, ANCHORED]) * 4
    assert [(row["passages"], row["policy"], row["n"]) for row in rows] == [
        (1, "full", 2), (1, "anchored", 2), (3, "full", 2), (3, "anchored", 2),
    ]
    assert rows[1]["difference"] == pytest.approx(rows[1]["f1"] - rows[0]["f1"])


def result(way: str, item: int, f1: float, *, recalled: bool = False, stated: bool = True) -> Record:
    given = {
        "f1": f1, "answer_loss": 2.0, "reduction": 4.0, "kept_cells": 10, "kv_bytes": 640, "recalled_cells": 3,
        "seconds": 0.1, "answer_recalled": recalled,
    }
    answers = {"off": given} if way == "full" else {"off": given, "on": {**given, "f1": f1 / 2}}
    return {"way": way, "item": f"squad/1/{item}", "answers": answers, "stated": stated}


def test_figures_are_paired_and_of_the_same_questions() -> None:
    records = [
        *(result("full", item, f1) for item, f1 in enumerate([0.5, 1.0, 0.3, 0.9])),
        *(result("anchored", item, f1, recalled=item == 1, stated=item > 0) for item, f1 in enumerate([0.5, 0.8, 0.4])),
        {"way": "anchored", "item": "squad/1/3", "error": "no cell is left"},
    ]
    (full, _), (off, mine), (on, _) = compared(records, [FULL, ANCHORED], "f1")
    assert [row["recall"] for row in (full, off, on)] == ["off", "off", "on"]
    assert full["n"] == off["n"] == len(mine) == 3  # the fourth question could not be answered by both
    assert full["f1"] == off["full_f1"] == pytest.approx(0.6)
    assert off["difference"] == pytest.approx((0 - 0.2 + 0.1) / 3)
    assert off["difference_stderr"] == pytest.approx(0.0882, abs=1e-4)
    assert off["verdict"] == "tie"
    assert off["share"] == pytest.approx(1.7 / 1.8)
    assert 0 < off["share_stderr"] < 0.3
    assert on["difference"] == pytest.approx(1.7 / 6 - 0.6)
    assert on["answer_recalled"] == 0.5  # of the two whose answer stands in the text
    assert (full["failed"], off["failed"]) == (0, 1)
    assert compared([], [FULL], "f1") == []


def test_the_yardstick_is_the_full_cache_of_the_same_weights() -> None:
    bare = way("base/default")
    assert [found.name for found in with_full([FULL, ANCHORED])] == ["full", "anchored"]
    found = with_full([FULL, bare])
    assert [(one.name, one.adapter) for one in found] == [("full", True), ("base/default", False), ("base", False)]
    assert modes(preset("full"), ("off", "on")) == ["off"]
    assert modes(POLICY.replace(recall="off", recall_cells=0), ("auto", "on")) == ["off"]
    assert modes(POLICY, ("on", "off", "on")) == ["on", "off"]


class StubRouge:
    """Stands in for the library: one shared word in all."""

    def __init__(self, names: Sequence[str], use_stemmer: bool) -> None:
        self.names = names

    def score(self, target: str, prediction: str) -> dict[str, Any]:
        return {name: SimpleNamespace(fmeasure=0.25) for name in self.names}


def test_meetings_are_cut_where_the_window_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("rouge_score.rouge_scorer")
    module.RougeScorer = StubRouge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rouge_score", ModuleType("rouge_score"))
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", module)
    rouge_scorer.cache_clear()
    text = "A: We talked about the mill. " * 40
    queries = [{"query": "What was it about?", "answer": "The mill."}, {"query": "Who?", "answer": "A."}]
    write(tmp_path / "long/qmsum.test.jsonl", [{"id": "m", "text": text, "queries": queries}])
    task = Reading(data=tmp_path, sets=("qmsum",), summary_tokens=10, recalls=("off",))
    assert {item.id for item in task.items()} == {"qmsum/1/m/0", "qmsum/1/m/1"}
    for window, cut in ((400, True), (4000, False)):
        record = task.measure(FakeModels(FakeEngine(window=window)), ANCHORED, task.items()[0])
        assert (record["truncated"], record["beyond_window"]) == (cut, False)
        assert record["answers"]["off"]["full_cells"] <= window
        assert record["answers"]["off"]["rougeL"] == 0.25
    (row,) = task.rows([{"way": "anchored", "item": "qmsum/1/m/0", **record}], [ANCHORED])
    assert (row["set"], row["rougeL"], row["rouge1"]) == ("qmsum", 0.25, 0.25)
    assert "f1" not in row
    assert "rougeL" in [name for _, name, _ in task.columns]
    rouge_scorer.cache_clear()


def test_summaries_without_the_library_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "long/qmsum.test.jsonl", [{"text": "A: So.", "queries": [{"query": "What?", "answer": "So."}]}])
    for name in ("rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    rouge_scorer.cache_clear()
    with pytest.raises(ConfigError, match=r"anchorkv\[eval\]"):
        Reading(data=tmp_path, sets=("qmsum",)).items()


def test_texts_beyond_the_window_are_marked(data: Path) -> None:
    task = Reading(data=data, sets=("squad",), limit=1, passages=(1, 6), recalls=("off",), max_tokens=4)
    models = FakeModels(FakeEngine(window=500))
    records = [
        {"way": "anchored", "item": item.id, **task.measure(models, ANCHORED, item)} for item in task.items()
    ]
    assert [row["beyond_window"] for row in task.rows(records, [ANCHORED])] == [False, True]


def test_a_users_own_questions(data: Path, tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.jsonl", [passage(town, 1) for town in TOWNS[:3]])
    task = Reading(files=(mine,), passages=(1, 2), limit=2)
    assert {item.id.rpartition("/")[0] for item in task.items()} == {"mine/1", "mine/2"}
    both = Reading(data=data, sets=("squad",), files=(mine,), passages=(1,), limit=2)
    assert {item.fields["set"] for item in both.items()} == {"squad", "mine"}
    bad = write(tmp_path / "bad.jsonl", [*("{" for _ in range(2)), passage("Oslo", 1)])
    task = Reading(files=(bad,), passages=(1,), skip_bad_rows=True)
    assert len(task.items()) == 1
    assert len(task.bad_rows) == 2
    assert task.items()
    assert len(task.bad_rows) == 2


@pytest.mark.parametrize("options", [
    {"passages": (0,)}, {"passages": ()}, {"recalls": ()}, {"limit": 0}, {"max_tokens": 0},
])
def test_options_that_fit_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Reading(**options)


def test_missing_and_colliding_data_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data"):
        Reading().items()
    with pytest.raises(DataError, match=r"no squad/drop\.test\.jsonl"):
        Reading(data=data, passages=(1,)).items()
    with pytest.raises(DataError, match="too few for 21"):
        Reading(data=data, sets=("squad",)).items()
    twin = write(tmp_path / "other/squad.jsonl", [passage("Oslo", 1)])
    with pytest.raises(ConfigError, match="name of the same set"):
        Reading(data=data, sets=("squad",), files=(twin,), passages=(1,)).items()
