"""Two replicas on a real local Ray: documents go where they are held, and one is killed under load."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import serving
import tiny_gguf
import yaml

from anchorkv.errors import ConfigError
from anchorkv.serve.audit.record import EVERY_TENANT
from anchorkv.serve.audit.store import AuditStore, Filter

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'anchorkv[ray]'")
ROOT = Path(__file__).resolve().parent.parent
PORT = 8917
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The shared folder of two running replicas."""
    from ray import serve

    folder = tmp_path_factory.mktemp("shared")
    (folder / "config.yaml").write_text(yaml.safe_dump({
        "model": str(tiny_gguf.write(folder / "tiny.gguf")), "data": str(folder), "cells": 8192, "threads": 1,
        "drain_seconds": 2, "watch": {"share": 0},
    }))
    before = os.getcwd()
    os.chdir(ROOT)  # Ray's processes import deploy.ray_serve from here
    sys.path.insert(0, str(ROOT))
    try:
        from deploy.ray_serve import build

        start_ray()
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(build({"config": str(folder / "config.yaml"), "replicas": 2}), name="anchorkv")
        yield folder
        serve.shutdown()
    finally:
        ray.shutdown()
        sys.path.remove(str(ROOT))
        os.chdir(before)


def start_ray() -> None:
    """Ray gives its own processes half a minute, which a busy machine may not have."""
    for tries_left in (2, 1, 0):
        try:
            ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
        except Exception:
            ray.shutdown()
            if not tries_left:
                raise
        else:
            return


def http() -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=120)


def asked(document: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Who was the miller?"}], "max_tokens": 12, "ignore_eos": True,
        "anchorkv": {"document": document}, **more,
    }


def upload(client: httpx.Client, number: int) -> tuple[str, str]:
    """Id, and the replica that has it."""
    text = f"Document {number}. {serving.STORY * 2}"
    reply = client.post("/v1/documents", json={"text": text, "title": f"story {number}"})
    assert reply.status_code == 200, reply.text
    return reply.json()["id"], reply.headers["x-anchorkv-replica"]


def eventually(what: Any, seconds: float = 240.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.5)
    return found


