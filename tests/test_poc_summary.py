"""From records to the report: figures paired with the full cache, worst cases, and what redaction hides."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from poc_run import POLICY, SECRET, FakeModels, plan, run, small_items

from anchorkv.errors import DataError
from anchorkv.evaluate.run import Record
from anchorkv.evaluate.statistics import bootstrap, mean
from anchorkv.poc.capacity import CapacityInputs
from anchorkv.poc.figures import Found, way_results
from anchorkv.poc.measure import ways_of
from anchorkv.poc.results import PocReport, Remark, WayResult
from anchorkv.poc.summary import HIDDEN, redacted, report
from anchorkv.poc.worst import MOST, MOST_OF_AREA, SHOWN, worst

WAYS = ways_of({"default": POLICY})
CELL = 64


def answer(correct: bool, loss: float = 1.0, text: str = "4711 bar", recalled: int = 0, **changes: Any) -> Record:
    return {
        "answer": text if correct else "no idea", "correct": correct, "answer_loss": loss, "recalled_cells": recalled,
        "recalled": SECRET if recalled else "", "kept_cells": 100 + recalled, "peak_cells": 150 + recalled,
        "first_token_seconds": 0.1, "recalled_again": False, **changes,
    }


def record(
    way: str, item: str, losses: Sequence[float], answers: Sequence[dict[str, Record]] = (), *, kept: int = 100,
    task: str = "document", **changes: Any,
) -> Record:
    return {
        "task": task, "way": way, "item": item, "area": item.partition("/")[0], "seconds": 1.0, "tokens": 1000,
        "blocks": [[loss * 64, 64] for loss in losses], "curve": [[500, kept], [1000, kept]], "kept_cells": kept,
        "peak_cells": 120, "full_cells": 1000, "cell_bytes": CELL,
        "questions": [
            {"question": f"{n}?", "accepted": ["4711 bar"], "passage": SECRET, "kept": "… 4711 …", "answers": given}
            for n, given in enumerate(answers)
        ], **changes,
    }


def off(*given: Record) -> list[dict[str, Record]]:
    return [{"off": one} for one in given]


def results(records: Sequence[Record], ids: Sequence[str] = ("a/1", "a/2")) -> dict[tuple[str, str], WayResult]:
    return {(way.policy, way.recall): way for way in way_results(Found(records), ids, WAYS)}


# --- figures -------------------------------------------------------------------------------------------------------


def test_ratios_are_paired_by_document_and_block() -> None:
    full, mine = [1.0, 3.0, 2.0, 2.5], [1.1, 3.1, 2.1, 2.6]
    found = results([record("full", "a/1", full, kept=1000), record("default", "a/1", mine)], ["a/1"])
    way = found["default", "off"]
    assert way.perplexity.value == pytest.approx(math.exp(np.mean(mine)))
    assert way.perplexity.stderr > 1  # blocks differ
    assert way.perplexity_ratio.value == pytest.approx(math.exp(0.1))
    assert way.perplexity_ratio.stderr == pytest.approx(0, abs=1e-9)  # but not their differences
    assert found["full", "off"].perplexity_ratio.value == 1
    assert (way.reduction.value, way.reduction.stderr, way.reduction.n) == (10.0, None, 1)
    assert way.cells.end_bytes.value == 100 * CELL
    assert (way.context_recovered.value, found["full", "off"].context_recovered.value) == (None, 1.0)
    assert way.answering.correct.value is None


def test_context_recovered_needs_the_ground_of_the_same_documents() -> None:
    ground = record(WAYS[1].ground.name, "a/1", [math.log(40)] * 4, task="ground")
    found = results([
        record("full", "a/1", [math.log(20)] * 4), record("default", "a/1", [math.log(25)] * 4), ground,
        record("full", "a/2", [9.0]), record("default", "a/2", [5.0]),
    ])
    assert found["default", "off"].context_recovered.value == pytest.approx(0.75)


def test_answers_are_set_beside_the_full_caches_own() -> None:
    full = off(answer(True), answer(True, text="about 4711"), answer(False), answer(True))
    modes = [
        {"off": answer(False, 3.0), "on": answer(True, 2.0, recalled=60)},
        {"off": answer(True, 1.0), "on": answer(True)},
        {"off": answer(False, 2.0), "on": answer(False)}, {"off": answer(False), "on": answer(True)},
    ]
    found = results([record("full", "a/1", [1.0], full), record("default", "a/1", [1.0], modes)], ["a/1"])
    mild, strong = found["default", "off"].answering, found["default", "on"].answering
    assert (mild.correct.value, mild.correct.n) == (0.25, 4)
    assert mild.correct.stderr == pytest.approx(mean([0, 1, 0, 0]).stderr)
    assert mild.share_of_full.value == pytest.approx(1 / 3)
    assert mild.share_of_full.stderr > 0
    assert mild.answer_loss.value == 1.75
    assert mild.agreement.value == 0.5
    assert (strong.share_of_full.value, strong.agreement.value, strong.recalled_cells.value) == (1.0, 1.0, 15.0)
    assert found["full", "off"].answering.agreement.value == 1
    assert found["default", "on"].cells.end_cells.value == 115  # what is recalled for the mean question counts
    assert found["default", "on"].cells.peak_cells.value == 210
    assert found["default", "on"].reduction.value == pytest.approx(1000 / 115)


@pytest.mark.filterwarnings("error")
def test_an_error_that_no_draw_or_one_alone_tells_is_unknown() -> None:
    assert math.isnan(bootstrap(lambda drawn: math.nan, 5))
    assert math.isnan(bootstrap(lambda drawn: math.nan if set(drawn) != {0} else 2.0, 2, draws=1))
    assert bootstrap(lambda drawn: math.nan if 0 in drawn else float(drawn.mean()), 9) > 0


@pytest.mark.filterwarnings("error")
def test_where_the_full_cache_knows_nothing_no_share_is_known() -> None:
    found = results([
        record("full", "a/1", [1.0], off(answer(False))), record("default", "a/1", [1.0], off(answer(True)))
    ], ["a/1"])
    assert found["default", "off"].answering.share_of_full.value is None


def test_a_document_that_one_side_lacks_counts_on_neither() -> None:
    failed = {"task": "document", "way": "default", "item": "a/2", "error": "No room."}
    records = [record("full", "a/1", [1.0]), record("full", "a/2", [9.0]), record("default", "a/1", [1.0]), failed]
    found = results(records)
    assert found["default", "off"].perplexity_ratio.value == 1
    assert found["full", "off"].perplexity.value == pytest.approx(math.exp(5))
    (remark,) = Found(records).failed
    assert remark == Remark(
        text="a/2 (document, default): No room.", key="failed_document",
        values={"path": "a/2", "way": "default", "why": "No room."},
    )
    assert Found(records).measured(WAYS) == ["a/1"]


def test_speed_is_the_ratio_of_medians_and_seconds_of_the_first_token() -> None:
    samples = {
        "prefill": {"full": [0.02] * 3, "way": [0.01] * 3, "at": [0.0, 1.0, 2.0]},
        "decode": {"full": [0.04] * 4, "off": [0.02] * 4}, "first_token": {"full": [0.5] * 3, "off": [2.0] * 3},
    }
    timed = {"task": "speed", "way": "default", "item": "a/1", "length": 700, "samples": samples}
    found = results([record("full", "a/1", [1.0]), record("default", "a/1", [1.0]), timed], ["a/1"])
    mine, full = found["default", "off"].speed, found["full", "off"].speed
    assert (mine.prefill.value, mine.decode.value, mine.first_token.value) == pytest.approx((100, 50, 2))
    assert (mine.prefill_ratio.value, mine.decode_ratio.value, mine.first_token_ratio.value) == pytest.approx(
        (2, 2, 0.25)
    )
    assert (full.decode.value, full.decode_ratio.value, full.decode_ratio.stderr) == pytest.approx((25, 1, None))
    assert mine.length == 700
    untimed = results([record("full", "a/1", [1.0]), record("default", "a/1", [1.0])], ["a/1"])
    assert untimed["default", "off"].speed.decode.value is None


# --- worst cases ---------------------------------------------------------------------------------------------------


def test_right_answers_that_were_lost_come_first_then_what_costs_most() -> None:
    full = {"a/1": record("full", "a/1", [1.0], off(*[answer(True)] * 4))}
    given = [
        {"off": answer(True, 9.0), "on": answer(True, 1.0, recalled=60)},
        {"off": answer(False, 2.0), "on": answer(True, 1.0, recalled=60)},
        {"off": answer(True, 0.5), "on": answer(True)}, {"off": answer(True, 1.5), "on": answer(True)},
    ]
    found = worst(full, {"a/1": record("default", "a/1", [1.0], given)})
    assert [case.question for case in found] == ["1?", "0?", "3?"]  # the third one was never worse
    assert found[0].correct == {"full": True, "off": False, "on": True}
    assert (found[0].lost, found[0].kept, found[0].recalled) == (SECRET, "… 4711 …", SECRET)
    assert found[0].answers == {"off": "no idea", "on": "4711 bar"}


def test_of_a_passage_that_is_gone_nothing_is_shown() -> None:
    mine = record("default", "a/1", [1.0], off(answer(False), answer(False)))
    mine["questions"][0]["kept"] = "… …"
    found = worst({"a/1": record("full", "a/1", [1.0], off(*[answer(True)] * 2))}, {"a/1": mine})
    assert {case.question: case.kept for case in found} == {"0?": "", "1?": "… 4711 …"}


def test_no_area_has_all_the_worst_cases_and_long_passages_are_cut_around_the_answer() -> None:
    long = "word " * 400 + "4711 bar" + " word" * 400
    names = [f"{area}/{n}" for area in "abcd" for n in range(5)]
    full = {name: record("full", name, [1.0], off(answer(True))) for name in names}
    mine = {name: record("default", name, [1.0], off(answer(False))) for name in names}
    mine["a/0"]["questions"][0]["passage"] = long
    found = worst(full, mine)
    assert len(found) == MOST
    assert max(sum(case.area == area for case in found) for area in "abcd") == MOST_OF_AREA
    cut = next(case for case in found if case.document == "a/0").lost
    assert "4711 bar" in cut
    assert len(cut) < SHOWN + 20


# --- the report ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> PocReport:
    models, given = FakeModels(), plan(capacity=CapacityInputs(models=()))
    chosen = small_items(given)
    records = run(models, given, chosen, {"default": POLICY})
    for one in records:  # an engine without a model knows nothing: make the full cache the best
        loss = {"full": 1.0, "default": 1.1}.get(one["way"], 2.0)
        one["blocks"] = [[count * loss, count] for _, count in one["blocks"]]
        for asked in one.get("questions", ()):
            asked["answers"]["off"] |= {"correct": one["way"] == "full", "answer": f"the {one['way']} pump says 4711"}
    return report(given, chosen, records, WAYS, models, left_out=[Remark(text="Half of it.")], seconds=12.5)


def test_a_report_holds_every_area_and_document(made: PocReport) -> None:
    assert PocReport.from_json(made.to_json()).to_json() == made.to_json()
    assert [area.name for area in made.areas] == ["manuals", "minutes"]
    assert (made.overall.documents, made.overall.questions, made.overall.name) == (4, 4, "")
    assert made.overall.tokens == sum(area.tokens for area in made.areas)
    assert [(way.policy, way.recall) for way in made.overall.ways] == [
        ("full", "off"), ("default", "off"), ("default", "auto"), ("default", "on")
    ]
    assert all(way.context_recovered.value is not None for way in made.overall.ways)
    names = {f"{area}/{number}.txt" for area in ("manuals", "minutes") for number in (0, 10)}
    assert {document.id for document in made.documents} == names
    assert all(document.memory_curve[-1][1] == document.memory_curve[-1][0] for document in made.documents)
    assert [remark.text for remark in made.left_out] == ["Half of it."]
    assert not made.own_questions
    assert made.worst


def test_nothing_measured_says_why() -> None:
    given = plan(capacity=CapacityInputs(models=()))
    chosen = small_items(given)
    failed = {"task": "document", "way": "full", "item": chosen[0].id, "error": "No cell is left."}
    with pytest.raises(DataError, match=r"Nothing was measured: .*No cell is left"):
        report(given, chosen, [failed], WAYS, FakeModels())
    with pytest.raises(DataError, match="time was too short"):
        report(given, chosen, [], WAYS, FakeModels())


def test_a_model_that_nothing_is_known_of_loses_no_measurement() -> None:
    models, given = FakeModels(), plan(capacity=CapacityInputs(models=("Llama-3-8B", "./no/such/model")))
    chosen = small_items(given, "manuals", 1)
    found = report(given, chosen, run(models, given, chosen, {"default": POLICY}), WAYS, models)
    assert [row.model for row in found.capacity.rows] == ["Llama-3-8B"]
    (remark,) = found.left_out
    assert "no/such/model" in remark.text
    assert (remark.key, remark.values) == ("no_model", {"model": "./no/such/model", "why": remark.text})


def test_redaction_hides_every_text(made: PocReport) -> None:
    hidden = redacted(made)
    text = hidden.to_json()
    for word in ("valve", "4711", "Lisbon", "pump", "deck"):
        assert word in made.to_json()
        assert word not in text
    assert hidden.redacted
    assert {token.text for document in hidden.documents for token in document.view} == {HIDDEN}
    assert [[token.kind for token in document.view] for document in hidden.documents] == [
        [token.kind for token in document.view] for document in made.documents
    ]
    first = hidden.worst[0]
    assert first.expected.startswith("[8 characters, ")
    assert len({case.expected for case in hidden.worst}) == 1  # equal texts look equal
    assert redacted(made).worst[0].expected != first.expected  # and cannot be looked up
    assert json.loads(text)["overall"] == json.loads(made.to_json())["overall"]
