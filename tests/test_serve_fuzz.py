"""Malformed requests against the whole application: made from its own OpenAPI description, and by hand.

Whatever is sent, the answer is one that is described, an error is one sentence, nothing goes on running, and the server
answers the next good request as before.
"""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import httpx
import pytest
import serving
from fake_engine import FakeEngine
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from serving import said

from anchorkv.errors import DocumentError
from anchorkv.extract import extract
from anchorkv.serve.settings_groups import RequestLimits

# A part of a form that never ends is starlette's, which leaves it to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
requests = pytest.importorskip("requests")
schemathesis = pytest.importorskip("schemathesis")

CHAT, TEXT, DOCUMENTS = "/v1/chat/completions", "/v1/completions", "/v1/documents"
BOUNDS = RequestLimits.model_validate({
    "bytes": 200_000, "upload_bytes": 100_000, "max_tokens": 16, "default_tokens": 4, "answers": 3, "seconds": 20,
})
INSIDE = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|/home/|/tmp/|/usr/|<class |<function |object at 0x|pydantic|sqlalchemy|"
    r"sqlite|starlette|Exception|Error\(|NoneType|PosixPath"
)
"""What an error would tell of the program. Nothing that is sent here has it, for errors quote what was sent."""
QUICK = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Sent(NamedTuple):
    """A request."""

    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    content: bytes = b""


class Target:
    """The application on an event loop of its own, and what came of what was sent to it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.service = serving.service(folder, FakeEngine(), bounds=BOUNDS, **options)
        self.seen: Counter[int] = Counter()
        self.headers: dict[str, str] = {}
        self._documents: set[str] = set()
        self._runner, self._stack = asyncio.Runner(), AsyncExitStack()
        self._http = self._runner.run(self._stack.enter_async_context(serving.client(self.service)))

    def send(self, method: str, path: str, headers: Any = None, **content: Any) -> httpx.Response:
        """Raises AssertionError for an answer that no request should get."""
        url = self._http.base_url.copy_with(raw_path=path.encode())
        answer: httpx.Response = self._runner.run(self._http.request(method, url, headers=headers, **content))
        self.seen[answer.status_code] += 1
        proper(answer)
        if answer.status_code == 200 and path.startswith(DOCUMENTS):
            if method == "POST":
                self._documents.add(answer.json()["id"])
            elif method == "DELETE":
                self._documents.remove(answer.json()["id"])
        return answer

    def at_rest(self) -> None:
        """Nothing runs, nothing is there that was not acknowledged, and good requests are answered."""
        service, end = self.service, time.monotonic() + 30
        while service.running or service._tasks or (load := service.scheduler.load()).sessions or load.waiting:
            assert time.monotonic() < end, "a request that was answered still runs"
            self._runner.run(asyncio.sleep(0.01))
        for tenant in service.limits._tenants:
            usage = service.limits.usage(tenant)
            assert (usage.running, usage.cells) == (0, 0)
        found = self.send("GET", DOCUMENTS, self.headers).json()["data"]
        assert {document["id"] for document in found} == self._documents
        for number in list(self._documents):
            assert self.send("DELETE", f"{DOCUMENTS}/{number}", self.headers).status_code == 200
        answer = self.send("POST", CHAT, self.headers, json=said("Who built the mill?", max_tokens=4))
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert service.trail.store.verify().sound
        assert (service.trail.waiting, service.trail.trouble) == (0, "")

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()


def proper(answer: httpx.Response) -> None:
    """Never a fault of the server; an error is one sentence in OpenAI's form, without the program's inside."""
    status = answer.status_code
    assert status < 500 or status == 503, answer.text
    assert status not in (429, 503) or int(answer.headers["retry-after"]) > 0
    assert answer.headers["x-content-type-options"] == "nosniff"
    if status < 400 or answer.request.method == "HEAD":
        return
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    message = found["error"]["message"]
    assert re.fullmatch(r"[^\n\r]{5,600}[.]", message), message
    assert not INSIDE.search(message), message


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anchorkv.serve.extraction._run", in_this_process)
        found = Target(tmp_path_factory.mktemp("fuzz"))
        yield found
        found.close()


async def in_this_process(data: bytes, suffix: str, seconds: float, most: int) -> bytes:
    """A process for each of a thousand files takes too long here; test_serve_extraction.py has real ones."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix or '.txt'}"
        path.write_bytes(data)
        try:
            return json.dumps({"text": extract(path)}).encode()
        except DocumentError as error:
            return json.dumps({"error": str(error).replace(str(path), "The file")}).encode()


