"""`anchorkv serve` on several machines, with Ray Serve.

    serve run deploy.ray_serve:build config=/etc/anchorkv/config.yaml replicas=2 most_replicas=8

Every replica is a whole server over an engine of its own. Documents lie in a folder that all of them see, records go to
one audit database, and a front sends each request to the replica that has the document (or the beginning of the
conversation) in memory: Ray's multiplexing, with documents in the place of models. Where that replica is gone or full,
another one opens the document from the folder.

An answer is passed on when it is whole, or piece by piece where it is streamed. A request whose replica dies before
anything of it was passed on is given to another one, so that callers notice nothing; the end of a broken stream is told
as an error. What was acknowledged is in the database or in the spool of the replica's numbered folder, which the next
replica with that number sends on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from anchorkv.errors import ConfigError
from anchorkv.serve.app import make_app
from anchorkv.serve.logs import setup
from anchorkv.serve.opening import opened
from anchorkv.serve.settings import ServeSettings
from anchorkv.serve.settings_file import sentence

log = logging.getLogger("anchorkv.serve")
HELD = 4096
"""Documents and conversations that a replica is remembered for."""
TRIES = 4
"""Replicas that are asked, one after the other, before a caller is told to come back."""
_DOCUMENT = re.compile(r"/v1/documents/([^/]+)")


class RaySettings(BaseModel):
    """What Ray decides; all else is in the settings of `anchorkv serve`."""

    model_config = ConfigDict(extra="forbid")

    config: Path | None = None
    """The YAML file of `anchorkv serve --config`; every machine must see its data folder and key file."""
    replicas: int = Field(2, ge=1)
    """Fewest."""
    most_replicas: int | None = Field(None, ge=1)
    """None: there are always `replicas`."""
    requests_per_replica: float = Field(16, gt=0)
    """With more than so many in progress, a replica is added."""
    fronts: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    """What Ray reserves for a replica."""


@dataclass(frozen=True)
class Start:
    """The head of a response."""

    status: int
    headers: list[tuple[bytes, bytes]]
    replica: str


@dataclass
class Reply:
    """A response that has begun, or all of it."""

    start: Start
    rest: AsyncIterator[Start | bytes] | None = None
    body: bytes = b""

    @property
    def headers(self) -> dict[str, str]:
        own = {"content-length", "transfer-encoding", "connection"}
        pairs = ((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in self.start.headers)
        return {**{name: value for name, value in pairs if name not in own}, "x-anchorkv-replica": self.start.replica}


# --- a replica -----------------------------------------------------------------------------------------------------


class Replica:
    """One server, without a port of its own."""

    def __init__(self, settings: ServeSettings) -> None:
        setup(settings.log_level)
        self._stack, self._sync = AsyncExitStack(), ExitStack()
        self.number, own = self._place(settings)
        self.service = self._sync.enter_context(opened(own))
        self.app = make_app(self.service, settings.hosts)
        self._ready = asyncio.Lock()
        self._started = False

    def _place(self, settings: ServeSettings) -> tuple[int, ServeSettings]:
        """The first numbered folder that no other replica uses; an earlier one's spool in it is sent on."""
        shared = settings.data.expanduser().resolve()
        (shared / "documents").mkdir(parents=True, exist_ok=True)
        for number in range(10_000):
            folder = shared / "replicas" / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / "lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            self._sync.callback(lock.release)
            if not (folder / "documents").is_symlink():
                (folder / "documents").symlink_to(shared / "documents", target_is_directory=True)
            (folder / "pid").write_text(str(os.getpid()))
            audit = settings.audit.model_copy(update={"database": SecretStr(settings.audit_database)})
            return number, settings.model_copy(update={"data": folder, "keys": settings.keys_file, "audit": audit})
        raise RuntimeError(f"All numbered folders in {shared / 'replicas'} are in use; is the folder's lock working?")

    @serve.multiplexed(max_num_models_per_replica=HELD)  # type: ignore[untyped-decorator]
    async def hold(self, key: str) -> str:
        """Ray remembers that this replica has `key`."""
        return key

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Start | bytes]:
        """The head of the response, then its body as it comes."""
        await self._start()
        key = serve.get_multiplexed_model_id()
        if key.startswith("server-"):
            if key != f"server-{self.number}":
                yield Start(404, [], str(self.number))
                return
        elif key:
            await self.hold(key)
        sent: asyncio.Queue[Any] = asyncio.Queue()
        gone = asyncio.Event()
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if given:
                return given.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self.app({**scope, "type": "http", "app": self.app, "state": {}}, receive, sent.put)
            finally:
                sent.put_nowait(None)

        task = asyncio.ensure_future(run())
        whole, status = b"", 0
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    yield Start(status, [tuple(pair) for pair in message["headers"]], str(self.number))
                elif message.get("body"):
                    if scope["path"] == "/v1/documents" and scope["method"] == "POST":
                        whole += message["body"]
                    yield message["body"]
            await task
            if whole and status == 200:
                await self.hold(json.loads(whole)["id"])
        finally:
            gone.set()
            with contextlib.suppress(Exception):
                await asyncio.wait({task}, timeout=5)
            task.cancel()

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if self._started and not self.service.scheduler.alive:
            raise RuntimeError("The engine thread does not run any more.")

    async def _start(self) -> None:
        async with self._ready:
            if not self._started:
                await self._stack.enter_async_context(self.app.router.lifespan_context(self.app))
                await self.hold(f"server-{self.number}")
                self._started = True

    async def __del__(self) -> None:
        """Ray calls it when no request is in progress any more."""
        await self.service.drain()
        await self._stack.aclose()
        self._sync.close()