def test_documents_go_where_they_are_held_and_a_killed_replica_loses_nothing(data: Path) -> None:
    with http() as client:
        held = dict(upload(client, number) for number in range(4))
        time.sleep(2)  # until the front knows
        for number, replica in held.items():
            for _ in range(2):
                reply = client.post(CHAT, json=asked(number))
                assert reply.status_code == 200
                assert reply.headers["x-anchorkv-replica"] == replica
                assert reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert client.get("/metrics").status_code == 400
        for server in "01":
            figures = client.get("/metrics", params={"server": server})
            assert figures.status_code == 200
            assert "anchorkv:num_requests_running" in figures.text
        assert client.get("/metrics", params={"server": "7"}).status_code == 404

    with Load(list(held)) as load:
        eventually(lambda: len(load.acknowledged) > 10)
        pid = int((data / "replicas" / "0" / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        at_kill = len(load.acknowledged)
        eventually(lambda: len(load.acknowledged) > at_kill + 10)  # the other one goes on
        eventually(lambda: int((data / "replicas" / "0" / "pid").read_text()) != pid)  # its number is taken up again

        def back() -> bool:
            with http() as again:
                return again.get("/metrics", params={"server": "0"}).status_code == 200

        eventually(back)

    assert not load.wrong
    assert set(load.outcomes) <= {"answered", "stream broken, said so", "told to come back", "uploaded"}
    with http() as client:
        for number in [*held, *load.uploaded]:
            assert client.post(CHAT, json=asked(number)).status_code == 200, "an acknowledged document is lost"
        assert {item["id"] for item in client.get("/v1/documents").json()["data"]} >= {*held, *load.uploaded}
    with AuditStore(str(data / "audit.db"), create=False) as store:
        store.open()
        assert store.verify().sound
        recorded = {entry.id for entry in store.entries(Filter(tenant=EVERY_TENANT))}
    assert load.acknowledged <= recorded, "an acknowledged answer has no record"


class Load:
    """Callers who ask documents, half of them streaming, and one who uploads."""

    def __init__(self, documents: list[str]) -> None:
        self.outcomes: Counter[str] = Counter()
        self.acknowledged: set[str] = set()
        self.uploaded: list[str] = []
        self.wrong: list[str] = []
        self._documents, self._over = documents, threading.Event()
        self._threads = [threading.Thread(target=self._live, args=(n,), daemon=True) for n in range(5)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _live(self, number: int) -> None:
        with http() as client:
            turn = 0
            while not self._over.is_set():
                turn += 1
                time.sleep(0.1)  # or on a small machine nothing is left for a new replica to start with
                try:
                    if number == 0:
                        self._upload(client, 100 + turn)
                    elif number % 2:
                        self._ask(client, self._documents[turn % len(self._documents)])
                    else:
                        self._stream(client, self._documents[turn % len(self._documents)])
                except Exception as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")

    def _upload(self, client: httpx.Client, number: int) -> None:
        reply = client.post("/v1/documents", json={"text": f"Text {number}. {serving.STORY}", "title": str(number)})
        if self._fine(reply):
            self.uploaded.append(reply.json()["id"])
            self.outcomes["uploaded"] += 1
        time.sleep(1)

    def _ask(self, client: httpx.Client, document: str) -> None:
        reply = client.post(CHAT, json=asked(document))
        if self._fine(reply):
            self.acknowledged.add(reply.json()["anchorkv"]["id"])
            self.outcomes["answered"] += 1

    def _stream(self, client: httpx.Client, document: str) -> None:
        with client.stream("POST", CHAT, json=asked(document, stream=True)) as reply:
            if reply.status_code != 200:
                reply.read()
                self._fine(reply)
                return
            events = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
        chunks = [json.loads(event) for event in events if event != "[DONE]"]
        if events[-1] == "[DONE]":
            self.acknowledged |= {chunk["anchorkv"]["id"] for chunk in chunks if "anchorkv" in chunk}
            self.outcomes["answered"] += 1
        elif "error" in chunks[-1]:
            self.outcomes["stream broken, said so"] += 1
        else:
            self.wrong.append("a stream ended without a word")

    def _fine(self, reply: httpx.Response) -> bool:
        if reply.status_code == 200:
            return True
        if reply.status_code in (429, 503) and "retry-after" in reply.headers:
            self.outcomes["told to come back"] += 1
            time.sleep(0.5)
        else:
            self.wrong.append(f"{reply.status_code}: {reply.text[:200]}")
        return False


def test_mistakes_are_one_sentence() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from deploy.ray_serve import build
    finally:
        sys.path.remove(str(ROOT))
    for args in ({"replica": 2}, {"replicas": "none"}, {"config": "/no/such.yaml"}):
        with pytest.raises(ConfigError) as caught:
            build(args)
        assert str(caught.value).count("\n") == 0


def test_keys_say_what_a_request_is_about() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from deploy.ray_serve import key_of
    finally:
        sys.path.remove(str(ROOT))
    document = json.dumps(asked("doc-1")).encode()
    assert key_of(CHAT, "", document) == "doc-1"
    assert key_of("/v1/documents/doc-2/segments", "", b"") == "doc-2"
    begin = {"messages": [{"role": "system", "content": "You are kind."}, {"role": "user", "content": "a"}]}
    longer = {"messages": [*begin["messages"], {"role": "user", "content": "b"}]}
    first = key_of(CHAT, "Bearer a", json.dumps(begin).encode())
    assert first == key_of(CHAT, "Bearer a", json.dumps(longer).encode()) != ""
    assert first != key_of(CHAT, "Bearer b", json.dumps(begin).encode())
    for body in (b"", b"\xff", b"[]", b"7", b'{"messages": []}', b'{"messages": 7}', b'{"anchorkv": 7, "prompt": 1}'):
        assert isinstance(key_of(CHAT, "", body), str)
    assert key_of("/v1/models", "", b"") == ""