# --- from the description -----------------------------------------------------------------------------------------


def conforms(target: Target, examples: int) -> None:
    """Send good and bad requests of every operation. Raises for an answer that the description does not have."""
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as openapi

    wanted = [
        checks.not_a_server_error, openapi.status_code_conformance, openapi.content_type_conformance,
        openapi.response_schema_conformance, openapi.response_headers_conformance,
    ]
    schema = schemathesis.openapi.from_dict(target.send("GET", "/openapi.json").json())

    def ask(case: Any) -> None:
        try:
            made = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
        except (requests.RequestException, UnicodeError):  # no client can send it
            assume(False)
        headers = {**made.headers, **target.headers}
        answer = target.send(made.method, made.path_url, headers, content=made.body or b"")
        case.validate_response(answer, checks=wanted)

    for found in schema.get_all_operations():
        operation = found.ok()
        takes = bool(operation.body) or any(True for _ in operation.iter_parameters())
        for mode in schemathesis.GenerationMode if takes else (schemathesis.GenerationMode.POSITIVE,):
            cases = operation.as_strategy(generation_mode=mode)
            settings(QUICK, max_examples=examples if takes else 1)(given(case=cases)(ask))()


# --- by hand ------------------------------------------------------------------------------------------------------

Strategy = st.SearchStrategy[Any]
JSON = (b"content-type", b"application/json")
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
"""Half surrogates and control characters too."""
NUMBERS = st.sampled_from([
    0, -1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**400, 1e308, -1e308, 5e-324, -0.0, float("nan"),
    float("inf"), float("-inf"), 0.1, True, False, None,
])
JUNK: Strategy = st.recursive(
    NUMBERS | ANY_TEXT, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=8,
)
WHOLE: dict[str, dict[str, Any]] = {
    CHAT: {
        **said("Who built the mill?", max_tokens=2), "model": "tiny", "n": 1, "stop": ["."], "temperature": 0.5,
        "top_p": 0.9, "top_k": 5, "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"97": 1.0},
        "logprobs": True, "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True},
        "anchorkv": {"policy": "paper-ep", "recall": "off", "quality": "normal", "explain": True},
    },
    TEXT: {
        "prompt": ["The mill", "The wheel"], "max_tokens": 2, "seed": 1, "logprobs": 1, "stream": False, "top_p": 1,
        "anchorkv": {"reduction": 4, "explain": True},
    },
    DOCUMENTS: {"text": serving.STORY, "title": "Mill", "anchorkv": {"policy": "own"}},
}
"""Requests that are answered."""
FIELDS = ("response_format", "document", "area", "tools", "audio", "echo", "max_completion_tokens")
SHAPES = st.sampled_from([
    {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}},
])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


@st.composite
def bodies(draw: st.DrawFn) -> Sent:
    """Whole requests with something wrong in one place or two."""
    path = draw(st.sampled_from(list(WHOLE)))
    body: Any = copy.deepcopy(WHOLE[path])
    for _ in range(draw(st.integers(1, 2))):
        *where, last = draw(st.sampled_from(places(body)[1:] or [("more",)]))
        part = body
        for key in where:
            part = part[key]
        what = draw(st.sampled_from(("other", "gone", "more")))
        if what == "gone":
            del part[last]
        elif what == "more" and isinstance(part, dict):
            part[draw(ANY_TEXT | st.sampled_from(FIELDS))] = copy.deepcopy(draw(JUNK | SHAPES))
        else:
            part[last] = copy.deepcopy(draw(JUNK))
    plain = draw(st.booleans())
    return Sent("POST", path, [JSON], json.dumps(body, ensure_ascii=plain).encode("utf-8", "surrogatepass"))


