"""Canary questions: known answers, asked on a schedule, whatever users ask meanwhile.

A file of questions as `anchorkv poc` takes it (.jsonl, .json, .yaml, .csv), its documents in the folder "documents"
beside it, or else in its own folder; a sub-folder is a kind of document. The questions never change, so their share of
right answers has no sampling error and is compared with its limit as it is. Where an answer is wrong, the full cache is
asked as well: what it answers rightly the policy lost; what it does not, the model or its adapter does not know.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anchorkv.config import AnchorConfig, preset
from anchorkv.errors import AnchorKVError, DataError
from anchorkv.evaluate.metrics import contains
from anchorkv.evaluate.ways import FULL
from anchorkv.poc.documents import collect
from anchorkv.poc.questions import own_questions
from anchorkv.serve.audit.record import EVERY_TENANT
from anchorkv.serve.background import Background
from anchorkv.serve.check import Run
from anchorkv.serve.findings import Findings
from anchorkv.serve.policies import Chosen
from anchorkv.serve.requests import Ask, Busy, Message, new_id
from anchorkv.serve.series import ALL, Crossing, Key, policy_id
from anchorkv.serve.settings_groups import CanarySettings

log = logging.getLogger("anchorkv.serve")
TENANT = f"{EVERY_TENANT}canary"
"""No key belongs to it."""
TOKENS = 48
_LOOK_SECONDS = 1.0
"""Between two looks at whether it is time."""


@dataclass(frozen=True)
class CanaryQuestion:
    """A question on a text. answers: accepted ones."""

    question: str
    answers: tuple[str, ...]
    text: str = field(repr=False)
    kind: str = ""


@dataclass(frozen=True)
class CanaryResult:
    """One question of the last run. right: None where it could not be asked."""

    question: str
    kind: str
    policy: str
    answer: str
    right: bool | None
    full_right: bool | None = None
    """The full cache's; None where it was not asked."""


def canary_questions(path: Path) -> list[CanaryQuestion]:
    """Raises DataError, DocumentError, one sentence, for what cannot be used."""
    path = path.expanduser()
    if not path.is_file():
        raise DataError(f"There is no file of canary questions at {path}; check the path.")
    folder = path.parent / "documents"
    sources, _ = collect(folder if folder.is_dir() else path.parent, leave=[path])
    known = {source.id: source for source in sources}
    return [
        CanaryQuestion(found.text, found.answers, known[found.document].text, known[found.document].area)
        for found in own_questions(path, sources)
    ]


class Canary:
    """`start` and `stop` on the event loop."""

    def __init__(
        self, settings: CanarySettings, questions: Sequence[CanaryQuestion], findings: Findings, run: Run,
        policy_of: Callable[[str], Chosen], *, clock: Callable[[], float] = time.monotonic, trips: bool = True,
    ) -> None:
        """policy_of: with which policy a kind of document is served. trips: whether it opens breakers, or only says."""
        self.settings, self.questions, self._findings, self._run = settings, tuple(questions), findings, run
        self._policy_of, self._clock, self._trips = policy_of, clock, trips
        self._last: float | None = None
        self._asking = Background(self._on_time)
        self.results: tuple[CanaryResult, ...] = ()
        """Of the last run."""
        self.runs = 0
        self.at = 0.0
        """When it ended; seconds since 1970 (UTC), to be shown."""

    def due(self) -> bool:
        """Whether it is time: at the start, on schedule, and when a breaker waits for it."""
        if not self.questions:
            return False
        waited = None if self._last is None else self._clock() - self._last
        scheduled = waited is None or waited >= 60 * self.settings.every_minutes
        return scheduled or bool(self._findings.breakers.canaries())

    async def ask_all(self) -> None:
        """One run, at low priority."""
        results: list[tuple[Chosen, CanaryResult]] = []
        for question in self.questions:
            policy = self._policy_of(question.kind)
            try:
                results.append((policy, await self._asked(question, policy)))
            except Busy:
                return  # whoever asks first goes first; the next look is soon
            except AnchorKVError as error:
                log.warning("a canary question cannot be asked: %s", error)
                results.append((policy, CanaryResult(question.question, question.kind, policy.name, "", None)))
        self._last, self.at, self.runs = self._clock(), time.time(), self.runs + 1
        self.results = tuple(result for _, result in results)
        by_policy: dict[str, tuple[Chosen, list[CanaryResult]]] = {}
        for policy, result in results:
            by_policy.setdefault(policy_id(policy), (policy, []))[1].append(result)
        for policy, group in by_policy.values():
            self._judge(policy, [result for result in group if result.right is not None], len(group))

    def share(self) -> float | None:
        """Of right answers in the last run; None where nothing could be asked."""
        asked = [result.right for result in self.results if result.right is not None]
        return sum(asked) / len(asked) if asked else None

    # --- inside ------------------------------------------------------------------------------------------------

    async def _asked(self, question: CanaryQuestion, policy: Chosen) -> CanaryResult:
        answer = await self._answer(question, policy.config)
        right = contains(answer, question.answers)
        full_right = None
        if not right and policy.config != preset(FULL):
            full_right = contains(await self._answer(question, preset(FULL)), question.answers)
        return CanaryResult(question.question, question.kind, policy.name, answer, right, full_right)

    async def _answer(self, question: CanaryQuestion, policy: AnchorConfig) -> str:
        """Raises AnchorKVError when it cannot be asked."""
        message = Message("user", f"{question.text}\n\n{question.question}")
        outcome = await self._run(Ask(
            tenant=TENANT, policy=policy, messages=(message,), id=new_id("canary"), max_tokens=TOKENS, reuse=False,
        ))
        if outcome.finish not in ("stop", "length"):
            raise AnchorKVError(outcome.error or "The canary question was cancelled.")
        return outcome.text

    def _judge(self, policy: Chosen, asked: Sequence[CanaryResult], total: int) -> None:
        """Alarms, and the breaker of a policy that loses what the full cache knows."""
        least, key = self.settings.least_right, Key(ALL, self._findings.model, policy_id(policy), ALL)
        if len(asked) < total:
            self._findings.alarm("canary_unasked", f"{total - len(asked)} canary questions cannot be asked.", key)
        if not asked:
            self._findings.breakers.probed(key, None)
            return
        right = sum(result.right is True for result in asked)
        known = right + sum(result.full_right is True for result in asked)
        if known < least * len(asked):
            self._findings.alarm("canary_model", (
                f"Even the full cache answers only {known} of {len(asked)} canary questions rightly: the model or its "
                "adapter is at fault, and no policy mends that."
            ), key)
        if right >= least * known:
            self._findings.breakers.probed(key, True if known else None)
            return
        sentence = f"The policy answers {right} of the {known} canary questions rightly that the full cache answers."
        self._findings.alarm("canary_failed", sentence, key)
        self._findings.breakers.probed(key, False)
        if self._trips:
            self._findings.breakers.trip(key, policy, Crossing("canary_failed", sentence), canary=True)

    # --- the schedule ------------------------------------------------------------------------------------------

    def start(self) -> None:
        if self.questions:
            self._asking.start()

    async def stop(self) -> None:
        await self._asking.stop()

    async def _on_time(self) -> None:
        while True:
            if self.due():
                try:
                    await self.ask_all()
                except Exception:  # the next run may go well
                    log.exception("the canary failed")
                    self._last = self._clock()
            await asyncio.sleep(_LOOK_SECONDS)

    def status(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "questions": len(self.questions), "runs": self.runs, "at": self.at, "share": self.share(),
            "least_right": self.settings.least_right, "results": [asdict(result) for result in self.results],
        }
