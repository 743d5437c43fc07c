"""The API over a tiny real model: OpenAI's formats, anchorkv's own figures, and every error in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import serving
from serving import STORY, client, events, run, said

from anchorkv.engines.llama import LlamaEngine
from anchorkv.serve.service import Service
from anchorkv.serve.settings_groups import RequestLimits

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    yield from serving.engine(tmp_path_factory.mktemp("model"))


@pytest.fixture
def served(model: LlamaEngine, tmp_path: Path) -> Service:
    return serving.service(tmp_path, model)


def test_a_chat_in_openais_form_with_its_figures_and_its_record(served: Service) -> None:
    async def work() -> None:
        async with client(served) as http:
            reply = await http.post(CHAT, json=said(STORY * 3, logprobs=True, top_logprobs=3))
            body = reply.json()
            assert reply.status_code == 200
            assert body["object"] == "chat.completion"
            choice, usage, figures = body["choices"][0], body["usage"], body["anchorkv"]
            assert choice["finish_reason"] == "length"
            assert usage["completion_tokens"] == 12 == len(choice["logprobs"]["content"])
            assert usage["total_tokens"] == usage["prompt_tokens"] + 12
            assert all(len(token["top_logprobs"]) == 3 for token in choice["logprobs"]["content"])
            assert figures["cells"]["full"] == usage["total_tokens"]
            assert figures["cells"]["kept"] + figures["dropped"] == figures["cells"]["full"]
            assert figures["reduction"] > 2
            assert reply.headers["x-anchorkv-kept-cells"] == str(figures["cells"]["kept"])
            record = (await http.get(f"/v1/audit/{body['id']}")).json()
            assert record["answer"] == choice["message"]["content"]
            assert record["figures"]["kept_cells"] == figures["cells"]["kept"]
            assert sum(segment["dropped"] for segment in record["segments"]) == figures["dropped"]
            assert (await http.get("/v1/audit/verify")).json()["sound"]
            again = (await http.post(CHAT, json=said(STORY * 3, anchorkv={"explain": True}))).json()
            assert again["choices"][0]["message"] == choice["message"]
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
            assert sum(segment["tokens"] for segment in again["anchorkv"]["segments"]) == usage["total_tokens"]

    run(work())


def test_a_stream_says_what_the_whole_reply_says(served: Service) -> None:
    async def work() -> None:
        async with client(served) as http:
            asked = said(STORY, logprobs=True, top_logprobs=1)
            whole = (await http.post(CHAT, json=asked)).json()
            stream = await http.post(CHAT, json={**asked, "stream": True, "stream_options": {"include_usage": True}})
            chunks = events(stream.text)
            assert "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"]) == (
                whole["choices"][0]["message"]["content"]
            )
            logprobs = [c["logprobs"]["content"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
            streamed = [token for part in logprobs for token in part]
            at_once = whole["choices"][0]["logprobs"]["content"]
            assert [token["bytes"] for token in streamed] == [token["bytes"] for token in at_once]
            # What is computed beside it in a batch moves a log-probability by a little.
            near = pytest.approx([token["logprob"] for token in at_once], abs=0.02)
            assert [token["logprob"] for token in streamed] == near
            # Several at once are computed in one batch, whose rounding differs: their texts may, their form may not.
            asked = {**asked, "n": 3}
            whole = (await http.post(CHAT, json=asked)).json()
            stream = await http.post(CHAT, json={**asked, "stream": True, "stream_options": {"include_usage": True}})
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert stream.text.endswith("data: [DONE]\n\n")
            chunks = events(stream.text)
            texts, finish = ["", "", ""], {}
            tokens: list[list[Any]] = [[], [], []]
            for choice in (choice for chunk in chunks for choice in chunk["choices"]):
                texts[choice["index"]] += choice["delta"].get("content", "")
                tokens[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
                finish[choice["index"]] = choice["finish_reason"]
            assert len(set(texts)) == 3 == len({choice["message"]["content"] for choice in whole["choices"]})
            assert [len(part) for part in tokens] == [12] * 3
            assert finish == {0: "length", 1: "length", 2: "length"}
            assert chunks[-1]["choices"] == []
            assert chunks[-1]["usage"]["completion_tokens"] == 36 == whole["usage"]["completion_tokens"]
            assert sum("anchorkv" in chunk for chunk in chunks) == 4
            records = (await http.get("/v1/audit", params={"kind": "answer"})).json()["data"]
            assert len(records) == len({record["id"] for record in records}) == 8

    run(work())


def test_completions_of_several_prompts_and_of_tokens(served: Service) -> None:
    async def work() -> None:
        async with client(served) as http:
            asked = {"max_tokens": 6, "seed": 3, "ignore_eos": True, "logprobs": 2}
            both = (await http.post(TEXT, json={**asked, "prompt": ["The mill", "A river"], "n": 2})).json()
            alone = (await http.post(TEXT, json={**asked, "prompt": list(b"A river")})).json()
            assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
            assert both["usage"]["prompt_tokens"] == 15
            assert both["usage"]["completion_tokens"] == 24
            logprobs = alone["choices"][0]["logprobs"]
            assert {len(value) for value in logprobs.values()} == {6}
            stream = await http.post(TEXT, json={**asked, "prompt": "A river", "stream": True})
            chunks = events(stream.text)
            assert "".join(c["choices"][0]["text"] for c in chunks) == alone["choices"][0]["text"]
            found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
            assert [offset for part in found if part for offset in part["text_offset"]] == logprobs["text_offset"]

    run(work())


def test_stop_sequences_bias_and_schema(served: Service) -> None:
    async def work() -> None:
        async with client(served) as http:
            asked = said("Go on.", temperature=0, logit_bias={"97": 100})
            assert (await http.post(CHAT, json=asked)).json()["choices"][0]["message"]["content"] == "a" * 12
            stopped = (await http.post(CHAT, json={**asked, "stop": ["aaa"]})).json()["choices"][0]
            assert (stopped["message"]["content"], stopped["finish_reason"]) == ("", "stop")
            schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
            shape = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
            found = (await http.post(CHAT, json={**said("Yes?", max_tokens=200), "response_format": shape})).json()
            assert isinstance(json.loads(found["choices"][0]["message"]["content"])["yes"], bool)

    run(work())


@pytest.mark.parametrize(("change", "status", "words", "param"), [
    ({"temperature": 3}, 400, "less than or equal to 2", "temperature"),
    ({"temperature": "hot"}, 400, "valid number", "temperature"),
    ({"max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
    ({"max_tokens": 5000}, 400, "4096 at most", "max_tokens"),
    ({"messages": []}, 400, "at least 1 item", "messages"),
    ({"messages": None}, 400, "valid list", "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "'system', 'developer'", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "is missing", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, 400, "type file", "messages[0]"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate", "messages[0].content"),
    ({"tools": [{"type": "function"}]}, 400, "'tools' is not supported", None),
    ({"audio": {"voice": "x"}}, 400, "'audio' is not supported", None),
    ({"stream_options": {"include_usage": True}}, 400, "set stream to true", None),
    ({"top_logprobs": 2}, 400, "needs logprobs", None),
    ({"n": 17}, 400, "less than or equal to 16", "n"),
    ({"n": 9}, 400, "8 answers at most", "n"),
    ({"stop": ["", "x"]}, 400, "stop sequence is empty", None),
    ({"logit_bias": {"x": 1}}, 400, "no token id", "logit_bias"),
    ({"logit_bias": {"99999": 1}}, 400, "no token 99999", "logit_bias"),
    ({"response_format": {"type": "json_schema"}}, 400, "needs a 'json_schema'", "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "x"}}}}, 400, "within it", None),
    ({"model": "gpt-4"}, 404, "no model 'gpt-4'", "model"),
    ({"anchorkv": {"policy": "best"}}, 400, "choose one of own, paper-ep, full", "anchorkv.policy"),
    ({"anchorkv": {"policy": {"sinks": 1}}}, 403, "takes no policies of callers", "anchorkv.policy"),
    ({"anchorkv": {"reduction": 100}}, 403, "from 2 to 32", "anchorkv.reduction"),
    ({"anchorkv": {"policy": "paper-ep", "reduction": 8}}, 400, "selects no anchors", "anchorkv.reduction"),
    ({"anchorkv": {"area": "law"}}, 400, "no rollout plan", "anchorkv.area"),
    ({"anchorkv": {"speed": 2}}, 400, "no field 'anchorkv.speed'", "anchorkv.speed"),
    ({"anchorkv": {"document": "doc-0"}}, 404, "no document 'doc-0'", None),
    ({"messages": [{"role": "user", "content": STORY * 50}], "anchorkv": {"policy": "full"}}, 400, "KV cells", None),
])
def test_a_bad_field_is_told_in_one_sentence(
    served: Service, change: dict[str, Any], status: int, words: str, param: str | None
) -> None:
    async def work() -> None:
        async with client(served) as http:
            body = json.dumps({**said("Hello."), **change})
            reply = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (status, param), error
            assert words in error["message"]
            assert error["message"].endswith(".")
            assert "\n" not in error["message"]

    run(work())


@pytest.mark.parametrize(("body", "kind", "status"), [
    (b"", "application/json", 400), (b"{", "application/json", 400), (b"[]", "application/json", 400),
    (b'"x"', "application/json", 400), (b"\xff\xfe", "application/json", 400),
    (b"[" * 100_000, "application/json", 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "application/json", 400),
    (b'{"messages": [{"role": "user", "content": "x"}]}', "text/plain", 400),
    (b" " * 3000, "application/json", 413),
])
def test_hostile_bodies(model: LlamaEngine, tmp_path: Path, body: bytes, kind: str, status: int) -> None:
    served = serving.service(tmp_path, model, bounds=RequestLimits(bytes=200_000 if status == 400 else 2048))

    async def work() -> None:
        async def parts() -> Any:  # of no length told before
            yield body

        async with client(served) as http:
            for content in (body, parts()):
                reply = await http.post(CHAT, content=content, headers={"content-type": kind})
                assert reply.status_code == status
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

    run(work())


def test_hosts_origins_headers_and_addresses(served: Service) -> None:
    async def work() -> None:
        async with client(served) as http:
            for host, status in (("evil.example", 421), ("localhost:81", 200), ("127.0.0.1", 200), ("[::1]:80", 200)):
                assert (await http.get("/v1/models", headers={"host": host})).status_code == status
            for origin, status in (("http://evil.example", 403), ("null", 403), ("http://localhost", 200)):
                reply = await http.post(CHAT, json=said("Hi", max_tokens=1), headers={"origin": origin})
                assert reply.status_code == status
                assert "access-control-allow-origin" not in reply.headers
            for path, status in (("/nothing", 404), ("/v1/models/other", 404), ("/v1/models/tiny", 200)):
                reply = await http.get(path)
                assert reply.status_code == status
                assert reply.headers["x-content-type-options"] == "nosniff"
                assert "default-src 'none'" in reply.headers["content-security-policy"]
            wrong = await http.get(CHAT)
            assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
            served.scheduler.load = None  # type: ignore[method-assign,assignment]
            broken = await http.get("/v1/load")
            assert broken.status_code == 500
            assert broken.json()["error"]["code"] == "internal_error"
            assert "None" not in broken.text.replace("null", "")

    run(work())


def test_the_description_says_what_is_there(served: Service) -> None:
    async def work() -> None:
        async with client(served) as http:
            found = (await http.get("/openapi.json")).json()
            text = json.dumps(found)
            for reference in set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', text)):
                assert reference in found["components"]["schemas"], reference
            for path, operations in found["paths"].items():
                for operation in operations.values():
                    assert "422" not in operation["responses"], path
                    assert operation["operationId"]
            assert {"application/json", "multipart/form-data"} == set(
                found["paths"]["/v1/documents"]["post"]["requestBody"]["content"]
            )
            assert "text/event-stream" in found["paths"][CHAT]["post"]["responses"]["200"]["content"]
            for page in ("/docs", "/redoc"):  # they would fetch scripts from elsewhere
                assert (await http.get(page)).status_code == 404

    run(work())
