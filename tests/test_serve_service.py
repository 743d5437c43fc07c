"""The life of a request over a tiny real model: documents, tenants, limits, time, audit, drain, policies, the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import serving
import tiny_gguf
from audit_records import record
from serving import POLICY, STORY, client, events, run, said

from anchorkv.engines.llama import LlamaEngine
from anchorkv.errors import SavedStateError
from anchorkv.serve.audit.errors import AuditUnavailable
from anchorkv.serve.audit.store import AuditStore
from anchorkv.serve.limits import Limiter, TenantLimits
from anchorkv.serve.opening import opened
from anchorkv.serve.policies import Policies
from anchorkv.serve.safeguard import Safeguard
from anchorkv.serve.scheduler import Scheduler
from anchorkv.serve.service import Service
from anchorkv.serve.settings import ServeSettings
from anchorkv.serve.settings_groups import CanarySettings, FallbackSettings, PolicyBounds, RequestLimits, WatchSettings

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    yield from serving.engine(tmp_path_factory.mktemp("model"))


@pytest.fixture
def served(model: LlamaEngine, tmp_path: Path) -> Service:
    return serving.service(tmp_path, model)


def test_documents_from_upload_to_deletion(model: LlamaEngine, tmp_path: Path) -> None:
    served = serving.service(tmp_path, model, bounds=RequestLimits(upload_bytes=20_000))

    async def work() -> None:
        async with client(served) as http:
            made = await http.post("/v1/documents", json={"text": STORY * 3, "title": "The mill"})
            assert made.status_code == 200, made.text
            facts = made.json()
            assert facts["kept_cells"] < facts["tokens"] / 2
            number = facts["id"]
            asked = (await http.post(CHAT, json=said("Who sold it?", anchorkv={"document": number}))).json()
            assert asked["usage"]["prompt_tokens_details"]["cached_tokens"] == facts["tokens"]
            assert asked["anchorkv"]["document"] == number
            segments = (await http.get(f"/v1/documents/{number}/segments")).json()["data"]
            assert sum(segment["tokens"] for segment in segments) <= facts["tokens"]
            assert sum(segment["kept"] for segment in segments if segment["dropped"]) > 0
            assert any("anchor" in why for segment in segments for why in segment["why"])
            html = b"<html><body><h1>Mill</h1><script>evil()</script><p>" + STORY.encode() + b"</p></body></html>"
            file = await http.post(
                "/v1/documents", files={"file": ("../../etc/mill.html", html)},
                data={"anchorkv": '{"policy": "paper-ep"}'},
            )
            assert file.status_code == 200, file.text
            assert (file.json()["title"], file.json()["policy"]) == ("mill.html", "paper-ep")
            assert "evil" not in served.scheduler.documents.text("local", file.json()["id"])
            listed = (await http.get("/v1/documents")).json()["data"]
            assert [one["title"] for one in listed] == ["The mill", "mill.html"]
            assert (await http.delete(f"/v1/documents/{number}")).json()["deleted"]
            for path in (f"/v1/documents/{number}", f"/v1/documents/{number}/segments"):
                assert (await http.get(path)).status_code == 404
            assert (await http.post(CHAT, json=said("Who?", anchorkv={"document": number}))).status_code == 404
            done = (await http.get("/v1/audit", params={"kind": "document"})).json()["data"]
            assert [one["details"]["action"] for one in done] == ["deleted", "uploaded", "uploaded"]

    run(work())


@pytest.mark.parametrize(("request_", "status", "words"), [
    ({"json": {"text": " "}}, 400, "no text"), ({"json": {"title": "x"}}, 400, "'text' is missing"),
    ({"json": {"text": "a" * 3000}}, 413, "more than 2,000 bytes"), ({"content": b"x"}, 400, "multipart/form-data"),
    ({"data": {"title": "x"}, "files": {"other": b"x"}}, 400, "no file"),
    ({"files": {"file": ("x.exe", b"MZ")}}, 400, "'.exe' cannot be read"),
    ({"files": {"file": ("x.pdf", b"%PDF-1.4 broken")}}, 400, "not a readable PDF"),
    ({"files": {"file": ("x.docx", b"PK\x03\x04 broken")}}, 400, "not a readable docx"),
    ({"files": {"file": ("x.txt", b"a" * 3000)}}, 413, "larger than 2,000 bytes"),
    ({"files": {"file": ("x.txt", b"a b")}, "data": {"anchorkv": "{"}}, 400, "not a JSON object"),
    ({"files": {"file": ("x.txt", b"a b")}, "data": {"title": "x" * 300}}, 400, "at most 200"),
])
def test_documents_that_are_refused(
    model: LlamaEngine, tmp_path: Path, request_: dict[str, Any], status: int, words: str
) -> None:
    served = serving.service(tmp_path, model, bounds=RequestLimits(upload_bytes=2000))

    async def work() -> None:
        async with client(served) as http:
            reply = await http.post("/v1/documents", **request_)
            assert reply.status_code == status, reply.text
            assert words in reply.json()["error"]["message"]
            assert (await http.get("/v1/documents")).json()["data"] == []

    run(work())


def test_tenants_never_reach_each_others_things(model: LlamaEngine, tmp_path: Path) -> None:
    keys = serving.keys(
        tmp_path, ("a", "user"), ("b", "user"), ("a", "auditor"), ("b", "auditor"), ("b", "operator"), ("*", "auditor"),
    )
    served = serving.service(tmp_path, model, with_keys=True)

    async def work() -> None:
        async with client(served) as http:
            async def ask(who: Any, method: str, path: str, **more: Any) -> Any:
                return await http.request(method, path, headers={"authorization": f"Bearer {keys[who]}"}, **more)

            a, b = ("a", "user"), ("b", "user")
            number = (await ask(a, "POST", "/v1/documents", json={"text": STORY * 2})).json()["id"]
            first = (await ask(a, "POST", CHAT, json=said(STORY * 2))).json()
            same = (await ask(b, "POST", CHAT, json=said(STORY * 2))).json()
            assert first["choices"][0]["message"] == same["choices"][0]["message"]
            assert same["usage"]["prompt_tokens_details"]["cached_tokens"] == 0  # no timing to learn from
            for method, path in (("GET", ""), ("GET", "/segments"), ("DELETE", "")):
                assert (await ask(b, method, f"/v1/documents/{number}{path}")).status_code == 404
            refused = await ask(b, "POST", CHAT, json=said("Who?", anchorkv={"document": number}))
            assert refused.status_code == 404
            assert (await ask(b, "GET", "/v1/documents")).json()["data"] == []
            assert (await ask(("b", "auditor"), "GET", f"/v1/audit/{first['id']}")).status_code == 404
            for who, seen in ((("a", "auditor"), {"a"}), (("b", "operator"), {"b"}), (("*", "auditor"), {"a", "b"})):
                found = (await ask(who, "GET", "/v1/audit")).json()["data"]
                assert {record["tenant"] for record in found} == seen
            for who, method, path in (
                (a, "GET", "/v1/audit"), (a, "GET", f"/v1/audit/{first['id']}"), (a, "GET", "/v1/audit/verify"),
                (("a", "auditor"), "POST", CHAT), (("a", "auditor"), "GET", "/v1/documents"),
                (("*", "auditor"), "POST", CHAT),
            ):
                reply = await ask(who, method, path, **({"json": said("x")} if method == "POST" else {}))
                assert reply.status_code == 403, path
            for headers in ({}, {"authorization": "Bearer no"}, {"authorization": f"Basic {keys[a]}"}):
                reply = await http.get("/v1/models", headers=headers)
                assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
                assert keys[a] not in reply.text
            assert (await ask(a, "GET", f"/v1/documents/{number}")).status_code == 200

    run(work())


def test_limits_and_a_full_queue_say_when_to_come_back(model: LlamaEngine, tmp_path: Path) -> None:
    limits = Limiter(TenantLimits(requests_per_minute=1))
    served = serving.service(tmp_path, model, limits=limits)

    async def work() -> None:
        async with client(served) as http:
            replies = [await http.post(CHAT, json=said("Hi", max_tokens=1)) for _ in range(2)]
            assert [reply.status_code for reply in replies] == [200, 429]
            assert 1 <= int(replies[1].headers["retry-after"]) <= 60

    run(work())
    full = serving.service(tmp_path, model, scheduler=Scheduler(model, serving.CELLS, max_waiting=0))

    async def again() -> None:
        async with client(full) as http:
            reply = await http.post(CHAT, json=said("Hi"))
            assert (reply.status_code, reply.json()["error"]["code"]) == (429, "busy")
            assert int(reply.headers["retry-after"]) >= 1

    run(again())


def test_what_takes_too_long_is_ended_and_recorded(model: LlamaEngine, tmp_path: Path) -> None:
    served = serving.service(tmp_path, model, bounds=RequestLimits(seconds=0.3))

    async def work() -> None:
        async with client(served) as http:
            asked = said("Hi", max_tokens=4000)
            reply = await http.post(CHAT, json=asked)
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
            stream = await http.post(CHAT, json={**asked, "stream": True})
            assert events(stream.text)[-1]["error"]["code"] == "timeout"
            assert "[DONE]" not in stream.text
            records = (await http.get("/v1/audit")).json()["data"]
            assert [record["details"]["finish"] for record in records] == ["cancelled"] * 2
            assert all(record["figures"]["completion_tokens"] > 0 for record in records)
            assert served.scheduler.load().sessions == 0

    run(work())


def test_an_answer_that_cannot_be_recorded_is_not_given(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> Any:
        raise AuditUnavailable("The database is away.")

    async def work() -> None:
        async with client(served) as http:
            monkeypatch.setattr(served.trail.store, "append_all", away)
            reply = await http.post(CHAT, json=said("Hi"))
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_audit")
            stream = await http.post(CHAT, json=said("Hi", stream=True))
            assert events(stream.text)[-1]["error"]["code"] == "no_audit"
            assert served.running == 0
            monkeypatch.undo()
            assert (await http.post(CHAT, json=said("Hi"))).status_code == 200

    run(work())


def test_draining_lets_what_runs_end_and_takes_nothing_new(served: Service) -> None:
    async def work() -> None:
        async with client(served) as http:
            assert (await http.get("/health/ready")).json() == {"status": "ready"}
            running = asyncio.ensure_future(http.post(CHAT, json=said("Hi", max_tokens=300)))
            while not served.scheduler.load().writing:
                await asyncio.sleep(0.01)
            drained = asyncio.ensure_future(served.drain())
            await asyncio.sleep(0)
            assert (await http.get("/health/ready")).status_code == 503
            assert (await http.get("/health/live")).status_code == 200
            new = await http.post(CHAT, json=said("Hi"))
            assert (new.status_code, new.headers["retry-after"]) == (503, "10")
            reply = await running
            assert (reply.status_code, reply.json()["usage"]["completion_tokens"]) == (200, 300)
            assert await drained

    run(work())


def test_nothing_is_done_to_a_document_that_is_not_recorded(
    model: LlamaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving.service(tmp_path, model)

    def away(*_: Any) -> Any:
        raise AuditUnavailable("The database is away.")

    async def work() -> None:
        async with client(served) as http:
            number = (await http.post("/v1/documents", json={"text": STORY})).json()["id"]
            with monkeypatch.context() as gone:
                gone.setattr(served.trail.store, "append_all", away)
                refused = await http.post("/v1/documents", json={"text": STORY * 2})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_audit")
                assert (await http.delete(f"/v1/documents/{number}")).status_code == 503
            assert [one["id"] for one in (await http.get("/v1/documents")).json()["data"]] == [number]
            with monkeypatch.context() as stuck:
                stuck.setattr(served.scheduler, "delete_document", cannot)
                assert (await http.delete(f"/v1/documents/{number}")).status_code == 500
            assert (await http.delete(f"/v1/documents/{number}")).status_code == 200
            assert (await http.delete(f"/v1/documents/{number}")).status_code == 404
            brief = (await http.get("/v1/audit", params={"brief": True})).json()["data"]
            assert not any("details" in one or "segments" in one for one in brief)
            done = (await http.get("/v1/audit")).json()["data"]
            assert [one["id"] for one in brief] == [one["id"] for one in done]
            actions = [one["details"]["action"] for one in done]
            assert actions == ["deleted", "not deleted", "deleted", "uploaded"]

    def cannot(*_: Any) -> None:
        raise SavedStateError("The document cannot be deleted: Read-only file system.")

    run(work())


def test_an_upload_that_is_given_up_at_its_end_does_not_stay(
    model: LlamaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving.service(tmp_path, model, bounds=RequestLimits(seconds=0.2))
    add = served.scheduler.add_document

    class Late(Future[Any]):
        """Done at the very moment that it is called off."""

        def __init__(self, facts: Any) -> None:
            super().__init__()
            self._facts = facts

        def cancel(self) -> bool:
            if not self.done():
                self.set_result(self._facts)
            return False

    def finished(*given: Any) -> Any:
        facts = add(*given).result(20)  # written, and only then waited for
        return Late(facts)

    monkeypatch.setattr(served.scheduler, "add_document", finished)

    async def work() -> None:
        async with client(served) as http:
            reply = await http.post("/v1/documents", json={"text": STORY})
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
            assert (await http.get("/v1/documents")).json()["data"] == []

    run(work())


def test_closing_twice_and_with_a_watch_that_fails(
    served: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    guard = Safeguard.of(served.scheduler, served.policies, WatchSettings(), FallbackSettings(), CanarySettings())
    served.safeguard = guard

    def full() -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(guard.findings, "close", full)

    async def work() -> None:
        async with client(served) as http:
            assert (await http.post(CHAT, json=said("Hi"))).status_code == 200
            await served.close()
            assert not served.scheduler.alive
        # and once more by the app's own end

    run(work())
    assert "No space left on device" in caplog.text


def test_who_asks_for_quality_gets_the_full_cache(served: Service) -> None:
    async def work() -> None:
        async with client(served) as http:
            reply = (await http.post(CHAT, json=said(STORY * 2, anchorkv={"quality": "high"}))).json()
            assert (reply["anchorkv"]["policy"], reply["anchorkv"]["reduction"]) == ("full", 1.0)
            other = (await http.post(CHAT, json=said(STORY * 2, anchorkv={"reduction": 8, "recall": "off"}))).json()
            assert other["anchorkv"]["policy"] == "own, reduction=8, recall=off"

    run(work())


def test_a_policy_of_the_callers_own_where_the_operator_allows_it(model: LlamaEngine, tmp_path: Path) -> None:
    served = serving.service(tmp_path, model, policies=Policies.of(POLICY, "own", PolicyBounds(custom=True)))

    async def work() -> None:
        async with client(served) as http:
            for policy, status, words in (
                ({"anchors": ["EP"], "min_segment": 8}, 200, '"policy":"custom"'), ({"sinks": -1}, 400, "sinks"),
                ({"scorer": "/etc/passwd.safetensors"}, 400, "no scorer"), ({"colour": 1}, 400, "colour"),
            ):
                reply = await http.post(CHAT, json=said(STORY, anchorkv={"policy": policy}))
                assert reply.status_code == status
                assert words in reply.text

    run(work())


@pytest.mark.parametrize("said_so", [True, False])
def test_what_the_operator_says_of_retention_and_of_tenants_in_the_metrics_is_done(
    tmp_path: Path, said_so: bool
) -> None:
    now = datetime.now(UTC)
    with AuditStore(tmp_path / "audit.db") as store:
        store.append(record(0, tenant="local", time=now - timedelta(days=40)))
        store.append(record(1, tenant="local", time=now))
    changes: dict[str, Any] = {"audit": {"retention_days": 30}, "metrics_by_tenant": True} if said_so else {}
    settings = ServeSettings.model_validate({
        "model": str(tiny_gguf.write(tmp_path / "tiny.gguf")), "threads": 1, "cells": serving.CELLS, "data": tmp_path,
        "policy": "paper-ep", "watch": {"share": 0}, **changes,
    })

    async def work(served: Service) -> None:
        async with client(served) as http:
            assert (await http.post(CHAT, json=said("Hi"))).status_code == 200
            assert ('tenant="local"' in (await http.get("/metrics")).text) == said_so
            for _ in range(500 if said_so else 1):
                if served.trail.store.get("ask-0", tenant="local").retired:
                    break
                await asyncio.sleep(0.01)
            gone = [one["retired"] for one in (await http.get("/v1/audit")).json()["data"] if one["kind"] == "answer"]
            assert gone == [False, False, said_so]
            assert served.trail.store.verify().sound

    with opened(settings) as served:
        run(work(served))
