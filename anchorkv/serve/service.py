"""The server without HTTP: who may ask, with which policy, what it may take, what is recorded, and who looks on.

The life of a request: `caller` → `asking` (policy, ladder, limits, engine room, audit record, observers: see
exchange.py). Documents and the audit trail go through here as well, each tenant to its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import ModelInfo
from anchorkv.errors import AnchorKVError, SavedStateError
from anchorkv.serve.audit.errors import AuditUnavailable
from anchorkv.serve.audit.record import Record
from anchorkv.serve.audit.trail import AuditTrail
from anchorkv.serve.auth import KeyGate, LoopbackGate, Principal
from anchorkv.serve.background import Background
from anchorkv.serve.exchange import Asking
from anchorkv.serve.extraction import AT_ONCE, SECONDS, extract_apart
from anchorkv.serve.handle import Handle
from anchorkv.serve.keys import Role
from anchorkv.serve.limits import Limiter
from anchorkv.serve.policies import Chosen, Policies, Wish
from anchorkv.serve.prompts import script_of
from anchorkv.serve.recording import record_of
from anchorkv.serve.refusals import Refused, bad, forbidden, refusal, stopping, timed_out
from anchorkv.serve.requests import Ask, DocumentFacts, Message, SegmentFacts, new_id
from anchorkv.serve.safeguard import Safeguard
from anchorkv.serve.scheduler import Scheduler
from anchorkv.serve.seams import Answered, Exposition, Ladder, Observer, Quality, Question
from anchorkv.serve.settings_groups import RequestLimits

log = logging.getLogger("anchorkv.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class ModelCard:
    """What is served."""

    name: str
    """As callers name it."""
    info: ModelInfo
    adapter: str = ""
    adapter_fingerprint: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970, as OpenAI's list of models has it."""


