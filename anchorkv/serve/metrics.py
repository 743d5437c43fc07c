"""What Prometheus is told. Names follow vLLM's and llama.cpp's where these have the figure; the rest is anchorkv's own.

Two sources: what every answer and refusal adds (`Metrics` is an `Observer`), and what is so when Prometheus asks
(gauges.py). No label has more values than the operator's settings have names: what callers make up is summed as
"custom", and tenants are named only where the operator allows it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

from anchorkv.serve.auth import Principal
from anchorkv.serve.gauges import PREFIX, Now, policy_label
from anchorkv.serve.refusals import Refused
from anchorkv.serve.requests import Outcome
from anchorkv.serve.seams import Answered

if TYPE_CHECKING:
    from anchorkv.serve.safeguard import Safeguard
    from anchorkv.serve.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Whatever Prometheus asks for: in OpenMetrics the library writes the colons of names as underscores for older ones."""
_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_GAPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_REDUCTIONS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0)
_REFUSALS = ((429, "busy"), (503, "no_room"), (503, "no_audit"), (500, "no_audit"), (500, "engine_error"))
"""Those that alert rules ask for: of a counter that begins at 1 Prometheus sees no increase."""


class Metrics:
    """An `Observer`. Thread-safe."""

    def __init__(self, service: Service, *, safeguard: Safeguard | None = None, tenants: bool = False) -> None:
        """tenants: whether figures are told apart by tenant, which tells whoever reads them who the tenants are."""
        self.registry = CollectorRegistry()
        self._service, self._tenants = service, tenants
        by_policy, by_tenant, by_end = ("policy", "tenant"), ("tenant",), ("finished_reason", "tenant")
        self._success = self._counter("request_success", "Answers that ended by themselves.", *by_end)
        self._failed = self._counter("request_failed", "Answers that did not.", *by_end)
        self._refused = self._counter("request_refused", "Requests that were not served.", "status", "code", "tenant")
        self._queries = self._counter("prefix_cache_queries", "Tokens of the prompts that were answered.", *by_tenant)
        self._hits = self._counter("prefix_cache_hits", "Those of them that had been read earlier.", *by_tenant)
        self._written = self._counter("answer_tokens", "Tokens of the answers.", *by_tenant)
        self._cells = {
            name: self._counter(f"request_{name}_cells", said, *by_policy) for name, said in (
                ("full", "KV cells that a full cache would have held at the end of the answers."),
                ("kept", "KV cells that were held at the end of the answers."),
                ("dropped", "KV cells that had been freed and not been brought back by then."),
                ("recalled", "KV cells that recall brought back for the answers."),
            )
        }
        self._recalled = self._counter("request_recalled_segments", "Segments that were recalled.", *by_policy)
        self._reduction = self._histogram("request_kv_reduction", "Full cells per kept cell.", _REDUCTIONS, "policy")
        self._steps = self._counter("fallback_steps", "Steps to safer policies.", "code", "because", "dry_run")
        self._fallen = self._counter("fallback_requests", "Answers that stand on such a step.", *by_tenant)
        self._seconds = {
            name: self._histogram(f"{name}_seconds", said, buckets) for name, said, buckets in (
                ("time_to_first_token", "From asking to the first token.", _WAITS),
                ("e2e_request_latency", "From asking to the last token.", _WAITS),
                ("request_queue_time", "From asking until the prompt began to be read.", _WAITS),
                ("request_prefill_time", "Reading the prompt.", _WAITS),
                ("request_decode_time", "From the first token to the last.", _WAITS),
                ("request_time_per_output_token", "Mean time between the tokens of an answer.", _GAPS),
                ("inter_token_latency", "Time between two tokens of an answer.", _GAPS),
            )
        }
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generation = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        counted = self._counter("log_messages", "Messages of that level and above info.", "level")
        self.logs: logging.Handler = _LogCounter(counted)
        """A handler for the root logger, which counts."""
        for metric, ends in ((self._success, ("stop", "length")), (self._failed, ("error", "cancelled"))):
            for finish in ends:
                metric.labels(finish, "")
        for status, code in _REFUSALS:
            self._refused.labels(str(status), code, "")
        self.registry.register(Now(service, safeguard, tenants))
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """All figures now, as `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    # --- what happens ------------------------------------------------------------------------------------------

    def answered(self, answered: Answered) -> None:
        outcome, tenant = answered.outcome, self._tenant(answered.question.caller)
        ended = outcome.finish in ("stop", "length")
        (self._success if ended else self._failed).labels(outcome.finish, tenant).inc()
        for step in answered.plan.steps:
            self._steps.labels(step.code or "other", step.because, str(step.dry_run).lower()).inc()
        if answered.plan.policy.name != answered.question.policy.name:  # not what a dry run or a refused step wanted
            self._fallen.labels(tenant).inc()
        if ended:
            self._queries.labels(tenant).inc(outcome.prompt_tokens)
            self._hits.labels(tenant).inc(outcome.cached_tokens)
            self._written.labels(tenant).inc(outcome.completion_tokens)
            self._count_cells(outcome, policy_label(answered.plan.policy.name, self._service.policies.names()), tenant)
            self._take_times(outcome)

    def refused(self, caller: Principal | None, refused: Refused) -> None:
        self._refused.labels(str(refused.status), refused.code or "other", self._tenant(caller)).inc()

    def gap(self, seconds: float) -> None:
        """A token was written `seconds` after the one before it in the same answer."""
        self._seconds["inter_token_latency"].observe(seconds)

    def _count_cells(self, outcome: Outcome, policy: str, tenant: str) -> None:
        counts = {
            "full": outcome.full_cells, "kept": outcome.kept_cells,
            "dropped": sum(segment.dropped for segment in outcome.segments),
            "recalled": sum(segment.cells for segment in outcome.recalled),
        }
        for name, count in counts.items():
            self._cells[name].labels(policy, tenant).inc(count)
        self._recalled.labels(policy, tenant).inc(len(outcome.recalled))
        self._reduction.labels(policy).observe(outcome.reduction)

    def _take_times(self, outcome: Outcome) -> None:
        self._prompt.observe(outcome.prompt_tokens)
        self._generation.observe(outcome.completion_tokens)
        for name, value in (
            ("request_queue_time", outcome.queue_seconds), ("request_prefill_time", outcome.prefill_seconds),
            ("request_decode_time", outcome.decode_seconds), ("time_to_first_token", outcome.first_token_seconds),
            ("e2e_request_latency", outcome.first_token_seconds + outcome.decode_seconds),
        ):
            self._seconds[name].observe(value)
        if outcome.completion_tokens > 1:
            mean = outcome.decode_seconds / (outcome.completion_tokens - 1)
            self._seconds["request_time_per_output_token"].observe(mean)

    def _tenant(self, caller: Principal | None) -> str:
        """"" is to Prometheus as if there were no such label."""
        return caller.tenant if caller is not None and self._tenants else ""

    def _counter(self, name: str, said: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, said, labels, registry=self.registry)

    def _histogram(self, name: str, said: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(PREFIX + name, said, labels, registry=self.registry, buckets=buckets)


class _LogCounter(logging.Handler):
    """Counts warnings and worse: damaged files, failed rounds, a database that is away."""

    def __init__(self, counter: Counter) -> None:
        super().__init__(logging.WARNING)
        self._counter = counter
        for level in ("warning", "error"):
            counter.labels(level)

    def emit(self, record: logging.LogRecord) -> None:
        self._counter.labels("error" if record.levelno >= logging.ERROR else "warning").inc()
