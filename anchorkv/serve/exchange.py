"""One answer, and several at once, from the question to the record: limits, ladder, engine room, time limit, audit.

However an answer ends, what was answered is recorded, though nobody may wait for it any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from anchorkv.errors import AnchorKVError
from anchorkv.serve.cells import most_cells
from anchorkv.serve.handle import Handle
from anchorkv.serve.limits import Lease
from anchorkv.serve.refusals import Refused, refusal, stopping, timed_out
from anchorkv.serve.requests import Ask, Outcome, Piece
from anchorkv.serve.seams import Answered, Plan, Question, Step

if TYPE_CHECKING:
    from anchorkv.serve.service import Service

log = logging.getLogger("anchorkv.serve")
_FAULT = "The server failed; the fault is in its log."


class Exchange:
    """One answer: iterate over `pieces`, then await `answered`."""

    def __init__(self, service: Service, question: Question, shown: bool) -> None:
        """shown: pieces are shown as they come, unless the ladder wants to see the answer first."""
        self._service, self.question, self._shown = service, question, shown
        self.plan = Plan(question.policy)
        self._handle: Handle | None = None
        self._before: list[tuple[Plan, Handle]] = []
        """Answers that the ladder did not let stand, each with its plan."""
        self._failed: list[Outcome] = []
        """Attempts at a safer answer that came to nothing."""
        self._off = self._expired = False
        self._recording: asyncio.Task[Answered] | None = None

    async def prepare(self) -> None:
        """Ask the ladder which policy to begin with."""
        self.plan = await asyncio.to_thread(self._service.ladder.before, self.question)

    async def open(self) -> None:
        """Into the engine room. Raises Busy, TooLarge, NotFound, ConfigError."""
        self._handle = await self._submit(self.plan)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it is written; of several that the ladder tried, the one that stands."""
        while not self._shown or self.plan.hold:
            outcome = await self._running.outcome()
            if outcome.finish in ("error", "cancelled"):
                self._step_back(outcome)
                break
            again = None if self._off else await self._again(outcome)
            if again is None or not await self._answer_again(again):
                break
        async for piece in self._running:
            yield piece

    async def answered(self) -> Answered:
        """How it ended, after it was recorded. Raises Refused: nothing may be acknowledged then."""
        found = await self._ended()
        outcome = found.outcome
        if outcome.finish == "error":
            raise Refused(500, outcome.error or _FAULT, code="engine_error")
        if outcome.finish == "cancelled":
            raise self._late()
        return found

    @property
    def over(self) -> bool:
        """Whether it has ended and is being recorded, or never began."""
        return self._recording is not None or self._handle is None

    @property
    def tokens(self) -> int:
        """Read and written by what has ended."""
        outcomes = [*self._earlier, *([self._handle.done()] if self._handle and self._handle.ended else [])]
        return sum(o.prompt_tokens - o.cached_tokens + o.completion_tokens for o in outcomes)

    def expire(self) -> None:
        """Its time is over."""
        self._expired = True
        self.call_off()

    def call_off(self) -> None:
        self._off = True
        if self._handle is not None:
            self._handle.cancel()

    async def end(self) -> None:
        """Nobody waits for it: see that what there is gets recorded."""
        if not self.over:
            try:
                await self._ended()
            except AnchorKVError as error:
                log.error("nothing took the record of %s, which nobody got: %s", self.question.ask.id, error)
            except Exception:  # the records of the other answers must be written all the same
                log.exception("%s, which nobody got, could not be recorded", self.question.ask.id)

    async def _ended(self) -> Answered:
        """Recorded once, whoever asks first: who reads a stream may still be about when the request is over."""
        await self._running.outcome()
        if self._recording is None:
            handle = self._running
            answered = Answered(self.question, self.plan, handle.ask, handle.done(), tuple(self._earlier))
            self._recording = self._service.later(self._record(answered))
        return await asyncio.shield(self._recording)

    async def _record(self, answered: Answered) -> Answered:
        if answered.outcome.finish in ("stop", "length"):
            remarks = await asyncio.to_thread(self._remarks, answered)
            plan = replace(answered.plan, steps=(*answered.plan.steps, *remarks))
            answered = replace(answered, plan=plan)
        await self._service.record(answered)
        return answered

    def _remarks(self, answered: Answered) -> tuple[Step, ...]:
        shown = self._shown and not answered.plan.hold
        try:
            return self._service.ladder.remarks(self.question, answered.plan, answered.outcome, shown)
        except Exception:  # the answer may be shown already: its record must be written
            return (self._unseen(answered.plan),)

    async def _again(self, outcome: Outcome) -> Plan | None:
        """How to write it anew; None where it stands, as it does when the ladder fails."""
        try:
            return await asyncio.to_thread(self._service.ladder.after, self.question, self.plan, outcome)
        except Exception:  # the answer is there
            self.plan = replace(self.plan, steps=(*self.plan.steps, self._unseen(self.plan)))
            return None

    def _unseen(self, plan: Plan) -> Step:
        """For the record, where the ladder has just failed."""
        log.exception("the ladder could not look at %s", self.question.ask.id)
        return Step(plan.policy.name, plan.policy.name, f"The ladder could not look at this answer. {_FAULT}", "unseen")

    @property
    def _earlier(self) -> list[Outcome]:
        return [*(handle.done() for _, handle in self._before), *self._failed]

    @property
    def _running(self) -> Handle:
        if self._handle is None:
            raise RuntimeError("open the exchange before using it")
        return self._handle

    async def _answer_again(self, plan: Plan) -> bool:
        """Whether the answer is being written anew. Where the engine room refuses, the one that is there stands."""
        try:
            handle = await self._submit(plan)
        except AnchorKVError as error:
            self._let_stand(self.plan, plan, str(error))
            return False
        except Exception:  # whatever it was, there is an answer
            log.exception("%s could not be answered more safely", self.question.ask.id)
            self._let_stand(self.plan, plan, _FAULT)
            return False
        if self._off:
            self._let_stand(self.plan, plan, str(self._late()))
            return False
        self._before.append((self.plan, self._running))
        self.plan, self._handle = plan, handle
        return True

    def _step_back(self, outcome: Outcome) -> None:
        """The attempt came to nothing: the answer before it stands, if there is one."""
        if not self._before or self._recording is not None:
            return
        self._failed.append(outcome)
        stands, self._handle = self._before.pop()
        self._let_stand(stands, self.plan, outcome.error or str(self._late()))

    def _let_stand(self, stands: Plan, wanted: Plan, why: str) -> None:
        before, after = wanted.policy.name, stands.policy.name
        back = Step(before, after, f"No answer with '{before}' could be had, so this one stands. {why}", "refused")
        self.plan = replace(stands, steps=(*wanted.steps, back))

    def _late(self) -> Refused:
        """Why it was called off."""
        return timed_out(self._service.bounds.seconds) if self._expired else stopping()

    async def _submit(self, plan: Plan) -> Handle:
        ask = replace(self.question.ask, policy=plan.policy.config)
        handle = await self._service.in_thread(lambda: self._service.submit(ask), Handle.cancel)
        if self._off:  # meanwhile
            handle.cancel()
        return handle


