"""Faults against a real server process: killed while it works, no disk, no database, damaged files, a client that never
reads, a clock that jumps.

After each: what was acknowledged is there, each tenant has its own texts alone, the audit chain is sound, and the
service answers, without help but a restart where the process is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_gguf
from audit_postgres import Postgres
from command import Command
from serving import STORY, keys, said
from waiting import listening, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="faults are made as Linux has them")]
CHAT, DOCUMENTS = "/v1/chat/completions", "/v1/documents"
TENANTS = ("alpha", "beta")
CONFIG = "requests: {seconds: 60, read_seconds: 2}\ndrain_seconds: 10\naudit: {text: true}\nwatch: {share: 0}\n"


class Server:
    """`anchorkv serve` with a tiny model on a free port. What clients of it get is noted."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.data = folder, folder / "data"
        self.data.mkdir(exist_ok=True)
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._config, self._model, self.log = folder / "serve.yaml", folder / "tiny.gguf", folder / "log.txt"
        self._config.write_text(CONFIG)
        tiny_gguf.write(self._model)
        found = keys(self.data, *((tenant, "user") for tenant in TENANTS), ("alpha", "operator"), ("beta", "operator"))
        self.keys = {f"{tenant} {role}": text for (tenant, role), text in found.items()}
        self.answers: dict[str, dict[str, str]] = {tenant: {} for tenant in TENANTS}
        """Question by the id of each acknowledged answer, for each tenant."""
        self.documents: dict[str, dict[str, str]] = {tenant: {} for tenant in TENANTS}
        """Title by the id of each acknowledged document."""
        self._number = 0
        self.start()

    def start(self) -> None:
        command = [
            sys.executable, "-m", "anchorkv", "serve", "--config", str(self._config), "--model", str(self._model),
            "--threads", "1", "--port", "0", "--cells", "4096", "--data", str(self.data),
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
        self.url = listening(self.process, self.log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()

    def ask(self, tenant: str, method: str, path: str, role: str = "user", **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[f'{tenant} {role}']}"}
        return httpx.request(method, self.url + path, headers=headers, timeout=60, **more)

    def chat(self, tenant: str, text: str = "", **more: Any) -> httpx.Response:
        """One answer, noted when it is acknowledged."""
        self._number += 1
        question = f"{tenant} asks number {self._number}. {text}"
        answer = self.ask(tenant, "POST", CHAT, json=said(question, **{"max_tokens": 3, **more}))
        if answer.status_code == 200:
            self.answers[tenant][answer.json()["id"]] = question
        return answer

    def upload(self, tenant: str) -> httpx.Response:
        """One document, noted when it is acknowledged."""
        self._number += 1
        title = f"{tenant}'s paper {self._number}"
        answer = self.ask(tenant, "POST", DOCUMENTS, json={"text": f"{title}. {STORY * 3}", "title": title})
        if answer.status_code == 200:
            self.documents[tenant][answer.json()["id"]] = title
        return answer

    def load(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("alpha", "GET", "/v1/load").json()
        return found

    def check(self, lost: tuple[str, ...] = ()) -> None:
        """What the module says, of all that was acknowledged. lost: documents that were damaged on purpose."""
        wait_for(lambda: self.load()["audit_waiting"] == 0)
        assert httpx.get(f"{self.url}/health/ready").json() == {"status": "ready"}
        for tenant, other in (TENANTS, TENANTS[::-1]):
            for number, question in self.answers[tenant].items():
                record = self.ask(tenant, "GET", f"/v1/audit/{number}", "operator").json()
                assert question in json.dumps(record["request"]), record
                assert self.ask(other, "GET", f"/v1/audit/{number}", "operator").status_code == 404
            assert other not in self.ask(tenant, "GET", "/v1/audit?limit=500", "operator").text
            listed = self.ask(tenant, "GET", DOCUMENTS).json()["data"]
            titles = {number: title for number, title in self.documents[tenant].items() if number not in lost}
            assert titles.items() <= {document["id"]: document["title"] for document in listed}.items()
            assert not [document for document in listed if other in document["title"]]
            for number in list(titles)[-2:]:
                assert self.chat(tenant, anchorkv={"document": number}).status_code == 200
                assert self.ask(other, "GET", f"{DOCUMENTS}/{number}").status_code == 404
        assert not [path for path in self.data.rglob("*") if path.suffix in (".writing", ".partial")]
        assert self.chat("alpha").status_code == 200
        verified = Command("audit")("verify", "--database", self.environment.get(
            "ANCHORKV_AUDIT_DATABASE", str(self.data / "audit.db")
        ), "--json")
        assert json.loads(verified.stdout)["sound"]


@contextlib.contextmanager
def busy(*work: Callable[[], Any]) -> Iterator[None]:
    """Each of these again and again in a thread of its own, until the server is gone or the block is left."""
    over = threading.Event()

    def run(action: Callable[[], Any]) -> None:
        with contextlib.suppress(httpx.TransportError):
            while not over.is_set():
                action()

    threads = [threading.Thread(target=run, args=(action,)) for action in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    yield found
    if found.process.poll() is None:
        found.kill()


def begin(server: Server) -> None:
    """Something of each tenant that must not be lost."""
    for tenant in TENANTS:
        assert server.upload(tenant).status_code == 200
        assert server.chat(tenant).status_code == 200


# --- killed -------------------------------------------------------------------------------------------------------


def in_prefill(server: Server) -> None:
    long = {"policy": "full"}
    with busy(lambda: server.chat("alpha", STORY * 10, anchorkv=long), lambda: server.chat("beta", STORY * 10)):
        wait_for(lambda: server.load()["reading"])
        server.kill()


def in_decode(server: Server) -> None:
    headers = {"authorization": f"Bearer {server.keys['beta user']}"}
    body = said("beta wants to know.", max_tokens=2000, stream=True)
    with (
        busy(lambda: server.chat("alpha")), contextlib.suppress(httpx.TransportError),
        httpx.stream("POST", server.url + CHAT, headers=headers, json=body, timeout=60) as stream,
    ):
        for number, _ in enumerate(stream.iter_lines()):
            if number == 20:
                server.kill()


def in_document_write(server: Server) -> None:
    with busy(lambda: server.upload("alpha"), lambda: server.upload("beta")):
        wait_for(lambda: min(map(len, server.documents.values())) >= 3)
        wait_for(lambda: next(server.data.rglob("*.writing"), None))
        server.kill()


def in_audit_write(server: Server) -> None:
    with busy(*[lambda tenant=tenant: server.chat(tenant, max_tokens=1) for tenant in TENANTS * 2]):
        wait_for(lambda: min(map(len, server.answers.values())) >= 5)
        log = server.data / "audit.db-wal"
        before = log.stat().st_size, log.stat().st_mtime_ns
        wait_for(lambda: (log.stat().st_size, log.stat().st_mtime_ns) != before)
        server.kill()


@pytest.mark.parametrize("moment", [in_prefill, in_decode, in_document_write, in_audit_write])
def test_killed_it_comes_back_with_all_that_it_acknowledged(server: Server, moment: Callable[[Server], None]) -> None:
    begin(server)
    moment(server)
    assert server.process.returncode == -signal.SIGKILL
    server.start()
    server.check()
    server.stop()


# --- disk, database, files -------------------------------------------------------------------------------------------


def test_on_a_full_disk_nothing_is_acknowledged_and_all_goes_on_when_there_is_room(server: Server) -> None:
    begin(server)
    limit = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    # From here on the kernel lets it write no byte to any file, the log's own too.
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, limit[1]))
    for _ in range(3):
        refused = server.chat("alpha")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_audit")
        assert int(refused.headers["retry-after"]) > 0
        unkept = server.upload("beta")
        assert (unkept.status_code, unkept.json()["error"]["code"]) == (503, "no_storage")
        assert "cannot be written" in unkept.json()["error"]["message"]
        assert str(server.data) not in unkept.text
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limit)
    begin(server)
    server.check()
    server.stop()


def test_while_the_database_is_gone_answers_are_given_and_recorded_later(tmp_path: Path) -> None:
    postgres = Postgres()
    try:
        postgres.start()
        server = Server(tmp_path, ANCHORKV_AUDIT_DATABASE=postgres.schema("faults"))
        begin(server)
        postgres.stop()
        begin(server)
        assert server.load()["audit_waiting"] >= 2
        assert server.load()["audit_trouble"]
        postgres.start()
        server.check()
        postgres.stop()
        begin(server)
        server.kill()  # with records that no database has
        postgres.start()
        server.start()
        server.check()
        server.stop()
    finally:
        postgres.remove()


def test_damaged_documents_are_read_again_or_set_aside_and_told(server: Server) -> None:
    begin(server)
    begin(server)
    server.stop()
    again, lost = list(server.documents["alpha"])
    anchors, record = (next(server.data.rglob(name)) for name in (f"{again}.*.anchors", f"{lost}.json"))
    for path in (anchors, record):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    server.start()
    server.check(lost=(lost,))
    assert server.ask("alpha", "GET", f"{DOCUMENTS}/{again}").json()["damage"]
    assert server.ask("alpha", "GET", f"{DOCUMENTS}/{lost}").status_code == 404
    assert record.with_suffix(".json.damaged").is_file()
    server.stop()


# --- clients and clocks ----------------------------------------------------------------------------------------------


def test_a_client_that_never_reads_is_cut_off_and_holds_up_nobody(server: Server) -> None:
    begin(server)
    body = json.dumps(said("alpha is silent.", max_tokens=3000, stream=True, logprobs=True, top_logprobs=20)).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {server.keys['alpha user']}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        client.sendall(head.encode() + body)
        wait_for(lambda: server.load()["requests"] == 1)
        assert server.chat("beta").status_code == 200
        wait_for(lambda: server.load()["requests"] == 0, 60)
    assert server.load()["sessions"] == 0
    assert "does not read" in server.log.read_text()
    server.check()
    server.stop()


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static volatile long *jump;
__attribute__((constructor)) static void open_file(void) {
    int file = open(getenv("CLOCK_FILE"), O_RDONLY);
    jump = mmap(0, sizeof *jump, PROT_READ, MAP_SHARED, file, 0);
}
int clock_gettime(clockid_t which, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(which, at);
    if (!failed && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) at->tv_sec += *jump;
    return failed;
}
time_t time(time_t *to) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (to) *to = at.tv_sec;
    return at.tv_sec;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec, at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""
"""A wall clock that is off by as many seconds as a file says."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_wall_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    source, library, file = tmp_path / "clock.c", tmp_path / "clock.so", tmp_path / "clock"
    source.write_text(CLOCK)
    file.write_bytes(struct.pack("l", 0))
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    server = Server(tmp_path, LD_PRELOAD=str(library), CLOCK_FILE=str(file))
    begin(server)
    for days in (30, -400):
        with file.open("r+b") as clock:
            clock.write(struct.pack("l", int(days * 86400)))
        begin(server)
        told = server.chat("alpha").json()
        assert abs(told["created"] - time.time() - days * 86400) < 60, "the server's clock did not jump"
        assert all(0 <= seconds < 30 for seconds in told["anchorkv"]["seconds"].values())
        server.check()
    server.kill()
    server.start()
    server.check()
    server.stop()
