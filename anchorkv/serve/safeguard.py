"""Watch, breakers, fallback ladder and canary, put together from the operator's settings."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorkv.serve.breaker import Breakers
from anchorkv.serve.canary import Canary, canary_questions
from anchorkv.serve.fallback import FallbackLadder
from anchorkv.serve.findings import Findings, limits_of
from anchorkv.serve.policies import Policies, Wish
from anchorkv.serve.rungs import Room
from anchorkv.serve.scheduler import Scheduler
from anchorkv.serve.settings_groups import CanarySettings, FallbackSettings, WatchSettings
from anchorkv.serve.textfacts import TextFacts
from anchorkv.serve.watch import Watch, low_priority
from anchorkv.serve.watchstore import WatchStore

FILE = "watch.db"
"""In the data folder."""


@dataclass(frozen=True)
class Safeguard:
    """`ladder` is the service's, `watch` one of its observers. `start` and `stop` on the event loop."""

    watch: Watch
    ladder: FallbackLadder
    canary: Canary
    findings: Findings
    breakers: Breakers

    @classmethod
    def of(
        cls, scheduler: Scheduler, policies: Policies, watch: WatchSettings, fallback: FallbackSettings,
        canary: CanarySettings, data: Path | None = None,
    ) -> Safeguard:
        """data: the folder of all that the server keeps; None: nothing outlives the process.

        Raises SavedStateError, DataError, DocumentError, one sentence, for files that cannot be used.
        """
        model, rollout, run = scheduler.engine.info.fingerprint, policies.rollout, low_priority(scheduler)
        breakers = Breakers(fallback.probe_seconds, fallback.probes)
        questions = canary_questions(canary.file) if canary.file is not None else []
        store = WatchStore(None if data is None else data.expanduser() / FILE)
        ladder = FallbackLadder(
            fallback, breakers, model, rollout=rollout, fits=Room(scheduler),
            facts=TextFacts(scheduler.documents, scheduler.engine.tokenizer),
        )
        trips = fallback.enabled and fallback.breaker
        findings = Findings(model, watch, limits_of(watch, rollout, ladder.rules), breakers, store, trips=trips)
        areas = set(policies.areas())
        return cls(
            Watch(watch, findings, run, load=scheduler.load), ladder,
            Canary(
                canary, questions, findings, run,
                lambda kind: policies.choose(Wish(area=kind)) if kind in areas else policies.default, trips=trips,
            ),
            findings, breakers,
        )

    def start(self) -> None:
        self.watch.start()
        self.canary.start()

    async def stop(self) -> None:
        """Call it before the scheduler stops."""
        await self.canary.stop()
        await self.watch.stop()
        await asyncio.to_thread(self.findings.close)

    def status(self, tenant: str | None = None) -> dict[str, Any]:
        """JSON-able; of one tenant alone (without the canary), or of all."""
        found = self.watch.status(tenant)
        if tenant is None:
            found["canary"] = self.canary.status()
            found["fallback"] = [
                {"code": code, "because": because, "before": before, "after": after, "dry_run": dry, "count": count}
                for (code, because, before, after, dry), count in sorted(self.ladder.counts.items())
            ]
        return found
