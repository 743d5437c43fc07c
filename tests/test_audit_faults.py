"""The audit trail when things break: the database away or hanging, the disk full, a process killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from audit_postgres import Postgres
from audit_records import record
from waiting import wait_for

from anchorkv.serve.audit.errors import AuditError, AuditUnavailable
from anchorkv.serve.audit.record import EVERY_TENANT
from anchorkv.serve.audit.spool import Spool
from anchorkv.serve.audit.store import AuditStore, Filter, Receipt
from anchorkv.serve.audit.trail import AuditTrail, Spooled

_numbers = count()
ALL = Filter(tenant=EVERY_TENANT)
WORKER = Path(__file__).with_name("audit_worker.py")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Postgres]:
    found = Postgres()
    try:
        found.start()
        yield found
    finally:
        found.remove()


@pytest.fixture
def postgres(cluster: Postgres) -> Iterator[Postgres]:
    """Running, and running again for the next test."""
    yield cluster
    if not (cluster.data / "postmaster.pid").exists():
        cluster.start()


def ids(store: AuditStore) -> list[str]:
    return [entry.id for entry in store.entries(ALL)]


def spool_three(store: AuditStore, path: Path) -> list[bytes]:
    """Three records wait at `path`; its lines."""
    with Spool(path) as spool:
        for number in range(3):
            spool.append(store.sealed(record(number)))
    return path.read_bytes().splitlines(keepends=True)


def damage_the_second(lines: list[bytes]) -> bytes:
    return lines[0] + lines[1].replace(b"tiny", b"evil") + lines[2]


# --- the database is away --------------------------------------------------------------------------------------------


def test_records_wait_in_the_spool_while_the_database_is_away_and_follow_in_order(
    postgres: Postgres, tmp_path: Path
) -> None:
    store = AuditStore(postgres.schema(f"away_{next(_numbers)}"), timeout=2)
    with AuditTrail(store, Spool(tmp_path / "spool"), retry_seconds=0.1) as trail:
        assert isinstance(trail.append(record(0)), Receipt)
        postgres.stop()
        assert isinstance(trail.append(record(1)), Spooled)
        started = time.monotonic()
        for number in range(2, 9):
            assert isinstance(trail.append(record(number)), Spooled)
        assert time.monotonic() - started < 2, "nobody waits for a database that is known to be away"
        assert trail.waiting == 8
        assert "cannot be used" in trail.trouble
        postgres.start()
        wait_for(lambda: not trail.waiting)
        assert isinstance(trail.append(record(9)), Receipt)
        assert ids(store) == [f"ask-{number}" for number in range(10)]
        assert store.verify().sound
        assert trail.trouble == ""
    assert (tmp_path / "spool").stat().st_size == 0


def test_without_a_spool_a_database_that_is_away_is_said_in_a_sentence(postgres: Postgres) -> None:
    with AuditStore(postgres.schema(f"away_{next(_numbers)}"), timeout=1) as store, AuditTrail(store) as trail:
        trail.append(record(0))
        postgres.stop()
        with pytest.raises(AuditUnavailable) as refused:
            trail.append(record(1))
        assert "\n" not in str(refused.value)
        postgres.start()
        trail.append(record(2))
        assert ids(store) == ["ask-0", "ask-2"]


def test_a_database_that_hangs_is_given_up_after_the_timeout(postgres: Postgres, tmp_path: Path) -> None:
    store = AuditStore(postgres.schema(f"hangs_{next(_numbers)}"), timeout=1)
    with AuditTrail(store, Spool(tmp_path / "spool"), retry_seconds=0.1) as trail:
        trail.append(record(0))
        postgres.freeze()
        try:
            started = time.monotonic()
            assert isinstance(trail.append(record(1)), Spooled)
            assert time.monotonic() - started < 8
        finally:
            postgres.thaw()
        wait_for(lambda: not trail.waiting)
        assert ids(store) == ["ask-0", "ask-1"]
        assert store.verify().sound


def test_a_lock_that_is_never_given_back_is_given_up_after_the_timeout(postgres: Postgres) -> None:
    url = postgres.schema(f"locked_{next(_numbers)}")
    with AuditStore(url, timeout=1) as store, AuditStore(url) as other:
        store.append(record(0))
        with other.database.writing() as connection:
            connection.exec_driver_sql("SELECT * FROM audit_head FOR UPDATE")
            with pytest.raises(AuditUnavailable, match="timeout"):
                store.append(record(1))
        store.append(record(1))
        assert store.verify().records == 2


def test_a_locked_sqlite_file_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    with AuditStore(tmp_path / "a.db", timeout=0.3) as store, AuditStore(tmp_path / "a.db") as other:
        store.append(record(0))
        with other.open().database.writing(), pytest.raises(AuditUnavailable, match="locked"):
            store.append(record(1))
        store.append(record(1))
        assert store.verify().records == 2


def test_a_database_that_was_away_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    store = AuditStore(tmp_path / "folder" / "a.db")
    with AuditTrail(store, Spool(tmp_path / "spool"), retry_seconds=0.05) as trail:
        assert isinstance(trail.append(record(0)), Spooled)
        (tmp_path / "folder").unlink()
        wait_for(lambda: not trail.waiting)
        assert ids(store) == ["ask-0"]


def test_many_threads_append_at_once_and_every_one_is_there(tmp_path: Path) -> None:
    store = AuditStore(tmp_path / "a.db")
    with AuditTrail(store, Spool(tmp_path / "spool"), retry_seconds=0.05) as trail:
        threads = [
            threading.Thread(target=lambda k=k: [trail.append(record(k * 10 + n)) for n in range(10)]) for k in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(ids(store)) == sorted(f"ask-{number}" for number in range(40))
        assert store.verify().sound


# --- the spool -------------------------------------------------------------------------------------------------------


def test_a_spool_survives_its_process_and_a_torn_last_line(tmp_path: Path) -> None:
    store, path = AuditStore(tmp_path / "a.db"), tmp_path / "spool"
    whole = b"".join(spool_three(store, path))
    path.write_bytes(whole + whole[:50])
    with AuditTrail(store, Spool(path), retry_seconds=0.05) as trail:
        wait_for(lambda: not trail.waiting)
        assert ids(store) == ["ask-0", "ask-1", "ask-2"]
    assert (tmp_path / "spool.damaged").read_bytes() == whole[:50] + b"\n"


def test_a_damaged_line_is_put_aside_and_holds_up_nobody(tmp_path: Path) -> None:
    store, path = AuditStore(tmp_path / "a.db"), tmp_path / "spool"
    path.write_bytes(damage_the_second(spool_three(store, path)))
    with AuditTrail(store, Spool(path), retry_seconds=0.05) as trail:
        wait_for(lambda: not trail.waiting)
        assert ids(store) == ["ask-0", "ask-2"]
    assert b"evil" in (tmp_path / "spool.damaged").read_bytes()


def test_a_damaged_line_is_put_aside_once_however_long_the_database_is_away(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    store, path = AuditStore(tmp_path / "folder" / "a.db"), tmp_path / "spool"
    path.write_bytes(damage_the_second(spool_three(store, path)))
    with AuditTrail(store, Spool(path), retry_seconds=3600) as trail:
        for _ in range(5):
            with pytest.raises(AuditUnavailable):
                trail.replay()
        assert trail.waiting == 3
        (tmp_path / "folder").unlink()
        trail.replay()
        assert trail.waiting == 0
        assert ids(store) == ["ask-0", "ask-2"]
    assert (tmp_path / "spool.damaged").read_bytes().count(b"evil") == 1


def test_closing_a_spool_twice_closes_nobody_elses_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.close()
    with (tmp_path / "other").open("w") as other:  # gets the number that is free now
        spool.close()
        other.write("whole")
    assert (tmp_path / "other").read_text() == "whole"


def test_a_record_whose_id_was_taken_meanwhile_is_put_aside(tmp_path: Path) -> None:
    store, path = AuditStore(tmp_path / "a.db"), tmp_path / "spool"
    with Spool(path) as spool:
        for number in range(3):
            spool.append(store.sealed(record(number)))
    store.append(record(1, model="another"))
    with AuditTrail(store, Spool(path), retry_seconds=0.05) as trail:
        wait_for(lambda: not trail.waiting)
        assert ids(store) == ["ask-1", "ask-0", "ask-2"]
    assert json.loads((tmp_path / "spool.damaged").read_text())["id"] == "ask-1"


def test_what_the_database_had_before_a_crash_is_not_stored_twice(tmp_path: Path) -> None:
    store, path = AuditStore(tmp_path / "a.db"), tmp_path / "spool"
    waiting = [store.sealed(record(number)) for number in range(3)]
    store.append_all(waiting[:2])
    with Spool(path) as spool:
        for item in waiting:
            spool.append(item)
    with AuditTrail(store, Spool(path), retry_seconds=0.05) as trail:
        wait_for(lambda: not trail.waiting)
        assert ids(store) == ["ask-0", "ask-1", "ask-2"]


def test_a_full_spool_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    store = AuditStore(tmp_path / "a.db")
    line = len(store.sealed(record(0)).content) + 500
    with Spool(tmp_path / "spool", max_bytes=3 * line) as spool:
        spool.append(store.sealed(record(0)))
        with pytest.raises(AuditUnavailable, match="is full"):  # noqa: PT012
            for number in range(1, 100):
                spool.append(store.sealed(record(number)))
        assert 0 < spool.count < 100
        records, _ = spool.waiting(100)
        assert [item.id for item in records] == [f"ask-{number}" for number in range(spool.count)]


def test_two_processes_cannot_share_a_spool(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool"), pytest.raises(AuditError, match="give each process its own"):
        Spool(tmp_path / "spool")
    Spool(tmp_path / "spool").close()


# --- the disk is full ------------------------------------------------------------------------------------------------

_ON_A_FULL_DISK = """
import sys, resource, signal
from audit_records import record
from anchorkv.serve.audit.errors import AuditUnavailable
from anchorkv.serve.audit.spool import Spool
from anchorkv.serve.audit.store import AuditStore
from anchorkv.serve.audit.trail import AuditTrail
folder = sys.argv[1]
store = AuditStore(folder + "/a.db").open()
trail = AuditTrail(store, Spool(folder + "/spool"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[2])
# From here on the kernel refuses to write beyond this, as a full disk does.
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for number in range(10_000):
    try:
        print("stored", type(trail.append(record(number))).__name__, record(number).id)
    except AuditUnavailable as error:
        print("refused", error)
        break
sys.stdout.flush()
import os
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_on_a_full_disk_nothing_is_acknowledged_that_is_not_stored(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(WORKER.parent), str(WORKER.parents[1])])}
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path), "200000"], capture_output=True, text=True,
        env=environment, timeout=120, check=True,
    )
    lines = done.stdout.splitlines()
    stored = [line.split()[2] for line in lines if line.startswith("stored")]
    assert lines[-1].startswith("refused The audit spool"), done.stdout + done.stderr
    assert len(lines[-1]) < 400
    assert any("Receipt" in line for line in lines)
    assert any("Spooled" in line for line in lines)
    store = AuditStore(tmp_path / "a.db")
    with AuditTrail(store, Spool(tmp_path / "spool"), retry_seconds=0.05) as trail:  # there is room again
        wait_for(lambda: not trail.waiting)
        assert ids(store) == stored
        assert store.verify().sound


