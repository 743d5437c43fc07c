"""The guard alone: bodies that never come or never end, and clients that never read."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from anchorkv.serve.api.guard import Guard

HOST = (b"host", b"localhost")


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the size of the body, and with 400 where it cannot be read, as frameworks do."""
    try:
        body = await Request(scope, receive).body()
    except Exception:
        await PlainTextResponse("broken", 400)(scope, receive, send)
        return
    await PlainTextResponse(str(len(body)))(scope, receive, send)


class Endless:
    """Streams for ever; notes that it was ended."""

    def __init__(self) -> None:
        self.ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pieces() -> Any:
            try:
                while True:
                    yield b"x" * 1000
                    await asyncio.sleep(0)
            finally:
                self.ended = True

        await StreamingResponse(pieces())(scope, receive, send)


async def call(app: Any, parts: Sequence[bytes | None], reads: int = 10**9, headers: Sequence[Any] = ()) -> list[Any]:
    """What was sent. parts: of the body; None: nothing comes any more. reads: messages that the client takes."""
    left, sent = list(parts), []

    async def receive() -> Any:
        part = left.pop(0) if left else None
        if part is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    async def send(message: Any) -> None:
        if len(sent) >= reads:
            await asyncio.Event().wait()
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [HOST, *headers],
        "query_string": b"", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
    }
    guard = Guard(app, hosts=("localhost",), body_bytes=100, upload_bytes=200, seconds=0.2)
    await asyncio.wait_for(guard(scope, receive, send), 5)
    return sent


@pytest.mark.parametrize(("parts", "status"), [
    ((b"x" * 100,), 200), ((b"x" * 60, b"x" * 40), 200), ((b"x" * 101,), 413), ((b"x" * 60, b"x" * 60, b"x" * 60), 413),
    ((b"x", None), 408), ((None,), 408),
])
def test_bodies(parts: Sequence[bytes | None], status: int) -> None:
    sent = asyncio.run(call(echo, parts))
    assert sent[0]["status"] == status
    assert (b"x-content-type-options", b"nosniff") in sent[0]["headers"]
    if status != 200:
        assert set(json.loads(sent[1]["body"])["error"]) == {"message", "type", "param", "code"}


def test_a_length_that_is_told_is_believed_when_it_is_too_large() -> None:
    sent = asyncio.run(call(echo, (None,), headers=[(b"content-length", b"101")]))
    assert sent[0]["status"] == 413


def test_a_client_that_never_reads_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    app = Endless()
    with caplog.at_level(logging.WARNING):
        sent = asyncio.run(call(app, (b"",), reads=3))
    assert app.ended
    assert len(sent) == 3
    assert "does not read" in caplog.text


def test_what_nobody_expected_is_one_sentence_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret")

    sent = asyncio.run(call(broken, (b"",)))
    assert sent[0]["status"] == 500
    assert "secret" not in str(sent)
    assert "secret" in caplog.text
