"""What is so when Prometheus asks: how full the engine room is, what waits for the database, what the watch knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

import anchorkv
from anchorkv.serve.auth import KeyGate
from anchorkv.serve.policies import CUSTOM
from anchorkv.serve.series import ALL, Key

if TYPE_CHECKING:
    from anchorkv.serve.safeguard import Safeguard
    from anchorkv.serve.service import Service

PREFIX = "anchorkv:"
STATES = ("closed", "half_open", "open")
"""Of a circuit breaker, as the values 0, 1 and 2."""
_ESTIMATES = (
    ("checks", "Answers that were checked against the full cache."),
    ("loss_gap", "Nats a token that answers lose against the full cache."),
    ("loss_gap_low", "Lower bound of it."), ("loss_gap_high", "Upper bound of it."),
    ("loss_gap_limit", "Where it is too much."),
    ("agreement", "Share of answers that say what the full cache says."),
    ("agreement_low", "Lower bound of it."), ("agreement_high", "Upper bound of it."),
    ("agreement_floor", "Where it is too little."),
    ("out_of_bounds", "1 while a figure is out of bounds with the confidence that is set."),
)
_NONE_YET = dict.fromkeys((
    "drift_loss_gap_grew", "drift_agreement_fell", "breaker_open", "breaker_closed", "canary_failed", "canary_model",
    "canary_unasked",
), 0)
"""Of a counter that begins at 1 Prometheus sees no increase."""


class Now(Collector):
    """Gauges, and counters that others keep."""

    def __init__(self, service: Service, safeguard: Safeguard | None, tenants: bool) -> None:
        self._service, self._safeguard, self._tenants = service, safeguard, tenants

    def collect(self) -> Iterable[Metric]:
        yield from self._engine()
        yield from self._audit()
        yield from self._watched()
        card = self._service.card
        yield InfoMetricFamily(PREFIX + "server", "What is served.", {
            "version": anchorkv.__version__, "model_name": card.name, "engine": self._service.scheduler.engine.name,
            "weights": card.info.weights or "", "adapter": card.adapter, "policy": self._service.policies.default.name,
        })

    def _engine(self) -> Iterator[Metric]:
        scheduler, load = self._service.scheduler, self._service.scheduler.load()
        yield from _gauges((
            ("num_requests_running", "Requests that are read or written now.", load.sessions),
            ("num_requests_waiting", "Requests that wait.", load.waiting),
            ("num_requests_reading", "Of the running ones, those whose prompt is read.", load.reading),
            ("num_requests_writing", "Of the running ones, those whose answer is written.", load.writing),
            ("max_num_requests_running", "Requests that may run at once.", load.max_sessions),
            ("max_num_requests_waiting", "Requests that may wait.", load.max_waiting),
            ("kv_cache_usage_perc", "Share of the KV cells that is held; 1 is all.", load.used_cells / load.cells),
            ("kv_cache_cells", "KV cells there are.", load.cells),
            ("kv_cache_used_cells", "KV cells held now.", load.used_cells),
            ("kv_cache_used_bytes", "The same in bytes.", load.used_cells * self._service.card.info.cell_bytes),
            ("kv_cache_reserved_cells", "KV cells promised to running requests, not held yet.", load.reserved_cells),
            ("kv_cache_prefix_cells", "KV cells of kept beginnings of conversations.", load.prefix_cells),
            ("kv_cache_document_cells", "KV cells of documents in memory.", load.document_cells),
            ("documents_resident", "Documents in memory; the others are on disk.", load.documents),
            ("prefixes_resident", "Kept beginnings of conversations.", load.prefixes),
            ("draining", "1 while the server stops.", load.draining or self._service.draining),
            ("engine_alive", "1 while the engine thread runs.", scheduler.alive),
            ("engine_busy", "1 while it has work.", load.reading + load.writing + load.waiting > 0),
            ("engine_round_age_seconds", "Since it last finished a round.", load.last_step_age),
        ))
        yield from _counters((
            ("prompt_tokens", "Tokens of prompts and documents that were read.", load.prompt_tokens_total),
            ("generation_tokens", "Tokens that were written.", load.completion_tokens_total),
            ("prompt_seconds", "Time that reading took.", load.prefill_seconds_total),
            ("generation_seconds", "Time that writing took.", load.decode_seconds_total),
            ("decode_steps", "Joint steps, each of which writes a token in many answers.", load.steps_total),
        ))

    def _audit(self) -> Iterator[Metric]:
        trail, gate = self._service.trail, self._service.gate
        size = _size(trail.spool.path) if trail.spool is not None else 0
        most = trail.spool.max_bytes if trail.spool is not None else 0
        yield from _gauges((
            ("audit_spool_records", "Audit records that wait on disk for the database.", trail.waiting),
            ("audit_spool_bytes", "Size of that file.", size),
            ("audit_spool_max_bytes", "What it may grow to; then answers are refused.", most),
            ("audit_database_up", "0 while the database does not take records.", not trail.trouble),
            ("keys_file_ok", "0 while the key file cannot be read.", not (isinstance(gate, KeyGate) and gate.trouble)),
        ))

    # --- the watch ---------------------------------------------------------------------------------------------

    def _watched(self) -> Iterator[Metric]:
        if self._safeguard is None:
            return
        findings, watch, canary = self._safeguard.findings, self._safeguard.watch, self._safeguard.canary
        labels = ("tenant", "policy", "kind")
        families = {
            name: GaugeMetricFamily(f"{PREFIX}watch_{name}", said, labels=labels) for name, said in _ESTIMATES
        }
        for key, values in self._estimates(findings.estimates()).items():
            for name, value in values.items():
                families[name].add_metric(key, value)
        yield from families.values()
        states = GaugeMetricFamily(PREFIX + "breaker_state", "0 closed, 1 half-open, 2 open.", labels=labels)
        shown: dict[tuple[str, str, str], int] = {}
        for breaker_key, breaker in findings.breakers.all():
            if (label := self._label(breaker_key)) is not None:
                shown[label] = max(shown.get(label, 0), STATES.index(breaker.state))
        for label, state in shown.items():
            states.add_metric(label, state)
        yield states
        count = GaugeMetricFamily(PREFIX + "breakers", "Circuit breakers by state, tenants' too.", labels=("state",))
        for name in STATES:
            count.add_metric((name,), sum(breaker.state == name for _, breaker in findings.breakers.all()))
        yield count
        for counter, said, names, counts in (
            ("breaker_transitions", "State changes of breakers.", ("before", "after"), findings.breakers.transitions),
            ("watch_alarms", "Alarms of the quality watch.", ("code",), {**_NONE_YET, **findings.alarm_counts}),
            ("watch_answers", "What the watch did with answers.", ("result",), {"checked": 0, **watch.counts}),
        ):
            yield _counted(counter, said, names, counts)
        yield from _counters((("canary_runs", "Runs of the canary questions.", canary.runs),))
        right = GaugeMetricFamily(PREFIX + "canary_right", "Share of right answers in the last run.")
        if (share := canary.share()) is not None:
            right.add_metric((), share)
        yield right

    def _estimates(self, rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], dict[str, float]]:
        """The newest of those that share their labels."""
        found: dict[tuple[str, str, str], dict[str, float]] = {}
        for row in rows:
            key = self._label(Key(*(str(row[name]) for name in Key._fields)))
            if key is not None:
                found[key] = _figures(row)
        return found

    def _label(self, key: Key) -> tuple[str, str, str] | None:
        """None for what is not shown apart: a tenant's, unless the operator allows it, and kinds of no plan."""
        kinds = ("", ALL, *self._service.policies.areas())
        if (key.tenant != ALL and not self._tenants) or key.kind not in kinds:
            return None
        return key.tenant, policy_label(key.policy.rpartition("#")[0], self._service.policies.names()), key.kind