class Asking:
    """The answers of one request. `async with` it; leaving early calls off what is not written."""

    def __init__(self, service: Service, questions: Sequence[Question], shown: bool) -> None:
        self._service, self._questions = service, questions
        self.exchanges = [Exchange(service, question, shown) for question in questions]
        self._lease: Lease | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._left = False

    async def __aenter__(self) -> Self:
        """Raises Refused, Busy, TooLarge, NotFound, ConfigError; then nothing runs."""
        service, caller = self._service, self._questions[0].caller
        service.running += 1
        try:
            for exchange in self.exchanges:
                await exchange.prepare()
            tokens = [_most_tokens(exchange.question.ask) for exchange in self.exchanges]
            self._lease = service.limits.enter(
                caller, sum(tokens), answers=len(tokens), cells=sum(map(self._most_cells, self.exchanges, tokens)),
            )
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(service.bounds.seconds, self._expire)
            for exchange in self.exchanges:
                await exchange.open()
        except BaseException as error:
            self._leave()
            if isinstance(error, AnchorKVError):
                service.refused(caller, refusal(error))
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._left:
            return
        self._left = True
        if all(exchange.over for exchange in self.exchanges):
            self._close()
            return
        for exchange in self.exchanges:
            if not exchange.over:
                exchange.call_off()
        self._service.later(self._end())

    async def _end(self) -> None:
        try:
            for exchange in self.exchanges:
                await exchange.end()
        finally:
            self._close()

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._lease is not None:
            self._lease.settle(sum(exchange.tokens for exchange in self.exchanges))
            self._lease.close()
        self._service.running -= 1

    def _expire(self) -> None:
        for exchange in self.exchanges:
            exchange.expire()

    def _most_cells(self, exchange: Exchange, tokens: int) -> int:
        """About the most cells that it may hold; the engine room has the exact bound."""
        ask, service = exchange.question.ask, self._service
        document = 0 if ask.document is None else service.scheduler.documents.get(ask.tenant, ask.document).tokens
        return most_cells(service.scheduler.engine, exchange.plan.policy.config, tokens + document, 0, 0)


def _most_tokens(ask: Ask) -> int:
    """About the most tokens that it may read and write: what it did is settled when it has ended."""
    texts = [ask.text or "", *(message.content for message in ask.messages)]
    return ask.max_tokens + len(ask.tokens or ()) + sum(len(text.encode()) // 4 + 1 for text in texts)
