"""One answer against the full cache: what it lost, whether the full cache says the same, and what was missed.

*Loss gap*: the full cache's loss of the given answer less the loss under the policy that wrote it, in nats a token. For
sampled answers it estimates their divergence KL(policy || full cache); it is about 0 where the full cache would have
said the same. *Agreement* is judged for greedy answers alone: two samples of one model differ as well.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from anchorkv.config import preset
from anchorkv.errors import AnchorKVError
from anchorkv.evaluate.ways import FULL
from anchorkv.poc.answers import agrees
from anchorkv.recall import BM25
from anchorkv.serve.requests import Ask, Outcome, SegmentFacts, new_id

Run = Callable[[Ask], Awaitable[Outcome]]
"""Carries out an ask at low priority."""
Source = Literal["answer", "probe", "canary"]
CANDIDATES = 3
"""Dropped segments that are tried, one at a time."""
MATTERS = math.log(2)
"""A segment would have mattered when it makes the full cache's answer twice as probable."""
_ROOM = 16
"""Tokens that the full cache's answer may have beyond twice the given one's."""
_QUESTION = 400
"""Characters at the end of what the user said that segments are sought for, beside both answers."""


class CheckFailed(AnchorKVError):
    """A run of the check did not end well."""


@dataclass(frozen=True)
class Missed:
    """A dropped segment that would have mattered. `gain`: nats that it adds to the full cache's answer, all tokens."""

    number: int
    start: int
    stop: int
    gain: float


@dataclass(frozen=True)
class Check:
    """What one check found. No text of anybody is in it."""

    id: str
    """Of the request."""
    tenant: str
    policy: str
    """Its name."""
    kind: str
    source: Source = "answer"
    loss_gap: float | None = None
    agreed: bool | None = None
    """None: not judged."""
    answer_logprob: float | None = None
    full_logprob: float | None = None
    """The full cache's, of the same answer."""
    tokens: int = 0
    tried: int = 0
    """Dropped segments that were tried."""
    missed: tuple[Missed, ...] = ()
    seconds: float = 0.0
    at: float = 0.0
    """Seconds since 1970 (UTC), to be shown."""

    def good(self, gap_limit: float) -> bool | None:
        """Whether the answer is one that the full cache stands by; None where nothing was judged."""
        if self.agreed is None and self.loss_gap is None:
            return None
        return self.agreed is True or (self.loss_gap is not None and self.loss_gap <= gap_limit)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def whole(outcome: Outcome) -> bool:
    """Whether nothing was dropped on the way, so that the answer is the full cache's."""
    seen = all(not segment.dropped and not segment.recalled for segment in outcome.segments)
    return outcome.policy == preset(FULL) or (bool(outcome.segments) and seen and not outcome.policy.isolated)


async def check(ask: Ask, outcome: Outcome, run: Run, *, policy: str, kind: str, gap_limit: float) -> Check:
    """Check `outcome`, which `ask` gave. policy: what its policy is called.

    Takes one run where a greedy full cache writes the same tokens, else two, and as many more as segments are tried,
    which are where the answer is no good one by `gap_limit`.
    Raises Busy, TooLarge (the full cache would not fit), NotFound (the document is gone), CheckFailed.
    """
    found = Check(
        outcome.id, outcome.tenant, policy, kind, answer_logprob=outcome.answer_logprob, tokens=len(outcome.tokens)
    )
    if not outcome.tokens or outcome.answer_logprob is None:
        raise CheckFailed("There is no answer to check.")
    plain = replace(ask, policy=preset(FULL), given=None, recall_segments=None, logprobs=None, reuse=False)
    written = await _written(plain, outcome, run) if ask.sampling.temperature == 0 else None
    if written is not None and written.tokens == outcome.tokens:
        scored = written
    else:
        scored = await _run(run, replace(plain, given=outcome.tokens))
    if scored.answer_logprob is None:
        raise CheckFailed("The full cache gave no score.")
    found = replace(
        found, full_logprob=scored.answer_logprob, loss_gap=outcome.answer_logprob - scored.answer_logprob,
        agreed=None if written is None else _agree(ask, outcome, written),
    )
    if written is None or not written.tokens or found.good(gap_limit) is not False:
        return found
    return await _with_missed(found, ask, outcome, written, run)


async def _written(plain: Ask, outcome: Outcome, run: Run) -> Outcome:
    most = min(plain.max_tokens, 2 * len(outcome.tokens) + _ROOM)
    if outcome.finish == "length":
        most = len(outcome.tokens)  # the given answer was cut there as well
    return await _run(run, replace(plain, max_tokens=most))


def _agree(ask: Ask, outcome: Outcome, written: Outcome) -> bool:
    if written.tokens == outcome.tokens:
        return True
    return agrees(outcome.text, written.text, question_of(ask))


def question_of(ask: Ask) -> str:
    """What the user said last; "" for a plain text."""
    return next((message.content for message in reversed(ask.messages) if message.role == "user"), "")


async def _with_missed(found: Check, ask: Ask, outcome: Outcome, written: Outcome, run: Run) -> Check:
    """Leave one in: how much likelier does each of the likeliest segments make what the full cache says?"""
    candidates = _candidates(outcome, f"{question_of(ask)[-_QUESTION:]} {written.text} {outcome.text}")
    if not candidates:
        return found
    served = tuple(segment.number for segment in outcome.recalled)
    cells = sum(segment.cells for segment in outcome.recalled) + max(segment.dropped for segment in candidates)
    policy = ask.policy.replace(recall="on", recall_cells=max(ask.policy.recall_cells, cells))
    plain = replace(ask, policy=policy, given=written.tokens, logprobs=None, reuse=False)
    before = await _score(plain, served, run)
    missed = []
    for segment in candidates:
        gain = (await _score(plain, (*served, segment.number), run) - before) * len(written.tokens)
        if gain >= MATTERS:
            missed.append(Missed(segment.number, segment.start, segment.stop, gain))
    return replace(found, tried=len(candidates), missed=tuple(sorted(missed, key=lambda it: -it.gain)))


def _candidates(outcome: Outcome, query: str) -> list[SegmentFacts]:
    """The dropped segments of the prompt that share most words with `query`, best first."""
    dropped = [s for s in outcome.segments if s.dropped and not s.recalled and s.stop <= outcome.prompt_tokens]
    if not dropped:
        return []
    scores = BM25().scores([segment.text for segment in dropped], query)
    best = np.argsort(-scores, kind="stable")[:CANDIDATES].tolist()
    return [dropped[index] for index in best if scores[index] > 0]


async def _score(plain: Ask, segments: tuple[int, ...], run: Run) -> float:
    found = (await _run(run, replace(plain, recall_segments=segments))).answer_logprob
    if found is None:
        raise CheckFailed("The engine gave no score.")
    return found


async def _run(run: Run, ask: Ask) -> Outcome:
    outcome = await run(replace(ask, id=new_id("watch")))
    if outcome.finish in ("error", "cancelled"):
        raise CheckFailed(outcome.error or "The check was cancelled.")
    return outcome