def test_a_database_that_is_full_stores_nothing_and_says_so(tmp_path: Path) -> None:
    with AuditStore(tmp_path / "a.db") as store:
        store.append(record(0))
        with store.database.writing() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        with store.database._engine.connect() as connection:  # the pool gives the same connection again
            connection.connection.driver_connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(AuditUnavailable, match="full"):  # noqa: PT012
            for number in range(1, 50):
                store.append(record(number))
        report = store.verify()
        assert report.sound
        assert report.records < 49


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_while_spooling_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(WORKER.parent), str(WORKER.parents[1])])}
    worker = subprocess.Popen(
        [sys.executable, str(WORKER), str(tmp_path / "folder" / "a.db"), "killed", "100000", str(tmp_path / "spool")],
        stdout=subprocess.PIPE, text=True, env=environment,
    )
    acknowledged = [worker.stdout.readline().strip() for _ in range(30)]  # type: ignore[union-attr]
    worker.kill()
    acknowledged += worker.communicate(timeout=30)[0].split()
    (tmp_path / "folder").unlink()
    store = AuditStore(tmp_path / "folder" / "a.db")
    with AuditTrail(store, Spool(tmp_path / "spool"), retry_seconds=0.05) as trail:
        wait_for(lambda: not trail.waiting)
        assert ids(store)[: len(acknowledged)] == acknowledged
        assert store.verify().sound