@st.composite
def raw(draw: st.DrawFn) -> Sent:
    """Bodies that are no JSON, or not in the encoding that they say."""
    path = draw(st.sampled_from(list(WHOLE)))
    text = json.dumps(WHOLE[path])
    body = text.encode()
    at = draw(st.integers(0, len(body)))
    depth = draw(st.sampled_from((10, 500, 5_000, 60_000)))
    body = draw(st.sampled_from([
        body[:at], body[at:], body[:at] + draw(st.binary(max_size=8)) + body[at:], body + body, b"", body + b"\0",
        text.encode("utf-16"), text.encode("utf-32-be"), b"\xef\xbb\xbf" + body, gzip.compress(body), b"[" * depth,
        b'{"a":' * depth, b'{"messages":' + b"[" * depth + b"]" * depth + b"}", b"null", b"NaN", b"1e999", b'"x"',
        b"9" * 5000, body.replace(b"{", b'{"model":"tiny","model":"x",', 1), draw(st.binary(max_size=60)),
    ]))
    kind = draw(st.sampled_from([
        b"application/json", b"application/json; charset=utf-16", b"application/json;charset=\xff", b"text/plain", b"",
        b"application/x-www-form-urlencoded", b"multipart/form-data", b"application/vnd.api+json", b"a/b/c", b";;=",
    ]))
    return Sent("POST", path, [(b"content-type", kind)], body)


NAMES = (
    b"accept", b"accept-encoding", b"accept-language", b"authorization", b"connection", b"content-encoding",
    b"content-length", b"content-type", b"cookie", b"expect", b"host", b"if-none-match", b"origin", b"range",
    b"referer", b"transfer-encoding", b"upgrade", b"x-forwarded-for", b"x-request-id", b"x-http-method-override",
)
VALUES = st.binary(max_size=40).map(lambda value: re.sub(rb"[\x00-\x1f\x7f]", b"", value)) | st.sampled_from([
    b"-1", b"999999999999999999999", b"1e9", b"chunked", b"gzip", b"localhost", b"localhost:99999", b"[::1", b"*",
    b"..", b"Bearer", b"Bearer  x", b"Basic Og==", b"Bearer \xff\xfe", b"bytes=0-,-1", b"http://localhost",
    b"a" * 20_000, b"application/json; " * 500, b"anchorkv_lang=\"; lang=ja", b"100-continue",
])


@st.composite
def heads(draw: st.DrawFn) -> Sent:
    """Headers that no client sends, with requests that are good otherwise."""
    method, path, content = draw(st.sampled_from([
        ("POST", CHAT, json.dumps(said("Hello.", max_tokens=1)).encode()), ("GET", "/v1/models", b""),
        ("GET", "/ui/", b""), ("GET", "/v1/audit", b""), ("GET", "/ui/static/base.css", b""),
    ]))
    headers = draw(st.lists(st.tuples(st.sampled_from(NAMES), VALUES), min_size=1, max_size=4))
    return Sent(method, path, [JSON, *headers] if draw(st.booleans()) else headers, content)


METHODS = ("GET", "GET", "GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PROPFIND")
ROOTS = (
    "", "/v1", "/v1/models", "/v1/documents", "/v1/audit", "/v1/audit/verify", "/v1/watch", "/v1/load", "/v1/dashboard",
    "/health", "/metrics", "/ui", "/ui/static", "/ui/words", "/openapi.json", CHAT, TEXT,
)
PARTS = st.sampled_from([
    "/", "//", "/..", "/../..", "/%2e%2e/%2e%2e/etc/passwd", "/%00", "/%ff%fe", "/%", "/%zz", "/x" * 100,
    "/" + "a" * 5000, "/segments", "/doc-0/segments", "/ja.json", "/..%5c..%5cx", "/;x=1", "/%ED%A0%80",
    "/%F0%9F%92%A9", "/-1", "/'--",
]) | ANY_TEXT.map(lambda text: "/" + quote(text.encode("utf-8", "surrogatepass")))
QUERIES = st.dictionaries(
    st.sampled_from(["limit", "before", "since", "until", "model", "policy", "kind", "fallback", "brief", "lang", "x"]),
    st.sampled_from([
        "", "0", "-1", "1", "501", str(2**63), str(2**63 - 1), "1e3", "9" * 5000, "nan", "0001-01-01", "9999-12-31",
        "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "2026-02-30", "1e18", "-1e18", "true", "maybe", "ja",
        "' OR 1=1 --", "%", "\0", "x" * 201,
    ]) | ANY_TEXT, max_size=3,
).map(lambda query: urlencode({key: value.encode("utf-8", "surrogatepass") for key, value in query.items()}))