def policy_label(name: str, known: Sequence[str]) -> str:
    """`name` where the operator has given it; else what it is a change of; else "custom"."""
    if name in known:
        return name
    base = name.partition(",")[0]
    return f"{base}, changed" if base in known else CUSTOM


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Of one row of `Findings.estimates`; figures that there are too few checks for are left out."""
    found = {"out_of_bounds": float(row["crossing"] is not None)}
    for name in ("checks", "loss_gap_limit", "agreement_floor"):
        found[name] = float(row[name])
    for name in ("loss_gap", "agreement"):
        if (bounds := row[name]) is not None:
            found |= {name: bounds["value"], f"{name}_low": bounds["low"], f"{name}_high": bounds["high"]}
    return found


def _gauges(rows: Iterable[tuple[str, str, float]]) -> Iterator[Metric]:
    return (GaugeMetricFamily(PREFIX + name, said, float(value)) for name, said, value in rows)


def _counters(rows: Iterable[tuple[str, str, float]]) -> Iterator[Metric]:
    return (CounterMetricFamily(PREFIX + name, said, float(value)) for name, said, value in rows)


def _counted(name: str, said: str, labels: Sequence[str], counts: Mapping[Any, int]) -> CounterMetricFamily:
    """counts: by a word, or by several."""
    family = CounterMetricFamily(PREFIX + name, said, labels=labels)
    for values, count in counts.items():
        family.add_metric((values,) if isinstance(values, str) else values, count)
    return family


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
