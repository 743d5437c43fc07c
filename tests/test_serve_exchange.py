"""One answer from question to record: the ladder's further attempts, time, clients that go, records that fail."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import serving
from serving import POLICY, STORY, client, events, run, said

from anchorkv.config import preset
from anchorkv.engines.llama import LlamaEngine
from anchorkv.serve.audit.store import Filter
from anchorkv.serve.handle import Handle, Waking
from anchorkv.serve.policies import Chosen, Wish
from anchorkv.serve.requests import Ask, Busy
from anchorkv.serve.seams import Answered, Plan, Step
from anchorkv.serve.settings_groups import RequestLimits

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    yield from serving.engine(tmp_path_factory.mktemp("model"))


class Cautious:
    """A ladder that lets no answer with anchors stand."""

    def before(self, question: Any) -> Plan:
        return Plan(question.policy, hold=True)

    def after(self, question: Any, plan: Plan, outcome: Any) -> Plan | None:
        if plan.policy.name == "full":
            return None
        return Plan(Chosen("full", preset("full")), (Step(plan.policy.name, "full", "a test says so"),), hold=True)

    def remarks(self, question: Any, plan: Plan, outcome: Any, shown: bool) -> tuple[Step, ...]:
        return (Step("full", "full", f"shown early: {shown}"),)


class Looker:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.seen: list[Answered] = []
        self.refusals: list[int] = []

    def answered(self, answered: Answered) -> None:
        self.seen.append(answered)

    def refused(self, caller: Any, refused: Any) -> None:
        self.refusals.append(refused.status)


@pytest.mark.parametrize("stream", [False, True])
def test_the_ladder_answers_once_more_and_those_who_look_on_are_told(
    model: LlamaEngine, tmp_path: Path, stream: bool
) -> None:
    looker = Looker()
    served = serving.service(tmp_path, model, ladder=Cautious(), observers=[looker])

    async def work() -> None:
        async with client(served) as http:
            reply = await http.post(CHAT, json=said(STORY * 2, stream=stream))
            figures = events(reply.text)[-1]["anchorkv"] if stream else reply.json()["anchorkv"]
            assert figures["policy"] == "full"
            assert figures["dropped"] == 0
            assert [step["reason"] for step in figures["fallback"]] == ["a test says so", "shown early: False"]
            (answered,) = looker.seen
            assert answered.earlier[0].kept_cells < answered.outcome.kept_cells
            (record,) = (await http.get("/v1/audit", params={"fallback": True})).json()["data"]
            assert record["details"]["earlier"][0]["full_cells"] > 0
            await http.post(CHAT, json=said("x", max_tokens=9999))
            assert looker.refusals == [400]

    run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_stands_when_the_engine_room_refuses_the_next_step(
    model: LlamaEngine, tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving.service(tmp_path, model, ladder=Cautious())
    submit, submitted = served.submit, []

    def once(ask: Any) -> Any:
        submitted.append(ask)
        if len(submitted) % 2 == 0:
            raise Busy("256 requests wait already.", 3.0)
        return submit(ask)

    monkeypatch.setattr(served, "submit", once)

    async def work() -> None:
        async with client(served) as http:
            reply = await http.post(CHAT, json=said(STORY * 2, stream=stream))
            assert reply.status_code == 200
            figures = events(reply.text)[-1]["anchorkv"] if stream else reply.json()["anchorkv"]
            assert figures["policy"] == "own"
            up, back, *_ = figures["fallback"]
            assert (up["after"], back["before"], back["after"]) == ("full", "full", "own")
            assert "256 requests wait already" in back["reason"]
            (record,) = (await http.get("/v1/audit")).json()["data"]
            assert record["fallback"][1]["reason"] == back["reason"]
            assert served.running == 0

    run(work())
    assert len(submitted) == 2


@pytest.mark.parametrize("broken", ["ladder", "engine room"])
def test_an_answer_stands_when_what_looks_for_a_safer_one_fails(
    model: LlamaEngine, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ladder = Cautious()
    served = serving.service(tmp_path, model, ladder=ladder)
    submit, submitted = served.submit, []

    def fail(*_: Any) -> Any:
        raise OSError("Input/output error")

    def once(ask: Any) -> Any:
        submitted.append(ask)
        return submit(ask) if len(submitted) == 1 else fail()

    monkeypatch.setattr(*((ladder, "after", fail) if broken == "ladder" else (served, "submit", once)))

    async def work() -> None:
        async with client(served) as http:
            reply = await http.post(CHAT, json=said(STORY * 2))
            assert reply.status_code == 200, reply.text
            figures = reply.json()["anchorkv"]
            assert figures["policy"] == "own"
            remark = figures["fallback"][0 if broken == "ladder" else 1]
            assert remark["after"] == "own"
            assert "the fault is in its log" in remark["reason"]
            (record,) = (await http.get("/v1/audit")).json()["data"]
            assert [step["reason"] for step in record["fallback"]] == [step["reason"] for step in figures["fallback"]]
            assert served.running == 0

    run(work())
    assert "Input/output error" in caplog.text


@pytest.mark.parametrize(("finish", "error", "words"), [
    ("error", "The KV cells are full.", "The KV cells are full."), ("cancelled", "", "stopping"),
])
def test_an_answer_stands_when_the_safer_one_comes_to_nothing(
    model: LlamaEngine, tmp_path: Path, finish: Any, error: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looker = Looker()
    served = serving.service(tmp_path, model, ladder=Cautious(), observers=[looker])
    submit, handles = served.submit, []

    def failing(ask: Any) -> Handle:
        if handles:
            failed = Handle(ask, Waking())
            failed.end(replace(handles[0].done(), finish=finish, error=error, policy=ask.policy, text="", tokens=()))
            return failed
        handles.append(submit(ask))
        return handles[0]

    monkeypatch.setattr(served, "submit", failing)

    async def work() -> None:
        async with client(served) as http:
            reply = await http.post(CHAT, json=said(STORY * 2))
            assert reply.status_code == 200, reply.text
            found = reply.json()
            assert found["choices"][0]["message"]["content"] == handles[0].done().text
            assert found["anchorkv"]["policy"] == "own"
            up, back, *_ = found["anchorkv"]["fallback"]
            assert (up["after"], back["before"], back["after"]) == ("full", "full", "own")
            assert words in back["reason"]
            (answered,) = looker.seen
            assert [outcome.finish for outcome in answered.earlier] == [finish]
            assert answered.ask.policy == handles[0].ask.policy

    run(work())


def test_what_is_let_in_after_its_time_is_ended_at_once(
    model: LlamaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving.service(tmp_path, model, bounds=RequestLimits(seconds=0.1))
    submit = served.submit

    def slowly(ask: Any) -> Handle:
        time.sleep(0.3)
        return submit(ask)

    monkeypatch.setattr(served, "submit", slowly)

    async def work() -> None:
        async with client(served) as http:
            reply = await asyncio.wait_for(http.post(CHAT, json=said("Hi", max_tokens=4000)), 20)
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
            assert served.running == 0

    run(work())


def test_a_client_that_stops_reading_and_goes_is_recorded_once(
    model: LlamaEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    looker = Looker()
    served = serving.service(tmp_path, model, observers=[looker])
    body = json.dumps(said("Hi", max_tokens=2000, stream=True)).encode()

    async def work() -> None:
        async with client(served) as http:
            full, asked = asyncio.Event(), iter([{"type": "http.request", "body": body, "more_body": False}])
            sent = count()

            async def receive() -> Any:
                for message in asked:
                    return message
                await full.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                if message["type"] == "http.response.body" and next(sent) == 3:
                    full.set()
                    await asyncio.Event().wait()

            scope = {
                "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
                "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "scheme": "http",
                "client": ("127.0.0.1", 1), "server": ("localhost", 80), "http_version": "1.1", "root_path": "",
                "asgi": {"version": "3.0", "spec_version": "2.3"},
            }
            await asyncio.wait_for(http._transport.app(scope, receive, send), 20)  # type: ignore[attr-defined]
            while served.running:
                await asyncio.sleep(0.01)
            await served.drain()
            (record,) = served.trail.store.query(Filter(tenant="local"))
            assert record.body()["details"]["finish"] == "cancelled"

    run(work())
    assert [found.outcome.finish for found in looker.seen] == ["cancelled"]
    assert not [line for line in caplog.records if line.levelname == "ERROR"]


def test_who_looks_on_and_fails_takes_no_answer_away(
    model: LlamaEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Looker):
        def answered(self, answered: Answered) -> None:
            raise ZeroDivisionError

        def refused(self, caller: Any, refused: Any) -> None:
            raise ZeroDivisionError

    looker = Looker()
    served = serving.service(tmp_path, model, observers=[Broken(), looker])

    async def work() -> None:
        async with client(served) as http:
            assert (await http.post(CHAT, json=said("Hi"))).status_code == 200
            assert (await http.post(CHAT, json=said("x", max_tokens=9999))).status_code == 400

    run(work())
    assert len(looker.seen) == len(looker.refusals) == 1
    assert caplog.text.count("Broken, who looks on, failed") == 2


def test_one_record_that_fails_keeps_none_of_the_others_back(
    model: LlamaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = serving.service(tmp_path, model)
    append, tried = served.trail.append, []

    def failing(record: Any) -> Any:
        tried.append(record.id)
        if len(tried) == 1:
            raise RuntimeError("a fault of its own")
        return append(record)

    monkeypatch.setattr(served.trail, "append", failing)

    async def work() -> None:
        async with client(served):
            caller = await served.caller(None, "127.0.0.1", "user")
            asks = [Ask(tenant="local", policy=POLICY, text="Hi", max_tokens=4000, id=f"ask-{i}") for i in range(2)]
            asking = served.asking(caller, asks, Wish())
            async with asking:
                pass
            await asking.__aexit__()
            await served.drain()
            assert served.running == 0
            (record,) = served.trail.store.query(Filter(tenant="local"))
            assert record.id == tried[1]

    run(work())
    assert len(tried) == 2
    assert "a fault of its own" in caplog.text


def test_an_answer_that_is_not_recorded_is_not_given_and_the_log_says_so_though_its_client_is_gone(
    model: LlamaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = serving.service(tmp_path, model)
    began, gone = threading.Event(), threading.Event()

    def failing(record: Any) -> Any:
        began.set()
        gone.wait(10)
        raise RuntimeError("a fault of its own")

    monkeypatch.setattr(served.trail, "append", failing)

    async def work() -> None:
        async with client(served) as http:
            asked = asyncio.ensure_future(http.post(CHAT, json=said("Hi")))
            await asyncio.to_thread(began.wait, 10)
            asked.cancel()
            await asyncio.wait({asked})
            assert "a fault of its own" not in caplog.text
            gone.set()
            while served.running or served._tasks:
                await asyncio.sleep(0.01)
            assert [line.message for line in caplog.records].count("an audit record cannot be stored") == 1
            reply = await http.post(CHAT, json=said("Hi"))
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "no_audit")

    run(work())