@st.composite
def addresses(draw: st.DrawFn) -> Sent:
    """Paths, methods and queries."""
    path = draw(st.sampled_from(ROOTS)) + "".join(draw(st.lists(PARTS, max_size=2)))
    query = draw(QUERIES)
    return Sent(draw(st.sampled_from(METHODS)), (path or "/") + (f"?{query}" if query else ""), [])


@st.composite
def forms(draw: st.DrawFn) -> Sent:
    """Uploads whose form, name or content is wrong."""
    name = draw(st.sampled_from([
        "a.txt", "a.pdf", "a.docx", "a.html", "a.exe", "", "../../etc/passwd", "a" * 400 + ".txt", "C:\\x\\a.md", ".",
        "a.txt\0.pdf", "ab\u202etxt.exe", '"; name="x',
    ]) | ANY_TEXT)
    content = draw(st.binary(max_size=100) | st.sampled_from([
        b"The mill was built in 1821. It has a wheel.", b"%PDF-1.7\n%%EOF", b"PK\x03\x04", b"<html>" * 500,
        b"\xff\xfe\0", b"",
    ]))
    fields = draw(st.dictionaries(
        st.sampled_from(["title", "anchorkv", "file", "text", "x"]), ANY_TEXT | st.sampled_from([
            "{}", "{", '{"policy": "best"}', '{"policy": "paper-ep"}', "[]", "null", "x" * 300, '{"document": "d"}',
        ]), max_size=3,
    ))
    lines = [f'--B\r\ncontent-disposition: form-data; name="{key}"\r\n\r\n{value}\r\n' for key, value in fields.items()]
    head = f'--B\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\ncontent-type: text/plain\r\n\r\n'
    body = "".join(lines).encode("utf-8", "surrogatepass") + head.encode("utf-8", "surrogatepass") + content
    body += draw(st.sampled_from((b"\r\n--B--\r\n", b"\r\n--B--\r\n", b"", b"\r\n--B", b"\r\n--C--")))
    body = draw(st.sampled_from((body, body, body, body * 2, body[: len(body) // 2], b"--B\r\n" * 50)))
    kind = draw(st.sampled_from((*[b"; boundary=B"] * 5, b"", b"; boundary=", b'; boundary="B')))
    return Sent("POST", DOCUMENTS, [(b"content-type", b"multipart/form-data" + kind)], body)


KINDS: dict[str, Callable[[], Strategy]] = {
    "bodies": bodies, "raw": raw, "heads": heads, "addresses": addresses, "forms": forms,
}


def sends(target: Target, kind: str, examples: int) -> None:
    @settings(QUICK, max_examples=examples)
    @given(sent=KINDS[kind]())
    def ask(sent: Sent) -> None:
        target.send(sent.method, sent.path, sent.headers, content=sent.content)

    ask()


# --- the tests ----------------------------------------------------------------------------------------------------


def test_every_answer_is_as_described(target: Target) -> None:
    conforms(target, 2)
    target.at_rest()


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_requests(target: Target, kind: str) -> None:
    before = target.seen.copy()
    sends(target, kind, 60)
    assert sum(count for status, count in (target.seen - before).items() if status >= 400) >= 15
    target.at_rest()


def test_wrong_keys_reach_nothing(tmp_path: Path) -> None:
    """Whatever stands in the header, without a key nothing is told, and a right key opens all the while."""
    texts = serving.keys(tmp_path, ("a", "operator"))
    target = Target(tmp_path, with_keys=True)
    key = texts["a", "operator"]
    target.headers = {"authorization": f"Bearer {key}"}
    try:
        target.at_rest()

        @settings(QUICK, max_examples=60)
        @given(header=VALUES | st.integers(1, len(key) - 1).map(lambda at: f"Bearer {key[:at]}".encode()))
        def ask(header: bytes) -> None:
            for method, path in (("GET", DOCUMENTS), ("POST", CHAT), ("GET", "/v1/audit"), ("GET", "/metrics")):
                answer = target.send(method, path, [(b"authorization", header)], content=b"")
                assert answer.status_code in (401, 429)

        ask()
        target.at_rest()
    finally:
        target.close()


@pytest.mark.slow
def test_ten_thousand_malformed_requests(target: Target) -> None:
    before = target.seen.copy()
    conforms(target, 50)
    target.at_rest()
    for kind in KINDS:
        sends(target, kind, 2_500)
        target.at_rest()
    assert sum(count for status, count in (target.seen - before).items() if status >= 400) >= 10_000
