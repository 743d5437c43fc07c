"""`anchorkv serve` as its users meet it: a process on a port, the official client, two others, SIGTERM, a hang-up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_gguf
import typer
from serving import STORY, keys
from typer.testing import CliRunner
from waiting import listening

from anchorkv.cli.app import _Program
from anchorkv.cli.serve import serve

openai = pytest.importorskip("openai")
PROGRAM = "from test_serve_clients import program; program()()"
CONFIG = "bounds: {policies: [paper-ep]}\nrequests: {seconds: 60}\ndrain_seconds: 20\nmax_sessions: 8\n"


def program() -> typer.Typer:
    """The command alone, as the program has it."""
    app = typer.Typer(cls=_Program, pretty_exceptions_enable=False)
    app.command()(serve)
    app.callback()(lambda: None)
    return app


class Process:
    """A server on a free port of this machine."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.config = folder / "serve.yaml"
        self.config.write_text(CONFIG)
        model = folder / "tiny.gguf"
        if not model.exists():
            tiny_gguf.write(model)
        self.log = folder / "log.txt"
        command = [
            sys.executable, "-c", PROGRAM, "serve", "--config", str(self.config), "--model", str(model),
            "--threads", "1", "--port", "0", "--cells", "4096", "--data", str(folder / "data"), *options,
        ]
        with self.log.open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.url = listening(self.process, self.log)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    found = Process(tmp_path_factory.mktemp("server"))
    yield found
    assert found.stop() == 0, found.log.read_text()
    assert "Traceback" not in found.log.read_text()


@pytest.fixture
def client(server: Process) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def asked(text: str = STORY) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 10, "seed": 1}


def test_it_says_what_it_runs(server: Process) -> None:
    said = server.log.read_text()
    for words in ("Model tiny", "Policy own; a request may name: paper-ep, full", "4,096 KV cells",
                  "8 requests at once", "API keys are off", "hashes without text"):
        assert words in said


def test_openai_models_chat_and_completions(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "anchorkv"
    more = {"logprobs": True, "top_logprobs": 2, "n": 2, "extra_body": {"ignore_eos": True}}
    reply = client.chat.completions.create(**asked(), **more)
    assert len(reply.choices) == 2
    assert reply.usage.completion_tokens == 20
    assert len(reply.choices[0].logprobs.content) == 10
    assert reply.model_extra["anchorkv"]["cells"]["full"] == reply.usage.prompt_tokens + 10
    text = client.completions.create(model="tiny", prompt="The mill", max_tokens=5, logprobs=1)
    assert text.choices[0].finish_reason in ("stop", "length")
    raw = client.chat.completions.with_raw_response.create(**asked(), extra_body={"anchorkv": {"policy": "paper-ep"}})
    assert raw.headers["x-anchorkv-policy"] == "paper-ep"
    assert raw.parse().usage.prompt_tokens_details.cached_tokens == 0


def test_openai_streams(client: Any) -> None:
    whole = client.chat.completions.create(**asked(), extra_body={"ignore_eos": True})
    chunks = list(client.chat.completions.create(
        **asked(), stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    ))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 10
    assert chunks[-1].model_extra["anchorkv"]["cells"]["kept"] > 0
    parts = list(client.completions.create(model="tiny", prompt="The mill", max_tokens=5, stream=True))
    assert parts[-1].choices[0].finish_reason in ("stop", "length")


def test_openai_json_and_errors(client: Any) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    reply = client.chat.completions.create(**{**asked(), "max_tokens": 200}, response_format={
        "type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True},
    })
    assert json.loads(reply.choices[0].message.content)["colour"] in ("red", "blue")
    for change, kind in (
        ({"model": "gpt-4"}, openai.NotFoundError), ({"temperature": 9}, openai.BadRequestError),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError),
        ({"extra_body": {"anchorkv": {"policy": {"sinks": 3}}}}, openai.PermissionDeniedError),
    ):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{**asked(), **change})
        assert caught.value.body["message"].endswith(".")


def test_documents_with_the_official_client(client: Any, server: Process) -> None:
    made = httpx.post(f"{server.url}/v1/documents", files={"file": ("mill.md", STORY * 2)}, timeout=60).json()
    reply = client.chat.completions.create(**asked("Who sold it?"), extra_body={"anchorkv": {"document": made["id"]}})
    assert reply.usage.prompt_tokens_details.cached_tokens == made["tokens"]


