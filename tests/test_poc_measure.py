"""Measuring a proof of concept: what comes first, that one reading gives what several would, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import tiny_gguf
from fake_engine import FakeEngine
from poc_run import POLICY, SECRET, FakeModels, plan, question, small_items, source

from anchorkv.config import preset
from anchorkv.document import Document
from anchorkv.evaluate.asking import ask
from anchorkv.evaluate.losses import answer_losses
from anchorkv.evaluate.run import Models
from anchorkv.poc import speed
from anchorkv.poc.answers import ANSWER_TOKENS, JAPANESE_TOKENS, agrees, auto_recalls, by_mode
from anchorkv.poc.measure import (
    BLOCK,
    Job,
    items,
    jobs,
    measured,
    settings,
    shown,
    typical,
    ways_of,
)
from anchorkv.recall import RecallPlan
from anchorkv.session import Session
from anchorkv.views.segments import states_of

WAYS = ways_of({"default": POLICY})


def read(policy: object = POLICY, text: str | None = None) -> Document:
    return Document.read(FakeEngine(), policy, text or source("manuals", 1).text)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    path = tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    with Models(str(path), engine="llama", threads=1) as found:
        yield found


# --- what is measured, in which order ------------------------------------------------------------------------------


def test_areas_take_turns_and_a_users_questions_are_all_asked() -> None:
    sources = [source("a", 1), source("a", 2), source("b", 3)]
    mine = [question(sources[0], own=True, text=f"{n}?") for n in range(3)]
    made = [question(sources[n], text=f"made {k}?") for n in (0, 1) for k in range(4)]
    found = items(sources, [*made, *mine], plan(questions_per_document=2))
    assert [item.id for item in found] == ["a/1.txt", "b/3.txt", "a/2.txt"]
    assert [q.text for q in found[0].questions] == ["0?", "1?", "2?"]
    assert [q.text for q in found[2].questions] == ["made 0?", "made 1?"]
    assert found[1].questions == ()


def test_every_area_has_its_first_document_on_every_way_before_anything_else() -> None:
    todo = jobs(small_items(plan()), ways_of({"default": POLICY, "half": POLICY.replace(reduction=3), "full": POLICY}))
    seen = [(job.task, job.way.name, job.item.id) for job in todo]
    assert seen == [job.key for job in todo]
    assert len(set(seen)) == len(seen)
    names = "full", "default", "half"
    first = [("document", way, f"{area}/0.txt") for area in ("manuals", "minutes") for way in names]
    assert seen[:6] == first
    assert [task for task, _, _ in seen[6:10]] == ["speed"] * 4
    assert {way for task, way, _ in seen if task == "speed"} == {"default", "half"}
    assert [task for task, _, _ in seen[10:]] == ["document"] * 6 + ["ground"] * 4  # both policies share their ground


def test_the_typical_document_is_the_median_one() -> None:
    found = items([source("a", n, sentences) for n, sentences in enumerate((30, 5, 12))], [], plan())
    assert typical(found, "a").id == "a/2.txt"


def test_what_a_run_follows_from() -> None:
    models, found = FakeModels(), small_items(plan())
    before = settings(plan(), found, WAYS, models)
    assert json.loads(json.dumps(before)) == before
    for other in (plan(recall_modes=("off",)), plan(max_tokens_document=99)):
        assert settings(other, found, WAYS, models) != before
    assert settings(plan(), found, ways_of({"default": POLICY.replace(sinks=9)}), models) != before
    assert settings(plan(), small_items(plan(questions_per_document=0)), WAYS, models) != before


# --- one reading ---------------------------------------------------------------------------------------------------


def test_one_reading_gives_the_losses_of_what_follows_its_opening(models: Models) -> None:
    text = source("manuals", 1).text
    item = items([source("manuals", 1)], [], plan())[0]
    for way in WAYS:
        record = measured(models, Job("document", way, item), plan())
        engine = models.of(way).engine
        with Session(engine, way.policy) as session, Document.read(engine, way.policy, text) as document:
            opening = len(document.ledger) - len(text)
            session.read(document.ledger.tokens[:opening].tolist(), [way.policy.pin_prompt] * opening)
            losses = answer_losses(session, engine.tokenizer.encode(text))
            kept = document.accounting()
        scored = losses[min(256, len(text) // 4) :]
        assert sum(count for _, count in record["blocks"]) == len(scored)
        assert sum(loss for loss, _ in record["blocks"]) == pytest.approx(float(scored.sum()), rel=1e-3)
        assert {count for _, count in record["blocks"][:-1]} == {BLOCK}
        assert (record["kept_cells"], record["full_cells"]) == (kept.kept_cells, kept.full_cells)
        assert record["curve"][-1] == [kept.full_cells, kept.kept_cells]
        assert json.loads(json.dumps(record)) == record


def test_full_and_anchored_differ_and_the_ground_is_its_own() -> None:
    models, item = FakeModels(), small_items(plan())[0]
    todo = [job for job in jobs([item], WAYS) if job.task != "speed"]
    full, mine, ground = (measured(models, job, plan()) for job in todo)
    assert full["curve"] == [[at, at] for at, _ in full["curve"]]
    assert mine["kept_cells"] < full["kept_cells"] / 2
    assert [count for _, count in full["blocks"]] == [count for _, count in ground["blocks"]]
    assert len({json.dumps(record["blocks"]) for record in (full, mine, ground)}) == 3
    assert "view" not in full
    assert {kind for _, kind in mine["view"]} <= {"whole", "anchor", "recalled", "dropped"}


def test_answers_are_those_of_the_evaluation() -> None:
    document, asked = read(), question(source("manuals", 1), lead="")
    with document:
        found = by_mode(document, asked, ("off", "auto", "on"))
        for mode, given in found.items():
            theirs = ask(document, asked.text, asked.answers, mode, 24, asked.lead)
            assert given["answer"] == theirs["answer"].partition("\n")[0]
            assert given["answer_loss"] == pytest.approx(theirs["answer_loss"], rel=1e-5)
            assert given["recalled_cells"] == theirs["recalled_cells"]
        before = document.accounting().kept_cells
    assert list(found) == ["off", "auto", "on"]
    assert SECRET in found["on"]["recalled"]
    assert found["on"]["kept_cells"] == before + found["on"]["recalled_cells"]
    assert found["off"]["kept_cells"] == before
    assert found["off"]["recalled"] == ""


def test_japanese_answers_have_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[int] = []
    monkeypatch.setattr("anchorkv.poc.answers.decode", lambda session, count, *_, **__: most.append(count) or [])
    with read() as document:
        for text in ("At what pressure?", "何バールで開きますか。"):
            by_mode(document, question(source("manuals", 1), text=text), ("off",))
    assert most == [ANSWER_TOKENS, JAPANESE_TOKENS] == [24, 48]


@pytest.mark.parametrize("query", [SECRET, "the a of", "zebra quantum", "pump", "Who asked why the pump ran?"])
def testauto_recalls_nothing_or_what_on_does(query: str) -> None:
    with read() as document:
        brought = {}
        for mode in ("auto", "on"):
            with document.session.fork() as session:
                session.config = session.config.replace(recall=mode)
                brought[mode] = RecallPlan(session).update(query)
        assert auto_recalls(document, query) == bool(brought["auto"])
        assert brought["auto"] in ([], brought["on"])


def test_a_pinned_span_of_another_document_is_no_failure() -> None:
    way = ways_of({"pins": POLICY.replace(pinned=("Lisbon", "nowhere at all"))})[1]
    record = measured(FakeModels(), Job("document", way, small_items(plan())[0]), plan())
    assert "Lisbon" in record["questions"][0]["kept"]


# --- what is shown -------------------------------------------------------------------------------------------------


def test_what_was_kept_of_a_passage() -> None:
    item = small_items(plan())[0]
    full, mine = (measured(FakeModels(), Job("document", way, item), plan()) for way in WAYS)
    assert full["questions"][0]["kept"] == SECRET
    kept = mine["questions"][0]["kept"]
    assert "…" in kept
    assert "……" not in kept
    rest = iter(SECRET)
    assert all(character in rest for character in kept.replace("…", ""))  # in order, nothing made up


def test_a_character_of_several_tokens_is_shown_once() -> None:
    with read(text="ポンプが止まった。" * 12) as document:
        ledger = document.ledger
        where = np.arange(len(ledger) - len("ポンプが止まった。".encode()) * 12, len(ledger))
        found = shown(ledger, document.session.engine.tokenizer, states_of(ledger), where.tolist())
    assert "".join(text for text, _ in found) == "ポンプが止まった。" * 12
    assert {kind for _, kind in found} == {"whole", "anchor", "dropped"}


@pytest.mark.parametrize(
    ("answer", "full", "same"),
    [
        ("9 hours", "It ran for 9 hours.", True), ("It ran for nine hours", "nine", True),
        ("on Monday at noon", "on Monday at dawn", True), ("Tuesday", "Monday", False), ("", "", True),
        ("", "Monday", False), ("14 hours", "4 hours", False), ("in 3 days from now", "in 4 days from now", False),
        ("9時間です", "9時間", True), ("8時間です", "9時間です", False),
        ("The answer is 4GB.", "The answer is 1GB.", False),
        ("the driver’s “blue” book", 'the driver\'s "blue" book', True),
    ],
)
def test_agreement(answer: str, full: str, same: bool) -> None:
    assert agrees(answer, full) is same
    assert agrees(full, answer) is same


def test_repeating_the_question_is_no_agreement() -> None:
    question = "Which label stands in log lines about staging?"
    full = "The label that stands in log lines about staging is STG."
    assert not agrees("The label in log lines about staging stands.", full, question)
    assert not agrees("The label that stands in log lines about staging is CELL.", full, question)
    assert agrees("STG", full, question)
    assert agrees("It is the STG label.", full, question)
    assert agrees("log lines", "Staging!", question)


# --- speed ---------------------------------------------------------------------------------------------------------


def test_speed_is_timed_in_turns_with_llama_cpp_at_its_best(models: Models) -> None:
    tokens = list((SECRET.encode() + b" ") * 30)[:1100]
    way = ways_of({"default": POLICY})[1]
    found = speed.measure(models, way, tokens, ["Where is Lisbon?", "And the valve?"], ("off", "on"))
    assert found["length"] == len(tokens)
    turns = {part: {side: len(spent) for side, spent in of.items()} for part, of in found["samples"].items()}
    assert turns["prefill"] == {"full": 3, "way": 3, "at": 3}
    for part in ("first_token", "decode"):
        assert set(turns[part]) == {"full", "off", "on"}
        assert len(set(turns[part].values())) == 1
        assert speed.LEAST_TURNS <= turns[part]["full"] <= speed.MOST_TURNS
    assert "cells, batch" in found["full_settings"]["decode"]
    assert all(seconds > 0 for of in found["samples"].values() for side in ("full",) for seconds in of[side])
    assert json.loads(json.dumps(found)) == found


def test_a_slow_machine_reads_less_in_turns_and_answers_after_all_of_it(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(speed.SECONDS, speed.PREFILL, 0.0)
    asked: list[tuple[str, int]] = []

    def ask(side: speed.Side, questions: object, turn: int) -> None:
        asked.append((side.label, side.accounting().full_cells))

    monkeypatch.setattr(speed, "_ask", ask)
    tokens = list((SECRET.encode() + b" ") * 60)[:1300]
    found = speed.measure(models, ways_of({"default": POLICY})[1], tokens, [], ("off",))
    assert found["length"] == 1300
    assert len(found["samples"]["prefill"]["full"]) == speed.LEAST_TURNS
    assert set(found["samples"]["prefill"]["at"]) == {0.0}  # one slice, again and again
    assert {length for _, length in asked} == {1300}
    assert len({label for label, _ in asked}) >= 2


def test_speed_of_any_engine_and_of_a_document_without_questions() -> None:
    way = ways_of({"default": POLICY})[1]
    item = items([source("manuals", 1)], [], plan())[0]
    record = measured(FakeModels(), Job("speed", way, item), plan())
    assert set(record["samples"]["first_token"]) == {"full", "off", "auto", "on"}
    short = items([source("manuals", 1, 0)], [], plan())[0]
    assert "too short to time" in measured(FakeModels(), Job("speed", way, short), plan())["error"]
    full = measured(FakeModels(), Job("speed", ways_of({"none": preset("full")})[1], item), plan())
    assert set(full["samples"]["decode"]) == {"full", "off"}  # nothing is dropped, so nothing to recall