# --- the front -----------------------------------------------------------------------------------------------------


class Front:
    """Takes HTTP, chooses the replica, passes everything through."""

    def __init__(self, replicas: DeploymentHandle[Any], most_bytes: int) -> None:
        self._replicas, self._most = replicas.options(stream=True, method_name="answer"), most_bytes

    async def __call__(self, request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > self._most:
                return _error(413, f"The request is larger than {self._most:,} bytes; send less.", "request_too_large")
        key = key_of(request.url.path, request.headers.get("authorization", ""), body)
        if request.url.path == "/metrics":
            number = request.query_params.get("server", "")
            if not number.isdecimal():
                return _error(400, "Every replica has its own metrics; ask for /metrics?server=0 and so on.", "server")
            key = f"server-{number}"
        scope = {name: request.scope[name] for name in (
            "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client",
            "server",
        ) if name in request.scope}
        for attempt in range(TRIES):
            try:
                found = await self._ask(scope, body, key)
            except (RayError, RayServeException) as error:
                log.warning("A replica did not answer, try %d: %s", attempt + 1, type(error).__name__)
                await asyncio.sleep(0.1 * 2**attempt)
                continue
            if found.rest is None:
                return Response(found.body, found.start.status, found.headers)
            return StreamingResponse(_stream(found.rest), found.start.status, found.headers)
        return _error(503, "No replica answers now; try again later.", "no_replica", retry_after=5)

    async def _ask(self, scope: dict[str, Any], body: bytes, key: str) -> Reply:
        """A stream as it begins, any other response when it is whole. Raises RayError where the replica fails."""
        pieces: Any = self._replicas.options(multiplexed_model_id=key).remote(scope, body)
        try:
            start = await anext(pieces)
            reply = Reply(start, pieces)
            if reply.headers.get("content-type", "").startswith("text/event-stream"):
                return reply
            return Reply(start, body=b"".join([part async for part in pieces]))
        except BaseException:
            pieces.cancel()
            raise


async def _stream(pieces: Any) -> AsyncIterator[bytes]:
    try:
        async for piece in pieces:
            yield piece
    except (RayError, RayServeException):
        said = {"error": {"message": "The server that wrote this is gone; ask again.", "code": "replica_lost"}}
        yield f"data: {json.dumps(said)}\n\n".encode()
    finally:
        pieces.cancel()


def key_of(path: str, authorization: str, body: bytes) -> str:
    """What the request is about: a document, or the beginning of a conversation; "" where any replica will do."""
    if found := _DOCUMENT.match(path):
        return found[1]
    if path not in ("/v1/chat/completions", "/v1/completions"):
        return ""
    try:
        asked = json.loads(body)
        own = asked.get("anchorkv") or {}
        if isinstance(own.get("document"), str):
            return str(own["document"])
        messages = asked.get("messages")
        begin = messages[0] if messages else str(asked["prompt"])[:1000]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return ""  # the replica will say what is wrong with it
    digest = hashlib.sha256(f"{authorization}\n{json.dumps(begin)}".encode("utf-8", "replace")).hexdigest()
    return f"begin-{digest[:24]}"


def _error(status: int, message: str, code: str, retry_after: int | None = None) -> JSONResponse:
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    return JSONResponse({"error": {"message": message, "type": "server_error", "code": code}}, status, headers)


# --- put together --------------------------------------------------------------------------------------------------


def build(args: dict[str, Any]) -> serve.Application:
    """For `serve run`. args: of `RaySettings`. Raises ConfigError, one sentence, for what cannot be used."""
    try:
        given = RaySettings.model_validate(args)
    except ValidationError as error:
        raise ConfigError(sentence(error, RaySettings)) from None
    settings = ServeSettings.load(given.config)
    scaling: dict[str, Any] = {"num_replicas": given.replicas}
    if given.most_replicas is not None and given.most_replicas > given.replicas:
        scaling = {"autoscaling_config": {
            "min_replicas": given.replicas, "max_replicas": given.most_replicas,
            "target_ongoing_requests": given.requests_per_replica, "downscale_delay_s": 600,
        }}
    replicas = serve.deployment(
        name="replica", max_ongoing_requests=settings.max_sessions + settings.max_waiting, health_check_period_s=5,
        graceful_shutdown_timeout_s=settings.drain_seconds + 15,
        ray_actor_options={"num_cpus": given.cpus, "num_gpus": given.gpus}, **scaling,
    )(Replica)
    front = serve.deployment(
        name="front", num_replicas=given.fronts, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0.1},
    )(Front)
    most = max(settings.requests.bytes, settings.requests.upload_bytes + 2**16)
    return front.bind(replicas.bind(settings), most)