def test_who_hangs_up_is_not_answered_further(client: Any, server: Process) -> None:
    for stream in (True, False):
        with contextlib.suppress(openai.APITimeoutError):
            reply = client.with_options(timeout=30 if stream else 0.5).chat.completions.create(
                **{**asked(), "max_tokens": 2000}, stream=stream, extra_body={"ignore_eos": True}
            )
            next(iter(reply))
            reply.close()
        deadline = time.monotonic() + 10
        while (load := httpx.get(f"{server.url}/v1/load").json())["sessions"] or load["requests"]:
            assert time.monotonic() < deadline, load
            time.sleep(0.05)
        newest = httpx.get(f"{server.url}/v1/audit", params={"limit": 1}).json()["data"][0]
        assert newest["details"]["finish"] == "cancelled"
        assert newest["figures"]["completion_tokens"] < 2000


def test_simon_willisons_llm(server: Process, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: tiny\n  api_base: {server.url}/v1\n  api_key_name: none\n"
    )
    for options in ([], ["--no-stream"]):
        found = subprocess.run(
            [sys.executable, "-m", "llm", "-m", "here", "-o", "max_tokens", "8", "-o", "seed", "2", *options, "Hello."],
            env={**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}, capture_output=True,
            timeout=120, check=False,
        )
        assert found.returncode == 0, found.stderr.decode()
        assert found.stdout.strip()


def test_langchain(server: Process) -> None:
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", max_tokens=8, seed=3, temperature=0,
        extra_body={"ignore_eos": True},
    )
    whole = chat.invoke("Hello there.")
    assert whole.usage_metadata["output_tokens"] == 8
    assert "".join(part.content for part in chat.stream("Hello there.")) == whole.content


def test_watch_and_metrics_are_wired(client: Any, server: Process) -> None:
    client.chat.completions.create(**asked())
    told = httpx.get(f"{server.url}/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    line = next(line for line in told.text.splitlines() if "request_kept_cells" in line and line[0] != "#")
    assert float(line.split()[-1]) > 0
    assert httpx.get(f"{server.url}/v1/watch").json()["counts"]
    assert '"answered"' in server.log.read_text()


def test_sigterm_lets_a_stream_end_and_exits_with_0(tmp_path: Path) -> None:
    server = Process(tmp_path)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        **{**asked(), "max_tokens": 4000}, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert httpx.get(f"{server.url}/health/ready").json() == {"status": "stopping"}
    with pytest.raises(openai.InternalServerError, match="stopping"):
        client.chat.completions.create(**asked())
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.process.wait(30) == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


def test_keys_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    texts = keys(tmp_path / "data", ("acme", "user"))
    server = Process(tmp_path)
    try:
        assert "API keys are on" in server.log.read_text()
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0).models.list()
        key = texts["acme", "user"]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        assert client.chat.completions.create(**asked("Hi")).usage.prompt_tokens > 0
        assert key not in server.log.read_text()
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize(("options", "words"), [
    (["--cells", "4096", "--kv-bytes", "1GiB"], "cells or kv_bytes"), (["--host", "0.0.0.0"], "API keys"),
    (["--policy", "best"], "no policy 'best'"), (["--model", "/nowhere.gguf"], "no model file"),
    (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
])
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path: Path, options: list[str], words: str) -> None:
    found = CliRunner().invoke(program(), ["serve", "--data", str(tmp_path), "--port", "0", *options])
    assert found.exit_code == 2, found.output
    assert words in found.output.replace("\n", " ")
    assert not found.output.count("Traceback")


def test_a_taken_port_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        found = CliRunner().invoke(program(), ["serve", "--data", str(tmp_path), "--port", port])
    assert found.exit_code == 2
    assert f"Port {port}" in found.output


def test_it_prints_its_settings(tmp_path: Path) -> None:
    found = CliRunner().invoke(program(), ["serve", "--data", str(tmp_path), "--cells", "512", "--print-config"])
    assert found.exit_code == 0, found.output
    assert "cells: 512" in found.output
