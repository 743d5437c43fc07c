"""The quality watch: a share of answers is checked against the full cache in the background.

The share follows what is known and how busy the engine is, never the answer itself, so that what is checked is a fair
sample of what was answered. While a breaker is half-open, requests are its probes: the suspected policy answers them
once more in the background, and that answer is checked.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from anchorkv.errors import AnchorKVError, CapacityError
from anchorkv.sampling import Sampling
from anchorkv.serve.auth import Principal
from anchorkv.serve.background import Background
from anchorkv.serve.breaker import Breaker
from anchorkv.serve.check import Check, CheckFailed, Run, Source, check, whole
from anchorkv.serve.findings import Findings
from anchorkv.serve.policies import Chosen
from anchorkv.serve.refusals import Refused
from anchorkv.serve.requests import Ask, Busy, Load, NotFound, Outcome, new_id
from anchorkv.serve.scheduler import Scheduler
from anchorkv.serve.seams import Answered
from anchorkv.serve.series import Key
from anchorkv.serve.settings_groups import WatchSettings

log = logging.getLogger("anchorkv.serve")
ENOUGH = 30
"""Checks that a figure rests well on; with fewer the share is larger."""
IN_DOUBT = 5
"""Times the share while a limit lies within the bounds of a figure."""
LEAST, BUSY = 0.25, 0.25
"""Times the share: the least that it ever falls to; what is left of it while requests wait."""
MOST_WAITING = 16
"""Checks that wait for their turn; more are counted and passed over."""


@dataclass(frozen=True)
class _Job:
    """One check to be made. `outcome` is None for a probe: the answer has still to be written."""

    ask: Ask
    outcome: Outcome | None
    policy: Chosen
    kind: str
    tokens: int
    source: Source = "answer"
    breakers: tuple[Key, ...] = ()


def low_priority(scheduler: Scheduler) -> Run:
    """How `scheduler` carries out checks; a long prompt is tokenised off the event loop."""

    async def run(ask: Ask) -> Outcome:
        async with await asyncio.to_thread(scheduler.submit, ask, background=True) as handle:
            return await handle.outcome()

    return run


class Watch:
    """An `Observer`. `start` and `stop` on the event loop; `answered` only chooses and returns at once."""

    def __init__(
        self, settings: WatchSettings, findings: Findings, run: Run, *, load: Callable[[], Load] | None = None,
        clock: Callable[[], float] = time.monotonic, seed: int | None = None,
    ) -> None:
        """load: how full the engine room is; without it, it is never busy."""
        self.settings, self.findings, self._run, self._load, self._clock = settings, findings, run, load, clock
        self._random = random.Random(seed)
        self._jobs: deque[_Job] = deque()
        self._there = asyncio.Event()
        self._checking = Background(self._work)
        self._working = False
        self.counts: Counter[str] = Counter()
        """answers, checked, probed, whole (nothing had been dropped), and what was not checked, by reason."""

    # --- the observer ------------------------------------------------------------------------------------------

    def answered(self, answered: Answered) -> None:
        """Choose whether this answer is checked. Never raises."""
        try:
            self._chosen(answered)
        except Exception:  # an answer that was given is not to fail for its check
            log.exception("the watch could not look at %s", answered.outcome.id)

    def _chosen(self, answered: Answered) -> None:
        question, outcome, policy = answered.question, answered.outcome, answered.plan.policy
        if outcome.finish not in ("stop", "length"):
            return
        tenant, kind = question.caller.tenant, question.area or ""
        self.counts["answers"] += 1
        if outcome.answer_logprob is not None:
            self.findings.written(tenant, policy, kind, outcome.answer_logprob)
        self._offer_probe(answered, tenant, kind)
        if whole(outcome):
            self.counts["whole"] += 1
        elif self.findings.choose(tenant, policy, kind, self.share(tenant, policy, kind), self._random.random()):
            self._put(_Job(answered.ask, outcome, policy, kind, _tokens(outcome)))

    def refused(self, caller: Principal | None, refused: Refused) -> None:
        """Nothing to check."""

    def share(self, tenant: str, policy: Chosen, kind: str) -> float:
        """The share of such answers that is checked now."""
        base, most = self.settings.share, self.settings.most_share
        if base == 0:
            return 0.0
        series, now = self.findings.series(tenant, policy, kind), self._clock()
        share = most + (base - most) * min(1.0, series.n(now) / ENOUGH)
        if series.restless:
            share = most
        elif series.doubtful(self.findings.limits(kind), now, self.settings.confidence):
            share = max(share, IN_DOUBT * base)
        if self._busy():
            share *= BUSY
        return min(most, max(LEAST * base, share))

    def _busy(self) -> bool:
        if self._load is None:
            return False
        load = self._load()
        return load.sessions >= load.max_sessions or load.waiting > len(self._jobs) + 1

    def _offer_probe(self, answered: Answered, tenant: str, kind: str) -> None:
        names = {answered.question.policy.name, *(step.before for step in answered.plan.steps)}
        found = self.findings.breakers.probe(tenant, self.findings.model, kind, names)
        if found:
            keys, breaker = tuple(key for key, _ in found), found[0][1]
            ask, tokens = _probing(answered.ask, breaker), _tokens(answered.outcome)
            self._put(_Job(ask, None, breaker.policy, kind, tokens, "probe", keys))

    def _put(self, job: _Job) -> None:
        if job.tokens > self.settings.tokens:
            self._missed(job, "too_long")
        elif len(self._jobs) >= MOST_WAITING and job.source != "probe":
            self._missed(job, "queue_full")
        else:
            self._jobs.append(job)
            self._there.set()

    def _missed(self, job: _Job, why: str) -> None:
        self.counts[why] += 1
        for key in job.breakers:
            self.findings.breakers.probed(key, None)

    # --- the work ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._checking.start()

    async def stop(self) -> None:
        """Leave what waits, and save."""
        await self._checking.stop()
        await asyncio.to_thread(self.findings.save)

    async def idle(self) -> None:
        """Wait until everything that was chosen is checked."""
        while self._jobs or self._working:
            await asyncio.sleep(0.001)

    async def _work(self) -> None:
        while True:
            await self._there.wait()
            self._working = True
            while self._jobs:
                await self._do(self._jobs.popleft())
                await asyncio.to_thread(self.findings.save)
            self._there.clear()
            self._working = False

    async def _do(self, job: _Job) -> None:
        good = None
        try:
            found = await self._checked(job)
            if job.source == "answer":
                self.findings.add(found, job.policy)
            else:
                good = found.good(self.findings.limits(job.kind).loss_gap_limit)
            self.counts["checked" if job.source == "answer" else "probed"] += 1
        except CapacityError:
            self.counts["too_large"] += 1
        except Busy:
            self.counts["busy"] += 1
        except NotFound:
            self.counts["gone"] += 1
        except AnchorKVError as error:
            self.counts["failed"] += 1
            log.warning("the check of %s failed: %s", job.ask.id, error)
        except Exception:  # the watch goes on, whatever one check ran into
            self.counts["failed"] += 1
            log.exception("the check of %s failed", job.ask.id)
        finally:
            for key in job.breakers:
                self.findings.breakers.probed(key, good)

    async def _checked(self, job: _Job) -> Check:
        started, outcome = self._clock(), job.outcome
        if outcome is None:
            outcome = await self._run(job.ask)
            if outcome.finish not in ("stop", "length") or whole(outcome):
                raise CheckFailed(outcome.error or "The probe dropped nothing, so that it tells nothing.")
        limit = self.findings.limits(job.kind).loss_gap_limit
        found = await check(job.ask, outcome, self._run, policy=job.policy.name, kind=job.kind, gap_limit=limit)
        return replace(found, source=job.source, seconds=self._clock() - started, at=time.time())

    # --- to be shown -------------------------------------------------------------------------------------------

    def status(self, tenant: str | None = None) -> dict[str, Any]:
        """JSON-able: of one tenant alone, or of all, with what there is of all together."""
        findings, every = self.findings, tenant is None
        return {
            "model": findings.model, "counts": dict(self.counts) if every else {}, "waiting": len(self._jobs),
            "share": self.settings.share, "estimates": findings.estimates(tenant),
            "breakers": [_shown(key, it) for key, it in findings.breakers.all() if tenant in (None, key.tenant)],
            "alarms": [vars(alarm) for alarm in findings.alarms if tenant in (None, alarm.tenant)],
            "alarm_counts": dict(findings.alarm_counts) if every else {},
            "checks": [found.as_dict() for found in list(findings.checks) if tenant in (None, found.tenant)],
        }


def _tokens(outcome: Outcome) -> int:
    return outcome.prompt_tokens + outcome.completion_tokens


def _probing(ask: Ask, breaker: Breaker) -> Ask:
    return replace(
        ask, id=new_id("probe"), policy=breaker.policy.config, sampling=Sampling(), logprobs=None, given=None,
        recall_segments=None, reuse=False,
    )


def _shown(key: Key, breaker: Breaker) -> dict[str, Any]:
    return {
        **key._asdict(), "state": breaker.state, "code": breaker.code, "sentence": breaker.sentence,
        "trips": breaker.trips, "good_probes": breaker.good, "bad_probes": breaker.bad, "canary": breaker.canary,
    }
