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


class Exchange:
    """One answer: iterate over `pieces`, then await `answered`."""

    def __init__(self, service: Service, question: Question, shown: bool) -> None:
        """shown: pieces are shown as they come, unless the ladder wants to see the answer first."""
        self._service, self.question, self._shown = service, question, shown
        self.plan = Plan(question.policy)
        self._earlier: list[Outcome] = []
        self._handle: Handle | None = None
        self._expired = False
        self._answered: Answered | None = None

    async def prepare(self) -> None:
        """Ask the ladder which policy to begin with."""
        self.plan = await asyncio.to_thread(self._service.ladder.before, self.question)

    async def open(self) -> None:
        """Into the engine room. Raises Busy, TooLarge, NotFound, ConfigError."""
        self._handle = await self._submit(self.plan)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it is written; of several that the ladder tried, the one that stands."""
        while True:
            handle = self._running
            if not self._shown or self.plan.hold:
                outcome = await handle.outcome()
                again = self._again(outcome)
                if again is not None and await self._answer_again(again):
                    self._earlier.append(outcome)
                    continue
            async for piece in handle:
                yield piece
            return

    async def answered(self) -> Answered:
        """How it ended, after it was recorded. Raises Refused: nothing may be acknowledged then."""
        found = await self._ended()
        outcome = found.outcome
        if outcome.finish == "error":
            raise Refused(500, outcome.error or "The server failed; the fault is in its log.", code="engine_error")
        if self._expired:
            raise timed_out(self._service.bounds.seconds)
        if outcome.finish == "cancelled":
            raise stopping()
        return found

    @property
    def over(self) -> bool:
        """Whether it has ended and is being recorded, or never began."""
        return self._answered is not None or self._handle is None

    @property
    def tokens(self) -> int:
        """Read and written by now, as far as it is known."""
        outcomes = [*self._earlier, *([self._answered.outcome] if self._answered else [])]
        return sum(o.prompt_tokens - o.cached_tokens + o.completion_tokens for o in outcomes)

    def expire(self) -> None:
        """Its time is over."""
        self._expired = True
        self.call_off()

    def call_off(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    async def end(self) -> None:
        """Nobody waits for it: see that what there is gets recorded."""
        if not self.over:
            try:
                await self._ended()
            except AnchorKVError as error:
                log.error("nothing took the record of %s, which nobody got: %s", self.question.ask.id, error)

    async def _ended(self) -> Answered:
        if self._answered is None:
            handle = self._running
            outcome = await handle.outcome()
            if outcome.finish in ("stop", "length"):
                shown = self._shown and not self.plan.hold
                remarks = self._service.ladder.remarks(self.question, self.plan, outcome, shown)
                self.plan = replace(self.plan, steps=(*self.plan.steps, *remarks))
            self._answered = Answered(self.question, self.plan, handle.ask, outcome, tuple(self._earlier))
            await asyncio.shield(self._service.later(self._service.record(self._answered)))
        return self._answered

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
            wanted, stands = plan.policy.name, self.plan.policy.name
            back = Step(wanted, stands, f"No answer with '{wanted}' could be had, so this one stands. {error}")
            self.plan = replace(self.plan, steps=(*plan.steps, back))
            return False
        self.plan, self._handle = plan, handle
        return True

    async def _submit(self, plan: Plan) -> Handle:
        ask = replace(self.question.ask, policy=plan.policy.config)
        return await self._service.in_thread(lambda: self._service.submit(ask), Handle.cancel)

    def _again(self, outcome: Outcome) -> Plan | None:
        if outcome.finish in ("error", "cancelled"):
            return None
        return self._service.ladder.after(self.question, self.plan, outcome)


class Asking:
    """The answers of one request. `async with` it; leaving early calls off what is not written."""

    def __init__(self, service: Service, questions: Sequence[Question], shown: bool) -> None:
        self._service, self._questions = service, questions
        self.exchanges = [Exchange(service, question, shown) for question in questions]
        self._lease: Lease | None = None
        self._timer: asyncio.TimerHandle | None = None

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
