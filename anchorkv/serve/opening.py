"""From an operator's settings to a service that is ready to start, and back to nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from anchorkv.models import Model, load
from anchorkv.poc.rollout import Rollout
from anchorkv.serve.audit.aging import retire_daily
from anchorkv.serve.audit.spool import Spool
from anchorkv.serve.audit.store import AuditStore
from anchorkv.serve.audit.trail import AuditTrail
from anchorkv.serve.auth import gate_of
from anchorkv.serve.background import Background
from anchorkv.serve.documents import Documents
from anchorkv.serve.engine import contexts, contexts_for
from anchorkv.serve.limits import Limiter
from anchorkv.serve.logs import RequestLog
from anchorkv.serve.metrics import Metrics
from anchorkv.serve.policies import Policies
from anchorkv.serve.safeguard import Safeguard
from anchorkv.serve.scheduler import Scheduler
from anchorkv.serve.service import ModelCard, Service
from anchorkv.serve.settings import ServeSettings

log = logging.getLogger("anchorkv.serve")
OWN = "own"
"""Name of the policy that comes with the model."""


@contextmanager
def opened(
    settings: ServeSettings, progress: Callable[[int, int], None] | None = None
) -> Iterator[Service]:
    """The service, its engine sized and its trail open; what is opened is closed at the end of the block.

    progress: as `models.load` takes it. Raises AnchorKVError, one sentence, for whatever cannot be used.
    """
    chosen = settings.chosen_policy()
    with ExitStack() as stack:
        gate = gate_of(settings.keys_file)
        trail = _trail(settings)
        stack.callback(trail.close)
        policy = None if isinstance(chosen, Rollout) else chosen
        model = stack.enter_context(load(
            settings.model, engine=settings.engine, policy=policy, threads=settings.threads, adapter=settings.adapter,
            progress=progress,
        ))
        cells = settings.cells_of(model.engine.info.cell_bytes)
        engine, *more = stack.enter_context(
            contexts(model.engine, cells, settings.contexts or contexts_for(model.engine, cells))
        )
        if isinstance(chosen, Rollout) and chosen.fingerprint != engine.info.fingerprint:
            log.warning("The rollout plan was measured with %s, and this is another model or file.", chosen.model)
        scheduler = Scheduler(
            engine, cells, more=more, max_sessions=settings.max_sessions, max_waiting=settings.max_waiting,
            documents=Documents(engine, settings.documents_folder), background_share=settings.watch.time_share,
            idle_seconds=settings.watch.idle_seconds,
        )
        stack.callback(scheduler.stop, False)
        policies = Policies.of(chosen or model.policy, settings.policy or OWN, settings.bounds)
        safeguard = Safeguard.of(
            scheduler, policies, settings.watch, settings.fallback, settings.canary, settings.data,
        )
        service = Service(
            scheduler=scheduler, card=card_of(model), trail=trail, gate=gate, policies=policies,
            limits=Limiter(settings.limits, settings.tenants, cells=cells), ladder=safeguard.ladder,
            bounds=settings.requests, drain_seconds=settings.drain_seconds, safeguard=safeguard,
        )
        if (days := settings.audit.retention_days) is not None:
            service.beside = (Background(lambda: retire_daily(trail.store, days)),)
        service.metrics = metrics = Metrics(service, safeguard=safeguard, tenants=settings.metrics_by_tenant)
        scheduler.tell_gaps(metrics.gap)
        service.observers += [safeguard.watch, metrics, RequestLog()]
        yield service


def card_of(model: Model) -> ModelCard:
    """What callers see of it."""
    info = model.engine.info
    # Merged weights have a fingerprint of their own, so the adapter's is in it.
    return ModelCard(Path(info.name).stem if info.name.endswith(".gguf") else info.name, info, adapter=model.adapter)


def _trail(settings: ServeSettings) -> AuditTrail:
    audit = settings.audit
    spool = Spool(settings.spool_folder / "audit.jsonl", audit.spool_bytes)
    try:
        store = AuditStore(settings.audit_database, keep_text=audit.text)
        store.open()
    except BaseException:
        spool.close()
        raise
    return AuditTrail(store, spool)