@dataclass
class Service:
    """Everything that a request needs. Belongs to one event loop."""

    scheduler: Scheduler
    card: ModelCard
    policies: Policies
    trail: AuditTrail
    gate: KeyGate | LoopbackGate
    limits: Limiter
    ladder: Ladder
    bounds: RequestLimits
    drain_seconds: float = 30.0
    observers: list[Observer] = field(default_factory=list)
    safeguard: Safeguard | None = None
    """The quality watch and the canary, where `ladder` and one of `observers` are theirs."""
    metrics: Exposition | None = None
    beside: Sequence[Background] = ()
    """What else runs from start to end."""
    draining: bool = False
    running: int = 0
    """Requests in progress, of all kinds."""
    _extracting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE), repr=False)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set, repr=False)

    # --- who asks ----------------------------------------------------------------------------------------------

    async def caller(self, key: str | None, client: str, *roles: Role) -> Principal:
        """Who asks from the address `client`, if it may do what any of `roles` may. Raises Refused."""
        found = None
        try:
            found = await asyncio.to_thread(self.gate.caller, key, client)  # a key's first check takes its time
            if not found.roles.intersection(roles):
                raise forbidden(f"This key may not do that; it needs the role {' or '.join(roles)}.")
        except Refused as error:
            self.refused(found, error)
            raise
        return found

    def refused(self, caller: Principal | None, refused: Refused) -> None:
        """Tell those who look on."""
        self._tell(lambda observer: observer.refused(caller, refused))

    def _tell(self, told: Callable[[Observer], None]) -> None:
        for observer in self.observers:
            try:
                told(observer)
            except Exception:  # what is recorded is to be given, and the others are to be told
                log.exception("%s, who looks on, failed", type(observer).__name__)

    # --- asking ------------------------------------------------------------------------------------------------

    def asking(
        self, caller: Principal, asks: Sequence[Ask], wish: Wish, *, quality: Quality = "normal", shown: bool = False
    ) -> Asking:
        """Answers to `asks`, whose policy is chosen here. shown: their pieces are shown as they come.

        Raises Refused, NotFound and ConfigError, as entering it does.
        """
        try:
            self._refuse_when_draining()
            if len(asks) > self.bounds.answers:
                raise bad(f"A request may ask for {self.bounds.answers} answers at most (got {len(asks)}).", "n")
            for ask in asks:
                if ask.max_tokens > self.bounds.max_tokens:
                    most = self.bounds.max_tokens
                    raise bad(f"max_tokens may be {most} at most (got {ask.max_tokens}).", "max_tokens")
            policy = self.policies.choose(wish, self._read_with(caller, asks[0].document))
        except AnchorKVError as error:
            self.refused(caller, refusal(error))
            raise
        return Asking(self, [
            Question(caller, replace(ask, policy=policy.config), policy, quality, wish.area) for ask in asks
        ], shown)

    def _read_with(self, caller: Principal, document: str | None) -> Chosen | None:
        if document is None:
            return None
        config = self.scheduler.documents.get(caller.tenant, document).policy
        return Chosen(self.policies.name_of(config), config)

    def submit(self, ask: Ask) -> Handle:
        """Into the engine room; takes its time for a long prompt. Raises as `Scheduler.submit`."""
        if (most := self.bounds.tokens) is not None:
            documents, tokenizer = self.scheduler.documents, self.scheduler.engine.tokenizer
            base = None if ask.document is None else documents.script(ask.tenant, ask.document, ask.policy)
            size = len(script_of(ask, tokenizer, base)) + ask.max_tokens
            if size > most:
                raise Refused(
                    400, f"Prompt and answer together may have {most:,} tokens, and this request may take {size:,}; "
                    "shorten it.", param="max_tokens", code="context_length_exceeded",
                )
        return self.scheduler.submit(ask)

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise stopping()

    async def record(self, answered: Answered) -> None:
        """Write the audit record, then tell the observers. Raises Refused (503) when nothing takes the record: the
        answer must not be acknowledged then."""
        await self._append(lambda: self._record_of(answered))
        self._tell(lambda observer: observer.answered(answered))

    def _record_of(self, answered: Answered) -> Record:
        ask, title, text = answered.ask, "", None
        if ask.document is not None:
            try:
                title = self.scheduler.documents.get(ask.tenant, ask.document).title
                text = self.scheduler.documents.text(ask.tenant, ask.document)
            except (AnchorKVError, OSError):  # deleted, or damaged, meanwhile
                text = None
        earlier = [
            {"policy_config": o.policy.model_dump(mode="json", exclude={"pinned"}), "answer_logprob": o.answer_logprob,
             "completion_tokens": o.completion_tokens, "kept_cells": o.kept_cells, "full_cells": o.full_cells}
            for o in answered.earlier
        ]
        question = answered.question
        return record_of(
            ask, answered.outcome, self.card.info, time=question.asked, key=question.caller.key,
            adapter=self.card.adapter, adapter_fingerprint=self.card.adapter_fingerprint,
            policy=answered.plan.policy.name, fallback=answered.plan.steps, document_title=title, document_text=text,
            details={"quality": question.quality, "area": question.area, "earlier": earlier},
        )

    async def _append(self, make: Callable[[], Record]) -> None:
        try:
            await asyncio.to_thread(lambda: self.trail.append(make()))
        except AuditUnavailable as error:
            log.error("nothing takes an audit record: %s", error)
            raise Refused(
                503, "The answer cannot be recorded now, so it is not given; try again later.", code="no_audit",
                retry_after=5.0,
            ) from None
        except Exception:  # told here, for nobody may wait for the answer any more
            log.exception("an audit record cannot be stored")
            raise Refused(
                500, "The answer cannot be recorded, so it is not given; the fault is in the server's log.",
                code="no_audit",
            ) from None

    # --- documents ---------------------------------------------------------------------------------------------

    async def extract(self, data: bytes, name: str) -> str:
        """The text of a file. Raises DocumentError, Refused (413)."""
        seconds = min(SECONDS, self.bounds.seconds)
        async with self._extracting:
            return await extract_apart(data, name, seconds=seconds, most=self.bounds.upload_bytes)

    async def add_document(self, caller: Principal, title: str, text: str, wish: Wish) -> DocumentFacts:
        """Read a document and keep it. Raises Refused, Busy, TooLarge, DocumentError, ConfigError, SavedStateError."""
        self._refuse_when_draining()
        policy = self.policies.choose(wish)
        if len(text.encode()) > self.bounds.upload_bytes:
            raise Refused(
                413, f"The document holds more than {self.bounds.upload_bytes:,} bytes of text; send it in parts.",
                code="document_too_large",
            )
        size = len(text.encode())
        with (
            self.counted(), self.limits.storing(caller, size, lambda: self._stored(caller.tenant)),
            self.limits.enter(caller, size // 4 + 1) as lease,
        ):
            future = await self.in_thread(
                lambda: self.scheduler.add_document(caller.tenant, text, policy.config, title), self._give_up
            )
            try:
                async with self._in_time():
                    facts = await asyncio.wrap_future(future)
            except BaseException as error:
                self._give_up(future)
                if isinstance(error, SavedStateError):
                    raise Refused(503, str(error), code="no_storage", retry_after=30.0) from None
                raise
            lease.settle(facts.tokens)
            await asyncio.shield(self.later(self._note_upload(caller, facts)))
        return facts

    def _give_up(self, upload: Future[DocumentFacts]) -> None:
        """Nobody waits for it any more: it must not stay without a record."""
        upload.cancel()
        if not upload.cancelled() and upload.exception() is None:
            self._remove(upload.result())

    async def _note_upload(self, caller: Principal, facts: DocumentFacts) -> None:
        """What cannot be recorded does not stay. Raises Refused."""
        try:
            await self._note(caller, "uploaded", facts.id, facts.policy)
        except Exception:
            await asyncio.to_thread(self._remove, facts)
            raise

    def _remove(self, facts: DocumentFacts) -> None:
        try:
            self.scheduler.delete_document(facts.tenant, facts.id)
        except AnchorKVError as error:
            log.error("the document %s, which nobody was told of, stays: %s", facts.id, error)

    def _stored(self, tenant: str) -> int:
        """Bytes that a tenant's documents take, by the files' sizes where there are any."""
        return sum(facts.file_bytes or 4 * facts.tokens for facts in self.scheduler.list_documents(tenant))

    async def delete_document(self, caller: Principal, number: str) -> None:
        """It is recorded first: nothing is taken away unseen. Raises NotFound, SavedStateError, Refused."""
        await asyncio.to_thread(self.scheduler.get_document, caller.tenant, number)
        await asyncio.shield(self.later(self._delete(caller, number)))

    async def _delete(self, caller: Principal, number: str) -> None:
        await self._note(caller, "deleted", number, None)
        try:
            await asyncio.to_thread(self.scheduler.delete_document, caller.tenant, number)
        except AnchorKVError:
            await self._note(caller, "not deleted", number, None)
            raise

    async def _note(self, caller: Principal, action: str, number: str, policy: AnchorConfig | None) -> None:
        """What was done to a document, for the auditor."""
        config = {} if policy is None else policy.model_dump(mode="json")
        name = "" if policy is None else self.policies.name_of(policy)
        await self._append(lambda: Record(
            id=new_id("act"), tenant=caller.tenant, kind="document", key=caller.key, model=self.card.info.name,
            model_fingerprint=self.card.info.fingerprint, policy=name, policy_config=config,
            details={"action": action, "document": number},
        ))

    async def segments(self, caller: Principal, number: str) -> Sequence[SegmentFacts]:
        """What every anchor of a document holds: read it up to its end, at low priority, and look.

        Raises NotFound, SavedStateError, Busy, Refused (504).
        """
        facts = self.scheduler.get_document(caller.tenant, number)
        with self.counted():
            async with self._in_time():
                outcome = await self.scheduler.background(Ask(
                    tenant=caller.tenant, policy=facts.policy.replace(recall="off"), document=number, max_tokens=1,
                    messages=(Message("user", "."),),
                ))
        if outcome.finish in ("error", "cancelled"):
            raise SavedStateError(outcome.error or "The document cannot be read now; try again.")
        return [segment for segment in outcome.segments if segment.stop <= facts.tokens]

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Raises Refused (504) where the block takes longer than a request may."""
        try:
            async with asyncio.timeout(self.bounds.seconds):
                yield
        except TimeoutError:
            raise timed_out(self.bounds.seconds) from None

    # --- threads, and the end ----------------------------------------------------------------------------------

    async def in_thread(self, action: Callable[[], T], undo: Callable[[T], object]) -> T:
        """`action` in a worker thread. Where the caller is cancelled meanwhile, what it gives is undone."""
        task = asyncio.ensure_future(asyncio.to_thread(action))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda it: it.cancelled() or it.exception() or undo(it.result()))
            raise

    def later(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do `work` though nobody may wait for it; the server does not end before it is done."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda it: it.cancelled() or it.exception())  # whoever does wait is told
        return task

    def counted(self) -> _Counted:
        """`running` is one more within."""
        return _Counted(self)

    async def drain(self) -> bool:
        """Take nothing new; wait for what runs, as long as the bounds say. Whether all of it ended by itself."""
        self.draining = True
        until = time.monotonic() + self.drain_seconds
        while (self.running or self._tasks) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return not self.running

    def start(self) -> None:
        """Begin to answer. Call it on the event loop."""
        self.scheduler.start()
        if self.safeguard is not None:
            self.safeguard.start()
        for task in self.beside:
            task.start()

    async def close(self) -> None:
        """End what still runs, and see that all of it is recorded. Engine and trail are for whoever made them."""
        self.draining = True
        for task in self.beside:
            await task.stop()
        if self.safeguard is not None:
            try:
                await self.safeguard.stop()
            except Exception:  # what runs must be ended and recorded all the same
                log.exception("the quality watch did not end in order")
        await asyncio.to_thread(self.scheduler.stop, False)
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)


class _Counted:
    def __init__(self, service: Service) -> None:
        self._service = service

    def __enter__(self) -> None:
        self._service.running += 1

    def __exit__(self, *_: object) -> None:
        self._service.running -= 1

