"""Every error that leaves the server: one sentence in OpenAI's form, with the right status. Never a list or a trace."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from anchorkv.errors import AnchorKVError
from anchorkv.serve.refusals import Refused, refusal


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str = Field(description="one sentence: what is wrong and what to do")
    type: str
    param: str | None = Field(default=None, description="the field at fault")
    code: str | None = None


class ErrorReply(BaseModel):
    """What every failed request gets."""

    error: ErrorBody


_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
    421: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error",
}
_SAID = {
    404: "There is no such address on this server; GET /openapi.json lists those there are.",
    405: "This address does not take this method; GET /openapi.json says which it takes.",
}
_TELLS: dict[int, str] = {
    400: "A field is wrong", 401: "The API key is missing or wrong", 403: "This key may not do that",
    404: "There is no such thing", 408: "The request did not come in time", 413: "The request is too large",
    421: "The server does not go by this name", 429: "Too many requests; see Retry-After",
    500: "The server failed; the fault is in its log",
    503: "The server cannot take requests now; see Retry-After", 504: "The request took too long",
}


def describe(operation: dict[str, Any]) -> None:
    """Add to an operation of the OpenAPI description what any request may get, and when to come back."""
    found = operation["responses"]
    found.pop("422", None)  # nothing here answers with a list of pydantic's problems
    for status in (*_ANYWHERE, *((401, 403, 429) if operation.get("security") else ())):
        found.setdefault(str(status), {"description": _TELLS[status], "content": _CONTENT})
    for status in found.keys() & {"429", "503"}:
        if found[status].get("content") == _CONTENT:
            found[status]["headers"] = {"Retry-After": {
                "required": True, "description": "seconds", "schema": {"type": "integer", "minimum": 1},
            }}


_ANYWHERE = (408, 413, 421, 500)
_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI description: these statuses carry an `ErrorReply`."""
    return {status: {"model": ErrorReply, "description": _TELLS[status]} for status in statuses}


def body_of(refused: Refused) -> dict[str, Any]:
    """As JSON."""
    kind, param = _TYPES.get(refused.status, "server_error"), refused.param
    return {"error": {
        "message": _line(str(refused)), "type": kind, "param": None if param is None else _line(param),
        "code": refused.code,
    }}


def _line(text: str) -> str:
    """As it can be shown: errors quote what was sent, which may break lines, turn them round or ring bells."""
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


def reply(refused: Refused) -> JSONResponse:
    """As a response; `Retry-After` where the caller may come back, in whole seconds."""
    headers = {}
    if refused.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refused.retry_after)))
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refused.status == 413:
        headers["Connection"] = "close"  # the rest of the body is not read
    return JSONResponse(body_of(refused), refused.status, headers)


def sentence(problems: Sequence[Mapping[str, Any]]) -> Refused:
    """The first of pydantic's problems as one sentence."""
    if not problems:
        return Refused(400, "The request is not valid.")
    problem = problems[0]
    where = [str(part) for part in problem.get("loc", ()) if part not in ("body", "query", "path", "header")]
    kind, what = str(problem.get("type", "")), str(problem.get("msg", "")).removeprefix("Value error, ").rstrip(".")
    if kind in ("json_invalid", "model_attributes_type", "dict_type") and len(where) < 2 and "body" in problem["loc"]:
        return Refused(400, "The body is not a JSON object; send one, as application/json.", code="invalid_json")
    param = _name(where)
    if kind == "missing":
        message = f"'{param}' is missing; give it." if param else "The body is missing; send a JSON object."
        return Refused(400, message, param=param, code="missing_field")
    if kind == "extra_forbidden":
        return Refused(400, f"There is no field '{param}'; leave it out.", param=param, code="unknown_field")
    if kind == "value_error" or not param:  # our own words name what is wrong already
        return Refused(400, f"{what}.", param=param, code="invalid_value")
    what = what[:1].lower() + what[1:]
    return Refused(400, f"'{param}' is not valid: {what}.", param=param, code="invalid_value")


_BRANCHES = ("str", "int", "float", "bool", "list[", "function-", "constrained-", "dict[", "nullable", "tagged-union")


def _name(where: Sequence[str]) -> str | None:
    """`messages[0].content`; without the names that pydantic gives the branches of a union."""
    name = ""
    for part in where:
        if part.isdigit():
            name += f"[{part}]"
        elif not part.startswith(_BRANCHES) and not part[:1].isupper():
            name += f".{part}" if name else part
    return name[:120] or None


def install(app: FastAPI) -> None:
    """Have `app` answer every error so; what nobody expected is the guard's."""

    async def known(_: Request, error: Exception) -> Response:
        return reply(refusal(error) if isinstance(error, AnchorKVError) else Refused(500, str(error)))

    async def invalid(_: Request, error: Exception) -> Response:
        return reply(sentence(error.errors() if isinstance(error, RequestValidationError) else []))

    async def http(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        said = str(error.detail) if isinstance(error, HTTPException) else ""
        answer = reply(Refused(status, _SAID.get(status, said.rstrip(".") + ".")))
        if isinstance(error, HTTPException) and error.headers:
            answer.headers.update(error.headers)
        return answer

    app.add_exception_handler(AnchorKVError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)

