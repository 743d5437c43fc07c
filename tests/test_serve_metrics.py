"""What Prometheus is told of a real server's answers, and what its log says: the right figures, no text, no secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import serving
from prometheus_client.parser import text_string_to_metric_families
from serving import STORY, client, run

from anchorkv.engines.llama import LlamaEngine
from anchorkv.recall import BM25
from anchorkv.serve import logs
from anchorkv.serve.auth import Principal
from anchorkv.serve.check import Check
from anchorkv.serve.gauges import policy_label
from anchorkv.serve.metrics import Metrics
from anchorkv.serve.policies import Chosen
from anchorkv.serve.refusals import Refused
from anchorkv.serve.safeguard import Safeguard
from anchorkv.serve.seams import Answered, Plan, Step
from anchorkv.serve.service import Service
from anchorkv.serve.settings_groups import CanarySettings, FallbackSettings, WatchSettings

CHAT = "/v1/chat/completions"
SECRET_TEXT = "The quarterly figure of Zanzibar is 7731."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    yield from serving.engine(tmp_path_factory.mktemp("model"))


@pytest.fixture
def served(model: LlamaEngine, tmp_path: Path) -> Iterator[Service]:
    found = serving.service(tmp_path, model)
    yield found
    found.scheduler.stop(False)
    found.trail.close()


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """The log of the process, as JSON, everything in it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    logs.setup("debug", "json", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """By name and labels."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """The sum of those with these labels. Raises KeyError when there is none."""
    found = [
        number for (n, given), number in samples(metrics).items()
        if n == f"anchorkv:{name}" and labels.items() <= dict(given).items()
    ]
    if not found:
        raise KeyError(name)
    return sum(found)


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "seed": 7, "ignore_eos": True, **more}


def answered(served: Service, metrics: Metrics, *requests: dict[str, Any]) -> list[Any]:
    """Replies to `requests`, one after the other, over HTTP; `metrics` and the log look on."""
    served.observers += [metrics, logs.RequestLog()]
    replies: list[Any] = []

    async def work() -> None:
        async with client(served) as http:
            replies.extend([await http.post(CHAT, json=request) for request in requests])

    run(work())
    return replies


def test_counters_say_what_the_replies_said(served: Service) -> None:
    metrics = Metrics(served)
    replies = [reply.json() for reply in answered(
        served, metrics, said(STORY * 3), said(STORY * 3), said(STORY, anchorkv={"reduction": 8})
    )]
    figures, usages = [reply["anchorkv"] for reply in replies], [reply["usage"] for reply in replies]
    assert value(metrics, "request_success_total", finished_reason="length") == 3
    assert value(metrics, "prefix_cache_queries_total") == sum(usage["prompt_tokens"] for usage in usages)
    assert value(metrics, "prefix_cache_hits_total") == sum(figure["cached_tokens"] for figure in figures) > 0
    assert value(metrics, "answer_tokens_total") == 36
    assert value(metrics, "request_kept_cells_total") == sum(figure["cells"]["kept"] for figure in figures)
    assert value(metrics, "request_full_cells_total") == sum(figure["cells"]["full"] for figure in figures)
    assert value(metrics, "request_dropped_cells_total") == sum(figure["dropped"] for figure in figures) > 0
    assert value(metrics, "request_kept_cells_total", policy="own, changed") == figures[2]["cells"]["kept"]
    assert value(metrics, "request_kv_reduction_sum") == pytest.approx(sum(f["reduction"] for f in figures), abs=0.01)
    first = sum(figure["seconds"]["first_token"] for figure in figures)
    assert value(metrics, "time_to_first_token_seconds_sum") == pytest.approx(first)
    decode = sum(figure["seconds"]["decode"] for figure in figures)
    assert value(metrics, "e2e_request_latency_seconds_sum") == pytest.approx(first + decode)
    assert value(metrics, "request_time_per_output_token_seconds_sum") == pytest.approx(decode / 11)
    assert value(metrics, "generation_tokens_total") == 36
    read = sum(usage["prompt_tokens"] for usage in usages) - sum(figure["cached_tokens"] for figure in figures)
    assert value(metrics, "prompt_tokens_total") == read
    assert value(metrics, "kv_cache_cells") == serving.CELLS
    assert value(metrics, "num_requests_running") == value(metrics, "num_requests_waiting") == 0
    assert value(metrics, "draining") == 1  # the client has closed it


def test_refusals_are_counted_by_status_and_code(served: Service) -> None:
    metrics = Metrics(served)
    replies = answered(served, metrics, said(STORY, max_tokens=10**6), said(STORY, anchorkv={"policy": "no such"}))
    assert [reply.status_code for reply in replies] == [400, 400]
    assert value(metrics, "request_refused_total", status="400") == 2
    assert value(metrics, "request_refused_total", code="unknown_policy") == 1


def test_what_callers_make_up_is_no_label(served: Service) -> None:
    known = served.policies.names()
    assert policy_label("own", known) == "own"
    assert policy_label("own, reduction=7.123", known) == policy_label("own, recall=on", known) == "own, changed"
    assert policy_label("x" * 500, known) == policy_label("a, b", known) == "custom"


def test_tenants_are_named_only_where_it_is_allowed(served: Service) -> None:
    hidden, shown = Metrics(served), Metrics(served, tenants=True)
    for metrics in (hidden, shown):
        metrics.refused(Principal("acme", "1" * 12, "user"), Refused(429, "Too many.", code="rate"))
        metrics.refused(None, Refused(401, "No key.", code="missing_key"))
    assert "acme" not in hidden.text().decode()
    assert value(hidden, "request_refused_total", code="rate") == 1
    assert value(shown, "request_refused_total", tenant="acme") == 1


def test_fallback_steps_by_their_reason(served: Service) -> None:
    metrics = Metrics(served)
    seen: list[Answered] = []

    class Keep:
        def answered(self, found: Answered) -> None:
            seen.append(found)

        def refused(self, *_: Any) -> None: ...

    served.observers.append(Keep())
    answered(served, metrics, said(STORY, anchorkv={"quality": "high"}))
    assert value(metrics, "fallback_requests_total") == 1
    assert value(metrics, "fallback_steps_total") == 1
    steps = (
        Step("own", "own, recall=on", "The rule 'tokens < 9' holds.", "rule", "short_text"),
        Step("own, recall=on", "own, recall=on", "It had been shown.", "low_confidence", "", True),
    )
    metrics.answered(replace(seen[0], plan=Plan(seen[0].plan.policy, steps)))
    assert value(metrics, "fallback_steps_total", code="rule", because="short_text", dry_run="false") == 1
    assert value(metrics, "fallback_steps_total", code="low_confidence", dry_run="true") == 1
    assert value(metrics, "fallback_requests_total") == 2
    back = Step("full", "own", "No answer with 'full' could be had.", "refused")
    metrics.answered(replace(seen[0], plan=Plan(seen[0].question.policy, (steps[0], back))))
    assert value(metrics, "fallback_steps_total", code="refused", because="", dry_run="false") == 1
    dry = replace(steps[0], dry_run=True)
    metrics.answered(replace(seen[0], plan=Plan(seen[0].question.policy, (dry,))))
    assert value(metrics, "fallback_requests_total") == 2, "steps that were not taken do not count"
    failed = replace(seen[0], outcome=replace(seen[0].outcome, finish="error"))
    before = value(metrics, "answer_tokens_total")
    metrics.answered(failed)
    assert value(metrics, "request_failed_total", finished_reason="error") == 1
    assert value(metrics, "answer_tokens_total") == before


def test_the_watch_its_bounds_and_its_breakers(served: Service) -> None:
    guard = Safeguard.of(served.scheduler, served.policies, WatchSettings(), FallbackSettings(), CanarySettings())
    findings, watch = guard.findings, guard.watch
    hidden, shown = Metrics(served, safeguard=guard), Metrics(served, safeguard=guard, tenants=True)
    assert value(hidden, "watch_alarms_total", code="breaker_open") == 0
    assert value(hidden, "breakers", state="open") == 0
    policy = Chosen("own", served.policies.default.config)
    for i in range(40):
        findings.add(Check(f"ask-{i}", "acme", "own", "", loss_gap=2.0 + i % 2 / 10, agreed=False), policy)
    watch.counts["checked"] += 40
    row = next(row for row in findings.estimates() if row["tenant"] == row["kind"] == "*")
    for name in ("loss_gap", "agreement"):
        for end, part in (("", "value"), ("_low", "low"), ("_high", "high")):
            assert value(hidden, f"watch_{name}{end}", tenant="*", kind="*") == pytest.approx(row[name][part])
    assert value(hidden, "watch_loss_gap_low", tenant="*", kind="*") > value(hidden, "watch_loss_gap_limit", kind="*")
    assert value(hidden, "watch_out_of_bounds", tenant="*", kind="*") == 1
    assert value(hidden, "watch_checks", tenant="*", kind="*", policy="own") == 40
    assert value(hidden, "watch_answers_total", result="checked") == 40
    assert value(hidden, "breakers", state="open") == 1
    assert value(hidden, "breaker_transitions_total", before="closed", after="open") == 1
    assert value(hidden, "watch_alarms_total", code="breaker_open") == 1
    assert "acme" not in hidden.text().decode()
    assert value(shown, "breaker_state", tenant="acme") == 2


def test_the_audit_spool_and_the_logs_warnings(served: Service) -> None:
    metrics = Metrics(served)
    assert value(metrics, "audit_database_up") == 1
    served.trail.trouble = "The database is away."
    assert value(metrics, "audit_database_up") == 0
    logger = logging.getLogger("anchorkv.serve.test")
    logger.addHandler(metrics.logs)
    logger.error("one")
    logger.warning("two")
    logger.info("three")
    logger.removeHandler(metrics.logs)
    assert value(metrics, "log_messages_total", level="error") == 1
    assert value(metrics, "log_messages_total", level="warning") == 1


def test_operators_of_all_tenants_alone_see_them(model: LlamaEngine, tmp_path: Path) -> None:
    keys = serving.keys(tmp_path, ("acme", "user"), ("acme", "operator"), ("*", "operator"), ("*", "auditor"))
    served = serving.service(tmp_path, model, with_keys=True)
    served.metrics = Metrics(served)

    async def work() -> None:
        async with client(served) as http:
            assert (await http.get("/metrics")).status_code == 401
            for who, status in (
                (("acme", "user"), 403), (("acme", "operator"), 403), (("*", "auditor"), 403), (("*", "operator"), 200),
            ):
                reply = await http.get("/metrics", headers={"authorization": f"Bearer {keys[who]}"})
                assert reply.status_code == status, who
            assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert "\nanchorkv:kv_cache_usage_perc 0.0\n" in reply.text

    run(work())


def test_gaps_between_tokens(served: Service) -> None:
    metrics = Metrics(served)
    for seconds in (0.04, 0.04, 0.04, 0.2):
        metrics.gap(seconds)
    assert value(metrics, "inter_token_latency_seconds_count") == 4
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.05") == 3


# --- the log -------------------------------------------------------------------------------------------------------


def read(lines: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.getvalue().splitlines()]


def test_a_request_leaves_ids_and_figures_in_the_log_and_none_of_its_text(
    model: LlamaEngine, tmp_path: Path, lines: io.StringIO
) -> None:
    texts = serving.keys(tmp_path, ("acme", "user"))
    key = texts["acme", "user"]
    served = serving.service(tmp_path, model, with_keys=True)
    served.observers.append(logs.RequestLog())

    async def work() -> None:
        async with client(served, headers={"authorization": f"Bearer {key}"}) as http:
            uploaded = await http.post("/v1/documents", json={"text": SECRET_TEXT * 20, "title": "Zanzibar"})
            reply = await http.post(CHAT, json=said("How much is it in Zanzibar?", anchorkv={
                "document": uploaded.json()["id"],
            }))
            assert reply.status_code == 200
            assert (await http.post(CHAT, content=b'{"messages": "Zanzibar"}')).status_code == 400
            wrong = f"{key[:20]}{'0' * 30}"
            assert (await http.get("/v1/models", headers={"authorization": f"Bearer {wrong}"})).status_code == 401
            found = [line for line in read(lines) if line["message"] == "answered"]
            assert [line["ask"] for line in found] == [reply.json()["anchorkv"]["id"]]
            assert found[0]["tenant"] == "acme"
            assert found[0]["key"] == key.split("_")[1]
            assert found[0]["completion_tokens"] == 12
            assert found[0]["kept_cells"] == reply.json()["anchorkv"]["cells"]["kept"]

    run(work())
    assert {line["code"] for line in read(lines) if line["message"] == "refused"} == {"invalid_key"}
    assert "Zanzibar" not in lines.getvalue()
    assert key.split("_", 2)[2] not in lines.getvalue()


def test_every_line_of_a_request_has_its_id_and_the_reply_too(lines: io.StringIO) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        logging.getLogger("anchorkv.serve").info("within")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"12345"})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def work() -> None:
        ids = logs.RequestIds(app)
        for given in (b"mine-1", b"not\nplain", b""):
            scope = {"type": "http", "method": "GET", "path": "/v1/x", "query_string": b"key=ak_1",
                     "headers": [(b"x-request-id", given)], "client": ("10.0.0.1", 1)}
            await ids(scope, None, send)  # type: ignore[arg-type]
        await ids({**scope, "path": "/health/live"}, None, send)  # type: ignore[arg-type]

    run(work())
    starts = [dict(message["headers"])[b"x-request-id"].decode() for message in sent if "status" in message]
    assert starts[0] == "mine-1"
    assert len(set(starts)) == 4
    found = [line for line in read(lines) if line["logger"].startswith("anchorkv.serve")]
    assert [line["request_id"] for line in found[:4]] == [starts[0]] * 2 + [starts[1]] * 2
    assert found[1]["message"] == "GET /v1/x"
    assert found[1]["status"] == 200
    assert found[1]["bytes"] == 5
    assert found[-1]["level"] == "debug"
    assert "ak_1" not in lines.getvalue()
    assert logs.request_id.get() == ""


def test_secrets_are_blotted_out(lines: io.StringIO) -> None:
    key = f"ak_{'0a' * 6}_{'S' * 43}"
    logger = logging.getLogger("anchorkv.serve")
    logger.warning("the key %s", key)
    logger.warning("header %s", f"Bearer {key}", extra={"url": "postgresql://anna:hunter2@db/audit", "list": [key]})
    logger.warning("password=hunter2&x=1")
    text = lines.getvalue()
    assert "S" * 20 not in text
    assert "hunter2" not in text
    assert f"ak_{'0a' * 6}_***" in text  # the id may stay: it names the key
    assert "postgresql://anna:***@db/audit" in text


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_error_tells_its_kind_and_place_and_quotes_nothing(form: logs.LogForm) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter() if form == "json" else logs.TextFormatter())
    logger = logging.getLogger("anchorkv.test.errors")
    logger.propagate = False
    logger.addHandler(handler)
    try:
        try:
            int(SECRET_TEXT)
        except ValueError as error:
            raise OSError(28, "No space left on device") from error
    except OSError:
        logger.exception("writing failed")
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    text = stream.getvalue()
    assert "Zanzibar" not in text
    assert "OSError" in text
    assert "No space left on device" in text
    assert "ValueError" in text
    assert f"{Path(__file__).name}:" in text


def test_uvicorn_speaks_through_the_same_log(lines: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
    logging.getLogger("uvicorn.access").info('%s - "%s"', "127.0.0.1", "GET /")
    assert [line["logger"] for line in read(lines)] == ["uvicorn.error", "uvicorn.access"]
    assert read(lines)[0]["message"] == "Started server process [7]"
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in read(lines))


def test_text_on_a_terminal_and_json_elsewhere() -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        stream = io.StringIO()
        logs.setup("info", None, stream)
        logging.getLogger("anchorkv").info("hello", extra={"ask": "ask-1"})
        assert json.loads(stream.getvalue())["ask"] == "ask-1"
        stream = io.StringIO()
        stream.isatty = lambda: True  # type: ignore[method-assign]
        logs.setup("info", None, stream)
        logging.getLogger("anchorkv").info("hello", extra={"ask": "ask-1"})
        assert stream.getvalue().endswith("info    hello ask=ask-1\n")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)


def test_libraries_say_nothing_below_a_warning(lines: io.StringIO) -> None:
    logger = logging.getLogger("bm25s")
    logger.setLevel(logging.DEBUG)  # as it does itself, whenever it is imported
    BM25().scores(["The mill was sold.", "The wheel stood still."], "Who sold the mill?")
    logger.warning("a warning of it")
    assert [line["message"] for line in read(lines)] == ["a warning of it"]
