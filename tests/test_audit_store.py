"""The audit database, on SQLite and on PostgreSQL: what is stored, who sees it, what the database itself refuses."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from audit_postgres import Postgres
from audit_records import SECRET, START, record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from anchorkv.serve.audit.aging import retire_daily
from anchorkv.serve.audit.chain import Head
from anchorkv.serve.audit.database import database_url
from anchorkv.serve.audit.errors import AuditConflict, AuditError, AuditUnavailable
from anchorkv.serve.audit.export import COLUMNS, export
from anchorkv.serve.audit.models import Base
from anchorkv.serve.audit.record import EVERY_TENANT, digest
from anchorkv.serve.audit.retention import Retire, Retired
from anchorkv.serve.audit.store import AuditStore, Filter
from anchorkv.serve.audit.upgrade import VERSION_TABLE
from anchorkv.serve.background import Background

_numbers = count()
ALL = Filter(tenant=EVERY_TENANT)
WORKER = Path(__file__).with_name("audit_worker.py")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    cluster = Postgres()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "audit.db")
    cluster: Postgres = request.getfixturevalue("postgres")
    return cluster.schema(f"audit_{next(_numbers)}")


@pytest.fixture
def store(url: str) -> Iterator[AuditStore]:
    with AuditStore(url, keep_text=True) as opened:
        yield opened.open()


def fill(store: AuditStore, number: int = 6, tenant: str | None = None) -> None:
    for at in range(number):
        store.append(record(at, tenant=tenant or ("mill", "inn")[at % 2]))


def sql(url: str, *statements: str) -> None:
    """What somebody with a database client does."""
    engine = create_engine(database_url(url))
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def disarm(url: str) -> None:
    """Remove the triggers, as somebody may who owns the tables."""
    events = ("insert", "update", "delete")
    names = [f"{table}_{event}" for table in ("audit_records", "audit_head") for event in events]
    if url.startswith("postgresql"):
        sql(url, *(f"DROP FUNCTION {name}() CASCADE" for name in names))
    else:
        sql(url, *(f"DROP TRIGGER {name}" for name in names))


# --- what is stored --------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_given(store: AuditStore) -> None:
    receipt = store.append(record(1, fallback=[{"step": "recall", "reason": "low confidence"}]))
    entry = store.get("ask-1", tenant="mill")
    found = entry.as_dict()
    assert (receipt.sequence, receipt.hash) == (1, entry.hash)
    assert found["time"] == "2026-01-01T01:00:00.000+00:00"
    assert found["answer"] == f"{SECRET} indeed"
    assert found["segments"][1]["why"] == ["recalled for the question"]
    assert found["fallback"] == [{"step": "recall", "reason": "low confidence"}]
    assert (found["fallback_steps"], found["model"], found["policy"], found["key"]) == (1, "tiny", "default", "key-1")
    assert "salt" not in found
    assert store.verify([Head(receipt.sequence, receipt.hash)]).sound


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=st.text(st.characters(exclude_categories=()), max_size=40))
def test_any_text_survives_the_database(store: AuditStore, answer: str) -> None:
    number = next(_numbers)
    store.append(record(number, answer=answer))
    assert store.get(f"ask-{number}", tenant="mill").body()["answer"] == json.loads(json.dumps(answer))
    assert store.verify().sound


def test_without_the_operators_word_no_text_reaches_the_disk(url: str, tmp_path: Path) -> None:
    with AuditStore(url) as store:
        store.append(record(1))
        assert "Anna" not in (store.get("ask-1", tenant="mill").content or "")
    if "://" not in url:
        assert b"Anna" not in b"".join(path.read_bytes() for path in tmp_path.glob("audit.db*"))


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    with AuditStore(tmp_path / "new" / "audit.db") as store:
        store.append(record(1))
    assert stat.S_IMODE((tmp_path / "new" / "audit.db").stat().st_mode) == 0o600


def test_the_same_record_twice_is_stored_once_and_another_of_its_id_never(store: AuditStore) -> None:
    sealed = store.sealed(record(1))
    first, again = store.append_all([sealed]), store.append_all([sealed, store.sealed(record(2))])
    assert again[0] == first[0]
    assert store.head().sequence == 2
    with pytest.raises(AuditConflict, match="'ask-1'"):
        store.append_all([store.sealed(record(3)), store.sealed(record(1, answer="other"))])
    assert store.head().sequence == 2, "all of them or none"
    assert store.verify().sound


def test_order_is_the_sequence_whatever_the_clock_does(store: AuditStore) -> None:
    for number, jump in enumerate((0, 5000, -3000, 1)):
        store.append(record(number, time=START + timedelta(days=jump)))
    assert [entry.id for entry in store.entries(ALL)] == ["ask-0", "ask-1", "ask-2", "ask-3"]
    assert [entry.id for entry in store.query(ALL, limit=2)] == ["ask-3", "ask-2"]
    assert store.verify().sound


# --- who sees what ---------------------------------------------------------------------------------------------------


def test_a_tenant_sees_its_own_rows_alone(store: AuditStore) -> None:
    fill(store)
    mine = Filter(tenant="inn")
    assert {entry.tenant for entry in store.entries(mine)} == {"inn"}
    assert {entry.tenant for entry in store.query(mine, after=0)} == {"inn"}
    assert len(store.query(ALL)) == 6
    messages = set()
    for guessed in ("ask-0", "ask-99", "' OR 1=1 --", "%", ""):
        with pytest.raises(AuditError) as refused:
            store.get(guessed, tenant="inn")
        messages.add(str(refused.value).replace(guessed, "?") if guessed else "")
    assert messages - {""} == {"There is no audit record of the id '?'."}, "another's record looks like no record"


@pytest.mark.parametrize("name", ["inn' OR '1'='1", "%", "INN", "", "inn "])
def test_other_names_for_a_tenant_see_nothing(store: AuditStore, name: str) -> None:
    fill(store, 2)
    assert store.query(Filter(tenant=name)) == []


def test_filters(store: AuditStore) -> None:
    fill(store, 4, "mill")
    store.append(record(9, model="large", policy="mild", fallback=["full cache"], kind="alarm"))

    def ids(**fields: Any) -> list[str]:
        return [entry.id for entry in store.entries(Filter(tenant=EVERY_TENANT, **fields))]

    assert ids(since=START + timedelta(hours=1), until=START + timedelta(hours=3)) == ["ask-1", "ask-2"]
    assert ids(model="large") == ids(policy="mild") == ids(fallback=True) == ids(kind="alarm") == ["ask-9"]
    assert len(ids(fallback=False)) == 4
    assert [entry.id for entry in store.query(ALL, limit=2, before=3)] == ["ask-1", "ask-0"]
    with pytest.raises(AuditError, match="time zone"):
        ids(since=datetime(2026, 1, 1))


# --- append-only -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_records SET content = '{}' WHERE sequence = 2", "UPDATE audit_records SET content = NULL",
        "UPDATE audit_records SET tenant = 'inn'", "DELETE FROM audit_records WHERE sequence = 3",
        "DELETE FROM audit_records", "UPDATE audit_head SET sequence = 2", "DELETE FROM audit_head",
        "UPDATE audit_head SET origin = 'x'", "INSERT INTO audit_head SELECT 2, origin, hash, sequence FROM audit_head",
        "INSERT INTO audit_records SELECT sequence + 9, 'x', time, tenant, kind, model, policy, fallback, through, "
        "content, content_hash, previous, hash FROM audit_records WHERE sequence = 3",
        "INSERT INTO audit_records SELECT sequence + 1, 'x', time, tenant, kind, model, policy, fallback, through, "
        "content, content_hash, previous, hash FROM audit_records WHERE sequence = 3",
    ],
)
def test_the_database_itself_refuses_changes(store: AuditStore, url: str, statement: str) -> None:
    fill(store, 3)
    with pytest.raises(DBAPIError, match="audit"):
        sql(url, statement)
    assert store.verify().sound


def test_postgresql_refuses_to_truncate(postgres: Postgres) -> None:
    url = postgres.schema("truncated")
    with AuditStore(url) as store:
        fill(store, 2)
        with pytest.raises(DBAPIError, match="append-only"):
            sql(url, "TRUNCATE audit_records")


TAMPERING = {
    "content": ("UPDATE audit_records SET content = '{}' WHERE sequence = 2",),
    "tenant": ("UPDATE audit_records SET tenant = 'other' WHERE sequence = 2",),
    "model": ("UPDATE audit_records SET model = 'other' WHERE sequence = 2",),
    "time": ("UPDATE audit_records SET time = time + 1 WHERE sequence = 2",),
    "content gone": ("UPDATE audit_records SET content = NULL WHERE sequence = 2",),
    "oldest": ("DELETE FROM audit_records WHERE sequence = 1",),
    "middle": ("DELETE FROM audit_records WHERE sequence = 2",),
    "newest": ("DELETE FROM audit_records WHERE sequence = 3",),
    "all": ("DELETE FROM audit_records",),
    "head gone": ("DELETE FROM audit_head",),
    "head back": (
        "UPDATE audit_head SET sequence = 2, hash = (SELECT hash FROM audit_records WHERE sequence = 2)",
    ),
    "inserted": (
        "INSERT INTO audit_records SELECT 4, 'x', time, tenant, kind, model, policy, fallback, through, content, "
        "content_hash, hash, hash FROM audit_records WHERE sequence = 3",
    ),
    "swapped": (
        "UPDATE audit_records SET sequence = 9 WHERE sequence = 1",
        "UPDATE audit_records SET sequence = 1 WHERE sequence = 2",
        "UPDATE audit_records SET sequence = 2 WHERE sequence = 9",
    ),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_whoever_removes_the_triggers_is_seen(store: AuditStore, url: str, name: str) -> None:
    fill(store, 3)
    assert store.verify().sound
    disarm(url)
    sql(url, *TAMPERING[name])
    report = store.verify()
    assert not report.sound
    assert report.faults


def test_a_chain_cut_at_its_end_takes_no_more_records(store: AuditStore, url: str) -> None:
    fill(store, 3)
    names = ("audit_records_delete",)
    drop = "DROP FUNCTION {}() CASCADE" if "://" in url else "DROP TRIGGER {}"
    sql(url, *(drop.format(name) for name in names), "DELETE FROM audit_records WHERE sequence = 3")
    with pytest.raises(AuditUnavailable, match="damaged at its end"):
        store.append(record(7))


# --- retention -------------------------------------------------------------------------------------------------------


def test_retention_takes_content_away_and_the_chain_stays_sound(store: AuditStore, tmp_path: Path) -> None:
    fill(store)
    noted = store.head()
    retire = Retire(tenant=EVERY_TENANT, before=START + timedelta(hours=3), reason="90 days", by="op")
    dry = store.retain(Retire(**{**vars(retire), "dry_run": True}))
    assert (dry.through, dry.records) == (3, 3)
    assert not any(entry.retired for entry in store.entries(ALL))
    assert store.retain(retire) == dry
    entries = list(store.entries(ALL))
    assert [entry.retired for entry in entries] == [True] * 3 + [False] * 4
    assert entries[0].body() == {}
    assert entries[-1].body()["details"] == {"by": "op", "reason": "90 days", "records": 3}
    report = store.verify([noted])
    assert report.sound
    assert report.retired == 3
    assert store.retain(retire).records == 0
    store.append(record(50))
    assert store.verify().sound


def test_retention_comes_by_itself_and_lives_on_when_it_fails(
    store: AuditStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(store, 3)
    store.append(record(3, time=datetime.now(UTC)))
    retain, calls = store.retain, []

    def away_at_first(retire: Retire) -> Retired:
        calls.append(retire)
        if len(calls) == 1:
            raise AuditUnavailable("the database is away")
        return retain(retire)

    monkeypatch.setattr(store, "retain", away_at_first)

    async def server() -> None:
        task = Background(lambda: retire_daily(store, 30, every=0.01))
        task.start()
        while len(calls) < 3:
            await asyncio.sleep(0.01)
        await task.stop()

    asyncio.run(server())
    assert "the database is away" in caplog.text
    entries = list(store.entries(ALL))
    assert [entry.retired for entry in entries] == [True] * 3 + [False] * 2
    assert entries[-1].body()["details"] == {"by": "server", "reason": "older than 30 days", "records": 3}
    assert store.verify().sound


def test_retention_by_itself_takes_few_at_a_time(
    store: AuditStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fill(store, 7)
    store.append(record(7, time=datetime.now(UTC)))
    retain, taken = store.retain, []

    def noted(retire: Retire) -> Retired:
        done = retain(retire)
        taken.append(done.records)
        return done

    monkeypatch.setattr(store, "retain", noted)

    async def server() -> None:
        task = Background(lambda: retire_daily(store, 30, batch=3))
        task.start()
        while "7 records" not in caplog.text:
            await asyncio.sleep(0.01)
        await task.stop()

    asyncio.run(server())
    assert taken == [3, 3, 1]
    answers = [entry for entry in store.entries(ALL) if entry.kind == "answer"]
    assert [entry.retired for entry in answers] == [True] * 7 + [False]
    assert store.verify().sound


def test_a_task_that_fails_is_in_the_log_and_can_be_stopped(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise ValueError("a fault of its own")

    async def server() -> None:
        task = Background(broken)
        task.start()
        await asyncio.sleep(0)
        await task.stop()
        await task.stop()

    asyncio.run(server())
    assert "a fault of its own" in caplog.text


def test_a_list_needs_no_segments(store: AuditStore) -> None:
    store.append(record(1))
    (entry,) = store.entries(ALL)
    assert "segments" in entry.as_dict()
    brief = entry.brief()
    assert {"id", "time", "policy", "figures", "fallback_steps"} <= set(brief)
    assert brief["recalled_segments"] == len(entry.as_dict()["recalled"])
    assert not {"segments", "request", "answer", "policy_config", "salt"} & set(brief)


def test_what_was_retired_is_gone_from_the_disk(tmp_path: Path) -> None:
    with AuditStore(tmp_path / "audit.db", keep_text=True) as store:
        store.append(record(0, answer="unforgettable-1"))
        store.append(record(1))
        found = lambda: b"".join(p.read_bytes() for p in tmp_path.iterdir())  # noqa: E731
        assert b"unforgettable-1" in found()
        store.retain(Retire(tenant="mill", through=1))
        assert b"unforgettable-1" not in found()


def test_retention_of_one_tenant_leaves_the_others(store: AuditStore) -> None:
    fill(store)
    store.retain(Retire(tenant="inn", through=6))
    assert {entry.tenant for entry in store.entries(ALL) if entry.retired} == {"inn"}
    assert len([entry for entry in store.entries(ALL) if entry.retired]) == 3
    assert store.verify().sound


def test_clocks_that_jump_make_nothing_old_before_its_time(store: AuditStore) -> None:
    now = datetime.now(UTC)
    for number, time in enumerate((now, now - timedelta(days=9000), now)):
        store.append(record(number, time=time))
    assert store.retain(Retire(tenant=EVERY_TENANT, before=now - timedelta(days=1))).records == 0
    with pytest.raises(AuditError, match="that time is to come"):
        Retire(tenant=EVERY_TENANT, before=now + timedelta(days=3650))


def test_a_record_from_the_future_holds_retention_up_and_it_is_said(store: AuditStore) -> None:
    store.append(record(0))
    store.append(record(1, time=datetime.now(UTC) + timedelta(days=3650)))
    store.append(record(2))
    done = store.retain(Retire(tenant=EVERY_TENANT, before=datetime.now(UTC) - timedelta(hours=1)))
    assert (done.through, done.records) == (1, 1)
    assert "a clock ran ahead" in done.notes[0]
    assert store.retain(Retire(tenant=EVERY_TENANT, through=3)).records == 2
    assert store.verify().sound


def test_retention_of_everything_by_time_is_refused(store: AuditStore) -> None:
    fill(store, 2)
    with pytest.raises(AuditError, match="check the clock"):
        store.retain(Retire(tenant=EVERY_TENANT, before=datetime.now(UTC) - timedelta(seconds=1)))
    with pytest.raises(AuditError, match="one of the two"):
        Retire(tenant=EVERY_TENANT)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_the_tables_are_what_the_models_say(store: AuditStore, url: str) -> None:
    engine = create_engine(database_url(url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_a_newer_database_is_refused_in_a_sentence(store: AuditStore, url: str) -> None:
    sql(url, f"UPDATE {VERSION_TABLE} SET version_num = '0999'")
    for create in (True, False):
        with AuditStore(url, create=create) as other, pytest.raises(AuditError, match="upgrade anchorkv"):
            other.open()


def test_a_reader_makes_no_tables(url: str) -> None:
    with AuditStore(url, create=False) as reader, pytest.raises(AuditError, match=r"no audit (database|trail)"):
        reader.open()
    with AuditStore(url) as writer:
        writer.append(record(1))
    with AuditStore(url, create=False) as reader:
        assert reader.verify().sound


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("mysql://x/y", "SQLite or PostgreSQL"), ("sqlite://", "in a file"), ("sqlite:///:memory:", "in a file"),
        ("postgresql://u:hidden@host:port/name", "cannot be read"),
    ],
)
def test_a_bad_url_is_refused_without_its_password(bad: str, message: str) -> None:
    with pytest.raises(AuditError, match=message) as refused:
        AuditStore(bad)
    assert "hidden" not in str(refused.value)


def test_a_file_that_is_no_database_and_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database at all, " * 100)
    for bad in ("text.db", "text.db/audit.db"):
        with AuditStore(tmp_path / bad) as store, pytest.raises(AuditUnavailable):
            store.append(record(1))


# --- several processes -----------------------------------------------------------------------------------------------


def start_worker(url: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(WORKER.parent), str(WORKER.parents[1])])}
    command = [sys.executable, str(WORKER), url, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_two_processes_append_to_one_chain_that_both_of_them_opened(url: str) -> None:
    workers = [start_worker(url, name, 25) for name in ("left", "right")]
    assert [len((worker.communicate(timeout=120)[0]).split()) for worker in workers] == [25, 25]
    assert [worker.returncode for worker in workers] == [0, 0]
    with AuditStore(url) as store:
        report = store.verify()
        assert report.sound, report.faults
        assert report.records == 50
        for name in ("left", "right"):
            assert [entry.id for entry in store.entries(Filter(tenant=name))] == [f"{name}-{n}" for n in range(25)]


@pytest.mark.slow
@pytest.mark.parametrize("acknowledged", [1, 7, 20])
def test_killed_while_appending_nothing_acknowledged_is_lost(url: str, acknowledged: int) -> None:
    worker = start_worker(url, "killed", 10**6)
    ids = [worker.stdout.readline().strip() for _ in range(acknowledged)]  # type: ignore[union-attr]
    worker.kill()
    ids += worker.communicate(timeout=30)[0].split()
    with AuditStore(url, timeout=10) as store:
        stored = [entry.id for entry in store.entries(ALL)]
        assert stored[: len(ids)] == ids
        assert len(stored) - len(ids) <= 1, "at most the one that was under way"
        assert store.verify().sound
        store.append(record(1))
        assert store.verify().sound


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(store: AuditStore) -> AuditStore:
    store.append(record(0, answer='=cmd|" /C calc"!A0, "quoted"\nnext line', fallback=[{"step": "full"}]))
    store.append(record(1, answer="日本語 \ud800"))
    store.append(record(2, tenant="inn"))
    store.retain(Retire(tenant="inn", through=3))
    return store


def test_parquet_has_typed_columns(exported: AuditStore, tmp_path: Path) -> None:
    assert export(exported.entries(ALL), tmp_path / "out.parquet") == 4
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == list(COLUMNS)
    rows = table.to_pylist()
    assert rows[0]["time"] == START
    assert rows[0]["kept_cells"] == 40.0
    assert rows[0]["answer"].startswith("=cmd")
    assert rows[1]["answer"] == "日本語 \\ud800"
    assert json.loads(rows[0]["segments"])[0]["dropped"] == 20
    assert [row["retired"] for row in rows] == [False, False, True, False]
    assert rows[2]["answer"] is None
    assert [path.name for path in tmp_path.glob("*partial*")] == []


def test_csv_runs_no_formula_in_a_spreadsheet(exported: AuditStore, tmp_path: Path) -> None:
    assert export(exported.entries(ALL), tmp_path / "out.csv") == 4
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text(encoding="utf-8-sig"), newline="")))
    assert list(rows[0]) == list(COLUMNS)
    assert rows[0]["answer"] == "'=cmd|\" /C calc\"!A0, \"quoted\"\nnext line"
    assert rows[0]["time"] == "2026-01-01T00:00:00.000000+00:00"
    assert [row["tenant"] for row in rows] == ["mill", "mill", "inn", "inn"]


def test_json_lines_hold_what_the_chain_needs(exported: AuditStore, tmp_path: Path) -> None:
    assert export(exported.entries(Filter(tenant="mill")), tmp_path / "out", "jsonl") == 2
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert digest(rows[0]["content"]) == rows[0]["content_hash"]
    assert rows[1]["previous"] == rows[0]["hash"]
    assert rows[1]["answer"] == "日本語 \ud800"


def test_export_of_nothing_and_to_nowhere(store: AuditStore, tmp_path: Path) -> None:
    form: Callable[[str], Path] = lambda kind: tmp_path / f"empty.{kind}"  # noqa: E731
    assert [export([], form(kind)) for kind in ("csv", "jsonl", "parquet")] == [0, 0, 0]
    assert pyarrow.parquet.read_table(form("parquet")).num_rows == 0
    with pytest.raises(AuditError, match="csv, jsonl, parquet"):
        export([], tmp_path / "x.xlsx")
    with pytest.raises(AuditError, match="cannot be written"):
        export([], tmp_path / "no" / "x.csv")
