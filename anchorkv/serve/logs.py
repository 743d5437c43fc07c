"""What the server writes to its log: one JSON object a line, or lines for a terminal. Standard logging throughout;
uvicorn's loggers go through it.

Every line of a request has its `request_id`, which the response's x-request-id repeats. API keys and passwords in URLs
are blotted out. Of an error whose message may quote what somebody sent, only its kind and place are told.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anchorkv.errors import AnchorKVError
from anchorkv.serve.auth import Principal
from anchorkv.serve.refusals import Refused
from anchorkv.serve.seams import Answered

LogForm = Literal["json", "text"]
request_id: ContextVar[str] = ContextVar("request_id", default="")
log = logging.getLogger("anchorkv.serve.requests")

_SECRETS = (
    (re.compile(r"\bak_([0-9a-f]{12})_[A-Za-z0-9_-]+"), r"ak_\1_***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), r"\1 ***"),
    (re.compile(r"(\w://[^\s:/@]*):[^\s/]*@"), r"\1:***@"),
    (re.compile(r"(?i)\b(password|passwd|secret|token)=[^\s&;,]+"), r"\1=***"),
)
_LONGEST = 2000
"""Characters of a message."""
_TELLING: tuple[type[BaseException], ...] = (
    AnchorKVError, OSError, MemoryError, NotImplementedError, ImportError, TypeError, AttributeError, ArithmeticError,
    RuntimeError,
)
"""Errors whose messages tell of the program. Those of others, ValueError and SQLAlchemy above all, may quote texts."""
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
"""Fields that every record has; the others were given as `extra`."""
_QUIET = ("/health/", "/metrics")
_CHATTY = ("httpx", "httpcore", "alembic", "sqlalchemy.engine", "bm25s")
"""Loggers of libraries that have nothing to say here below a warning."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def setup(level: str = "info", form: LogForm | None = None, stream: TextIO | None = None) -> logging.Handler:
    """Send all loggers of the process to `stream` (standard error), from `level` on. Returns the handler.

    form: None is text on a terminal, JSON elsewhere.
    """
    stream = sys.stderr if stream is None else stream
    as_json = form == "json" or (form is None and not stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    # At the handler, for libraries that are imported later choose a level for themselves.
    handler.setLevel(level.upper())
    handler.addFilter(_of_use)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.captureWarnings(True)
    return handler


def _of_use(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or not record.name.startswith(_CHATTY)


def clean(text: str) -> str:
    """`text` without secrets, and no longer than a log should have it."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as `extra`; libraries put fields of their own, with a "_", into every record."""
    given = vars(record).items()
    return {name: _plain(value) for name, value in given if name not in _OWN and not name.startswith("_")}



class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, request_id, what was given as `extra`, and the error."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(), "logger": record.name, "message": clean(record.getMessage()),
        }
        if number := request_id.get():
            found["request_id"] = number
        found |= _extra(record)
        if record.exc_info and record.exc_info[1] is not None:
            found["error"] = list(_told(record.exc_info[1]))
        return json.dumps(found, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """A line for people, and more below it where there was an error."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        number = f" [{request_id.get()[:12]}]" if request_id.get() else ""
        more = "".join(f" {name}={value}" for name, value in _extra(record).items())
        lines = [f"{when} {record.levelname.lower():7} {clean(record.getMessage())}{more}{number}"]
        if record.exc_info and record.exc_info[1] is not None:
            for error in _told(record.exc_info[1]):
                lines += [f"    {error['kind']}: {error['message']}", *(f"      {place}" for place in error["at"])]
        return "\n".join(lines)


def _told(error: BaseException) -> Iterator[dict[str, Any]]:
    """The error, and what it came from."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        telling = isinstance(found, _TELLING) and not isinstance(found, (ValueError, LookupError))
        message = clean(str(found)) if telling else "not shown, for it may quote a text"
        yield {"kind": type(found).__qualname__, "message": message, "at": _places(found.__traceback__)}
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _places(trace: TracebackType | None) -> list[str]:
    """Files, lines and functions, the newest last; no line of code, no value."""
    frames = traceback.extract_tb(trace, limit=-20)
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float)) else clean(str(value))


class RequestLog:
    """An `Observer`: a line for every answer and every refusal, with figures and ids and no text."""

    def answered(self, answered: Answered) -> None:
        outcome, question = answered.outcome, answered.question
        log.log(logging.ERROR if outcome.finish == "error" else logging.INFO, "answered", extra={
            "ask": outcome.id, "tenant": question.caller.tenant, "key": question.caller.key_id,
            "finish": outcome.finish, "policy": answered.plan.policy.name, "fallback_steps": len(answered.plan.steps),
            "prompt_tokens": outcome.prompt_tokens, "cached_tokens": outcome.cached_tokens,
            "completion_tokens": outcome.completion_tokens, "kept_cells": outcome.kept_cells,
            "full_cells": outcome.full_cells, "queue_seconds": round(outcome.queue_seconds, 3),
            "first_token_seconds": round(outcome.first_token_seconds, 3),
            "decode_seconds": round(outcome.decode_seconds, 3),
        })

    def refused(self, caller: Principal | None, refused: Refused) -> None:
        # Its sentence may quote what was sent; status and code say enough here.
        log.log(logging.WARNING if refused.status >= 500 else logging.INFO, "refused", extra={
            "status": refused.status, "code": refused.code or "", "tenant": caller.tenant if caller else "",
            "key": caller.key_id if caller else "",
        })


class RequestIds:
    """ASGI middleware, the outermost: gives every request its id, and writes a line when it is over.

    A caller's own x-request-id is taken where it is short and plain. The line has the path without its query.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        number = given if _ID.fullmatch(given) else uuid.uuid4().hex
        begun, status, size = time.perf_counter(), 0, 0

        async def answer(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = number
            size += len(message.get("body", b""))
            await send(message)

        token = request_id.set(number)
        try:
            await self._app(scope, receive, answer)
        finally:
            quiet = scope["path"].startswith(_QUIET) and status < 500
            log.log(logging.DEBUG if quiet else logging.INFO, "%s %s", scope["method"], scope["path"], extra={
                "status": status, "bytes": size, "seconds": round(time.perf_counter() - begun, 3),
                "client": scope["client"][0] if scope.get("client") else "",
            })
            request_id.reset(token)
