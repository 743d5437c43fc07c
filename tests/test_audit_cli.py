"""`anchorkv audit`: what it prints, what it refuses, and that a recorded request gives the same answer again."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from audit_records import SECRET, record
from command import Command
from fake_engine import FakeEngine

import anchorkv.models
from anchorkv.config import preset
from anchorkv.extract import extract
from anchorkv.sampling import Sampling
from anchorkv.serve.audit.store import AuditStore
from anchorkv.serve.recording import record_of
from anchorkv.serve.requests import Ask, Message
from anchorkv.serve.scheduler import Scheduler

call = Command("audit", COLUMNS="200")
refused = call.refused
DOCUMENT = "The engineer of the bridge is Ada Miller. She built 12 bridges in 1902. The river is called Sten. " * 8


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "audit.db"


@pytest.fixture
def store(database: Path) -> Iterator[AuditStore]:
    with AuditStore(database, keep_text=True) as opened:
        opened.append(record(0, answer="[red]not markup[/red] \x1b[31mred"))
        opened.append(record(1, fallback=[{"step": "recall", "reason": "low confidence"}]))
        opened.append(record(2, tenant="inn", model="large"))
        yield opened


def as_json(*arguments: object, code: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", code=code).stdout)


# --- verify, head ----------------------------------------------------------------------------------------------------


def test_verify_and_head(store: AuditStore, database: Path) -> None:
    head = call("head", "-d", database).stdout.strip()
    assert head == str(store.head())
    assert "Sound: 3 records" in call("verify", "-d", database, "--head", head).stdout
    assert as_json("verify", "-d", database)["sound"] is True
    assert as_json("head", "-d", database)["sequence"] == 3
    assert "is no head" in refused("verify", "-d", database, "--head", "3:xyz")


def test_damage_is_exit_code_1_and_says_where(store: AuditStore, database: Path) -> None:
    with sqlite3.connect(database) as client:
        client.execute("DROP TRIGGER audit_records_update")
        client.execute("UPDATE audit_records SET content = '{}' WHERE sequence = 2")
    assert "record 2: its content was changed" in call("verify", "-d", database, code=1).stdout
    assert as_json("verify", "-d", database, code=1)["faults"] == [{"sequence": 2, "what": "its content was changed"}]


def test_a_noted_head_that_is_gone_is_exit_code_1(store: AuditStore, database: Path) -> None:
    assert "cut off" in call("verify", "-d", database, "--head", f"9:{'a' * 64}", code=1).stdout


# --- list, show ------------------------------------------------------------------------------------------------------


def test_list_and_its_filters(store: AuditStore, database: Path) -> None:
    def listed(*options: str) -> list[str]:
        return [entry["id"] for entry in as_json("list", "-d", database, *options)["records"]]

    assert listed() == ["ask-2", "ask-1", "ask-0"]
    assert listed("--tenant", "mill", "--no-fallback") == ["ask-0"]
    assert listed("--fallback") == ["ask-1"]
    assert listed("--model", "large") == ["ask-2"]
    assert listed("--since", "2026-01-01T01:00", "--until", "2026-01-01T02:00Z") == ["ask-1"]
    assert listed("--since", "1d", "--policy", "other") == []
    assert listed("--before-record", "3", "-n", "1") == ["ask-1"]
    shown = call("list", "-d", database, "-n", 3)
    assert "2026-01-01 01:00:00" in shown.stdout
    assert "--before-record 1" in shown.stderr
    assert "is no time" in refused("list", "-d", database, "--since", "yesterday")
    assert "is no time" in refused("list", "-d", database, "--since", f"{10**12}d")


def test_show_gives_all_and_nobody_steers_the_terminal(store: AuditStore, database: Path) -> None:
    shown = call("show", "ask-1", "-d", database).stdout
    for part in (SECRET, "low confidence", "recalled for the question", "fake-1", "kept_cells"):
        assert part in shown
    hostile = call("show", "ask-0", "-d", database).stdout
    assert "[red]not markup[/red]" in hostile
    assert "\x1b" not in hostile
    assert as_json("show", "ask-1", "-d", database)["answer"] == f"{SECRET} indeed"
    assert "no audit record" in refused("show", "ask-1", "-d", database, "--tenant", "inn")


# --- export, retain --------------------------------------------------------------------------------------------------


def test_export(store: AuditStore, database: Path, tmp_path: Path) -> None:
    result = call("export", tmp_path / "out.parquet", "-d", database)
    assert "Wrote 3 records" in result.stderr
    assert (tmp_path / "out.parquet").read_bytes()[:4] == b"PAR1"
    lines = call("export", "-", "--format", "jsonl", "-d", database, "--tenant", "inn").stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["ask-2"]
    assert "csv, jsonl, parquet" in refused("export", tmp_path / "x.xlsx", "-d", database)


def test_retain(store: AuditStore, database: Path) -> None:
    assert as_json("retain", "--through", 2, "--dry-run", "-d", database) == {
        "tenant": "*", "through": 2, "records": 2, "notes": [], "dry_run": True,
    }
    assert "add --yes" in refused("retain", "--through", 2, "-d", database)
    assert not store.get("ask-0", tenant="mill").retired
    assert "Retired 2, up to" in call("retain", "--through", 2, "--yes", "-d", database, "--reason", "old").stdout
    assert store.get("ask-0", tenant="mill").retired
    assert "retired" in call("show", "ask-0", "-d", database).stdout
    assert as_json("verify", "-d", database)["retired"] == 2
    assert "one of the two" in refused("retain", "-d", database)
    assert "--through 3" in refused("retain", "--older-than", "0m", "--yes", "-d", database)


# --- mistakes --------------------------------------------------------------------------------------------------------


COMMANDS = ("verify", "head", "list", "show x", "export out.csv", "replay x", "retain --through 1")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_database_that_is_not_there_is_a_sentence(command: str, tmp_path: Path) -> None:
    assert "There is no audit database" in refused(*command.split(), "-d", tmp_path / "no.db")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("hello " * 500)
    assert "not a database" in refused("verify", "-d", tmp_path / "x.db")


def test_another_programs_database_is_a_sentence(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "x.db") as client:
        client.execute("CREATE TABLE t (x)")
    assert "holds no audit trail" in refused("list", "-d", tmp_path / "x.db")


# --- replay ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(anchorkv.shipped, "FOLDER", tmp_path / "nothing shipped")
    monkeypatch.setattr(anchorkv.models, "_engine", lambda *_: fake)
    return fake


def answered(engine: FakeEngine, store: AuditStore, id: str, document: str | None = None, **fields: Any) -> None:
    """Let a scheduler answer, as the server does, and record it."""
    policy = preset("default").replace(scorer="frequency", recall="on")
    scheduler = Scheduler(engine, cells=8192)
    scheduler.start()
    try:
        number = scheduler.add_document("mill", document, policy, "bridge").result(20).id if document else None
        ask = Ask(
            id=id, tenant="mill", policy=policy, document=number, max_tokens=24, stop=("zz",),
            sampling=Sampling(temperature=0.8, seed=5),
            messages=(Message("system", DOCUMENT[:200]), Message("user", "Who built it?")), **fields,
        )
        outcome = scheduler.submit(ask).result(20)
    finally:
        scheduler.stop(drain=False)
    assert outcome.finish in ("stop", "length"), outcome.error
    found = record_of(
        ask, outcome, engine.info, policy="default", document_title="bridge", document_text=document, key="key-1"
    )
    store.append(found)
    assert found.figures["kept_cells"] > 0
    segments = [asdict(segment) for segment in found.segments]
    segments[0]["anchor_positions"] = (1, 2, 3)
    store.append(replace(
        found, id=f"{id}-forged", answer="something else", answer_tokens=(1, 2), segments=segments,
    ))
    older = [{name: it for name, it in segment.items() if name != "anchor_positions"} for segment in segments]
    store.append(replace(found, id=f"{id}-older", segments=older))


def test_a_request_run_again_gives_the_same_answer(engine: FakeEngine, store: AuditStore, database: Path) -> None:
    answered(engine, store, "chat")
    result = as_json("replay", "chat", "-d", database)
    assert result["same"] is True
    names = {item["name"] for item in result["comparisons"]}
    assert {"model_fingerprint", "policy.reduction", "answer", "answer_tokens", "segments", "kept_cells"} <= names
    assert "The same answer" in call("replay", "chat", "-d", database).stdout
    # A record of a time before anchors' positions were kept is compared by what it says.
    assert as_json("replay", "chat-older", "-d", database)["same"] is True


def test_a_difference_is_shown_and_is_exit_code_1(engine: FakeEngine, store: AuditStore, database: Path) -> None:
    answered(engine, store, "chat")
    engine.info = replace(engine.info, fingerprint="fake-2")
    found = as_json("replay", "chat-forged", "-d", database, code=1)
    assert [item["name"] for item in found["comparisons"] if not item["same"]] == [
        "model_fingerprint", "answer", "answer_tokens", "segment 0",
    ]
    assert "4 of" in call("replay", "chat-forged", "-d", database, code=1).stdout


def test_a_request_about_a_document_needs_that_document(
    engine: FakeEngine, store: AuditStore, database: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bridge.txt"
    path.write_text(DOCUMENT.strip())
    answered(engine, store, "about", document=path.read_text())
    answered(engine, store, "extracted", document=extract(path))
    for id in ("about", "extracted"):
        assert as_json("replay", id, "-d", database, "--document", path)["same"] is True
    assert "give its file with --document" in refused("replay", "about", "-d", database)
    path.write_text(DOCUMENT + "And more.")
    assert "is not the document 'bridge'" in refused("replay", "about", "-d", database, "--document", path)


def test_what_cannot_be_run_again_is_said_before_a_model_is_loaded(
    store: AuditStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchorkv.models, "_engine", lambda *_: pytest.fail("a model was loaded"))
    with AuditStore(database) as textless:
        textless.append(record(5))
        textless.append(record(6, kind="alarm"))
    assert "hashes and no text" in refused("replay", "ask-5", "-d", database)
    assert "only an answer" in refused("replay", "ask-6", "-d", database)
    call("retain", "--through", 1, "--yes", "-d", database)
    assert "was retired" in refused("replay", "ask-0", "-d", database)


def test_a_request_of_another_server_is_a_sentence(engine: FakeEngine, store: AuditStore, database: Path) -> None:
    for number, request in enumerate(({"messages": [{"rolle": "user"}]}, {"text": 5}, {"text": "x", "stop": [1]})):
        store.append(record(10 + number, request=request))
        assert "request" in refused("replay", f"ask-{10 + number}", "-d", database)
