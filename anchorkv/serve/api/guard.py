"""What every request passes first: the host it names, its size, its time; and what goes on every response."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anchorkv.serve.api.errors import reply
from anchorkv.serve.refusals import Refused

log = logging.getLogger("anchorkv.serve")
_HEADERS = {
    "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin", "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()", "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
"""What a response does not say itself."""
_SAFE = ("GET", "HEAD", "OPTIONS")


class Guard:
    """ASGI middleware. A web page elsewhere can reach this server through its reader's browser, so the host must be one
    of ours, and what a page sends must come from a page of ours."""

    def __init__(
        self, app: ASGIApp, *, hosts: Sequence[str], body_bytes: int, upload_bytes: int, seconds: float
    ) -> None:
        """hosts: names that the Host header may have, without port; "*" for any, "*.x" for all below x.

        seconds: until a client has sent its request, or taken a piece of the answer.
        """
        self._app, self._hosts = app, [host.lower() for host in hosts]
        self._body, self._upload, self._seconds = body_bytes, upload_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refusal(scope)
        state = _State(receive, send, self._limit(scope), self._seconds)
        if refused is not None:
            await reply(refused)(scope, receive, state.send)
            return
        try:
            await self._app(scope, state.receive, state.send)
        except (_Cut, ClientDisconnect):
            pass
        except Exception:
            if state.refused is None and not state.stalled:
                log.exception("%s %s failed", scope["method"], scope["path"])
                state.refused = Refused(500, "The server failed; the fault is in its log.", code="internal_error")
        if state.stalled:
            log.warning("%s %s was cut off: its client does not read", scope["method"], scope["path"])
        elif state.refused is not None and not state.started:
            await reply(state.refused)(scope, receive, state.answer)

    def _refusal(self, scope: Scope) -> Refused | None:
        headers = Headers(scope=scope)
        if not self._known(headers.get("host", "")):
            return Refused(
                421, "This server does not go by the name in the Host header; its operator can allow it.", code="host",
            )
        origin = headers.get("origin")
        elsewhere = origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()
        if elsewhere and scope["method"] not in _SAFE:
            return Refused(403, "Requests from pages of other sites are not taken.", code="origin")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limit(scope):
            return _too_large(self._limit(scope))
        return None

    def _limit(self, scope: Scope) -> int:
        # A form has its own lines around the file.
        return self._upload + 2**16 if scope["path"] == "/v1/documents" else self._body

    def _known(self, host: str) -> bool:
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        name = name.lower().rstrip(".")
        return any(
            allowed in ("*", name) or (allowed.startswith("*.") and name.endswith(allowed[1:]))
            for allowed in self._hosts
        )


class _Cut(Exception):
    """The application need not go on: the state says why."""


class _State:
    """One request: what was read and sent of it, and the headers that every response gets."""

    def __init__(self, receive: Receive, send: Send, limit: int, seconds: float) -> None:
        self._receive, self._send, self._limit, self._seconds = receive, send, limit, seconds
        self._read, self._whole, self._until = 0, False, time.monotonic() + seconds
        self.started = self.stalled = False
        self.refused: Refused | None = None
        """Whatever the application makes of a body that it could not read, this is why."""

    async def receive(self) -> Message:
        if self._whole:  # all that comes now is the client's end
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._until - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            self.refused = Refused(408, f"The request did not come within {self._seconds:g} seconds.", code="timeout")
            raise _Cut from None
        self._read += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._read > self._limit:
            self.refused = _too_large(self._limit)
            raise _Cut
        return message

    async def send(self, message: Message) -> None:
        if self.refused is None:
            await self.answer(message)

    async def answer(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            self.stalled = True
            raise _Cut from None


def _too_large(limit: int) -> Refused:
    return Refused(413, f"The request is larger than {limit:,} bytes; send less.", code="request_too_large")
