"""Documents: read once, asked often, there again after a restart; damage, a kill and a full disk lose nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine

from anchorkv.config import AnchorConfig, preset
from anchorkv.document import Document
from anchorkv.errors import ConfigError, DocumentError, SavedStateError
from anchorkv.serve.documents import Documents
from anchorkv.serve.requests import Ask, DocumentFacts, Message, NotFound, Outcome
from anchorkv.serve.scheduler import Scheduler

POLICY = AnchorConfig(reduction=4, max_segment=24, recall="on", recall_cells=64, scorer="frequency")
TEXT = "The mill stood by the river. It had two wheels; one was broken. Anna Weber bought it in 1911 for 9 crowns. " * 5
QUESTION = "Who bought the mill?"


def room(folder: Path | None, cells: int = 10_000, engine: Any = None) -> Scheduler:
    engine = engine or FakeEngine()
    return Scheduler(engine, cells, documents=Documents(engine, folder))


def rounds(scheduler: Scheduler, ended: Any) -> None:
    for _ in range(10_000):
        if ended():
            return
        scheduler.round()
        time.sleep(0)
    raise AssertionError("it never ended")


def upload(scheduler: Scheduler, text: str = TEXT, tenant: str = "a", policy: AnchorConfig = POLICY) -> DocumentFacts:
    done = scheduler.add_document(tenant, text, policy, "a title")
    rounds(scheduler, scheduler._rounds.idle)
    return done.result(30)


def asked(
    scheduler: Scheduler, document: str, *said: str, tenant: str = "a", policy: AnchorConfig = POLICY, **options: Any
) -> Outcome:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(said or (QUESTION,)))
    handle = scheduler.submit(Ask(
        tenant=tenant, policy=policy, messages=messages, document=document, max_tokens=20, **options,
    ))
    rounds(scheduler, lambda: handle.ended)
    return handle.done()


def test_a_document_answers_as_document_py_does(tmp_path: Path) -> None:
    scheduler = room(tmp_path)
    facts = upload(scheduler)
    with Document.read(scheduler.engine, POLICY, TEXT) as document:
        expected = document.ask(QUESTION, max_tokens=20)
        assert facts.kept_cells == document.accounting().kept_cells
    for _ in range(2):
        outcome = asked(scheduler, facts.id)
        assert outcome.text.strip() == expected.text
        assert [part.number for part in outcome.recalled] == list(dict.fromkeys(expected.recalled))
        assert outcome.cached_tokens == facts.tokens
    first = asked(scheduler, facts.id, policy=POLICY.replace(recall="off"))
    longer = asked(scheduler, facts.id, QUESTION, first.text, "And when?", policy=POLICY.replace(recall="off"))
    assert longer.cached_tokens >= first.prompt_tokens + first.completion_tokens


def test_the_same_text_may_be_uploaded_twice(tmp_path: Path) -> None:
    """All of the second one has been read when it comes; it is a document of its own nevertheless."""
    scheduler = room(tmp_path)
    first, second = upload(scheduler), upload(scheduler)
    assert second.id != first.id
    assert (second.tokens, second.kept_cells) == (first.tokens, first.kept_cells)
    scheduler.delete_document("a", first.id)
    assert asked(scheduler, second.id).text == asked(scheduler, second.id).text != ""
    assert [facts.id for facts in scheduler.list_documents("a")] == [second.id]


def test_a_document_is_there_after_a_restart(tmp_path: Path) -> None:
    scheduler = room(tmp_path)
    facts = upload(scheduler)
    before = asked(scheduler, facts.id)
    scheduler.stop()
    again = room(tmp_path)
    assert again.list_documents("a") == [facts]
    outcome = asked(again, facts.id)
    assert outcome.cached_tokens == facts.tokens
    assert (outcome.tokens, outcome.segments) == (before.tokens, before.segments)
    assert again.get_document("a", facts.id).resident
    assert again.documents.text("a", facts.id) == TEXT


def test_another_policy_or_model_reads_the_text_again(tmp_path: Path) -> None:
    scheduler = room(tmp_path)
    facts = upload(scheduler)
    full = asked(scheduler, facts.id, policy=preset("full"))
    assert full.cached_tokens == 0
    assert full.kept_cells == full.full_cells
    assert asked(scheduler, facts.id, policy=preset("full")).cached_tokens == facts.tokens
    engine = FakeEngine()
    engine.info = engine.info.__class__(**{**engine.info.__dict__, "fingerprint": "fake-2"})
    other = room(tmp_path, engine=engine)
    assert asked(other, facts.id).cached_tokens == 0
    other.stop()
    assert len(list(tmp_path.glob("*/*.anchors"))) == 2
    assert not list(tmp_path.glob("*/*.damaged"))
    assert asked(room(tmp_path, engine=engine), facts.id).cached_tokens == facts.tokens


def test_tenants_do_not_reach_each_others_documents(tmp_path: Path) -> None:
    scheduler = room(tmp_path)
    facts = upload(scheduler, tenant="../a")
    assert upload(scheduler, tenant="b").id != facts.id
    assert scheduler.list_documents("c") == []
    for act in (scheduler.get_document, scheduler.delete_document, scheduler.documents.text):
        with pytest.raises(NotFound):
            act("b", facts.id)
    with pytest.raises(NotFound):
        asked(scheduler, facts.id, tenant="b")
    for wrong in ("", "../" + facts.id, facts.id[:-1], "x" * 10_000):
        with pytest.raises(NotFound):
            asked(scheduler, wrong, tenant="../a")
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert sorted(path.parent for path in tmp_path.rglob("*.json")) == sorted(folders)


def test_a_deleted_document_leaves_nothing(tmp_path: Path) -> None:
    scheduler = room(tmp_path)
    facts = upload(scheduler)
    asked(scheduler, facts.id)
    scheduler.delete_document("a", facts.id)
    scheduler.round()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not scheduler._room.prefixes.parked
    with pytest.raises(NotFound):
        asked(scheduler, facts.id)


@pytest.mark.parametrize("harm", [
    lambda data: data[: len(data) // 2], lambda data: data[:-40] + b"\xff" * 40, lambda data: b"",
    lambda data: b"{}" * 99,
])
def test_damaged_anchors_are_reported_set_aside_and_made_again(
    tmp_path: Path, harm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = room(tmp_path)
    facts = upload(scheduler)
    before = asked(scheduler, facts.id)
    scheduler.stop()
    (path,) = tmp_path.glob("*/*.anchors")
    path.write_bytes(harm(path.read_bytes()))
    scheduler = room(tmp_path)
    with caplog.at_level(logging.ERROR, "anchorkv.serve"):
        outcome = asked(scheduler, facts.id)
    assert facts.id in caplog.text
    assert outcome.tokens == before.tokens
    assert outcome.cached_tokens == 0
    scheduler.stop()
    assert path.with_suffix(".damaged").is_file()
    assert scheduler.get_document("a", facts.id).damage
    assert asked(room(tmp_path), facts.id).cached_tokens == facts.tokens


def test_a_damaged_record_is_set_aside_and_the_others_are_served(tmp_path: Path) -> None:
    scheduler = room(tmp_path)
    first, second = upload(scheduler), upload(scheduler, "Another text. " + TEXT)
    scheduler.stop()
    path = next(tmp_path.glob(f"*/{first.id}.json"))
    path.write_bytes(path.read_bytes()[:-30])
    again = room(tmp_path)
    assert again.list_documents("a") == [second]
    assert path.with_suffix(".json.damaged").is_file()


def test_a_full_disk_refuses_the_document_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = room(tmp_path)
    kept = upload(scheduler)
    for place in ("fsync", "replace"):
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, place, full)
            with pytest.raises(SavedStateError, match="No space left"):
                upload(scheduler, "More. " + TEXT)
        scheduler.round()
        assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
        assert scheduler.list_documents("a")[0].id == kept.id
    assert asked(scheduler, kept.id).finish in ("stop", "length")


def test_memory_is_bounded_and_evicted_documents_come_back(tmp_path: Path) -> None:
    scheduler = room(tmp_path, cells=900)
    documents = [upload(scheduler, f"Number {i}. {TEXT}") for i in range(6)]
    assert scheduler._room.used([]) <= 900
    assert 0 < sum(facts.resident for facts in scheduler.list_documents("a")) < 6
    for facts in documents:
        assert asked(scheduler, facts.id).cached_tokens == facts.tokens
        assert scheduler._room.used([]) <= 900


def test_without_a_folder_documents_live_in_memory() -> None:
    scheduler = room(None)
    facts = upload(scheduler)
    scheduler._room.prefixes.clear()
    assert asked(scheduler, facts.id).cached_tokens == 0
    assert asked(scheduler, facts.id).cached_tokens == facts.tokens


def test_bad_documents_are_refused(tmp_path: Path) -> None:
    scheduler = room(tmp_path)
    with pytest.raises(DocumentError, match="no text"):
        scheduler.add_document("a", " \n", POLICY)
    with pytest.raises(ConfigError, match="does not occur"):
        scheduler.add_document("a", TEXT, POLICY.replace(pinned=("Bertha",)))
    (tmp_path / "file").write_text("")
    with pytest.raises(SavedStateError, match="cannot be used"):
        Documents(FakeEngine(), tmp_path / "file")


def test_a_cancelled_upload_leaves_nothing(tmp_path: Path) -> None:
    scheduler = room(tmp_path)
    done = scheduler.add_document("a", TEXT * 5, POLICY)
    scheduler.round()
    assert done.cancel()
    rounds(scheduler, scheduler._rounds.idle)
    scheduler.stop()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


KILLED = """
    import sys, os
    sys.path[:0] = {paths!r}
    from test_serve_documents import *
    scheduler = room(Path({folder!r}))
    scheduler.start()
    for i in range(10_000):
        facts = scheduler.add_document("a", f"Number {{i}}. " + TEXT, POLICY).result(60)
        print(facts.id, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.011, 0.023])
def test_a_killed_server_keeps_every_document_it_acknowledged(tmp_path: Path, delay: float) -> None:
    here = Path(__file__).parent
    code = textwrap.dedent(KILLED).format(paths=[str(here), str(here.parent)], folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline().strip() for _ in range(3)]
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        seen += [line.strip() for line in process.stdout if line.endswith("\n")]
    scheduler = room(tmp_path)
    found = [facts.id for facts in scheduler.list_documents("a")]
    assert set(seen) <= set(found)
    assert len(found) <= len(seen) + 1
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".writing", ".partial", ".damaged")]
    for number in found[-2:]:
        assert asked(scheduler, number).cached_tokens > 0


def test_a_record_says_who_and_how(tmp_path: Path) -> None:
    scheduler = room(tmp_path)
    facts = upload(scheduler)
    assert json.loads(json.dumps(facts.as_dict()))["policy"]["reduction"] == 4
    assert facts.file_bytes == next(tmp_path.glob("*/*.anchors")).stat().st_size
    assert facts.kv_bytes == facts.kept_cells * scheduler.engine.info.cell_bytes
