"""The engine room's front: asks and documents come in from any thread; one thread of its own runs the engine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Engine
from anchorkv.serve.documents import Documents
from anchorkv.serve.grammar import open_grammar
from anchorkv.serve.handle import Handle
from anchorkv.serve.prefixes import Prefixes
from anchorkv.serve.prompts import document_script, script_of
from anchorkv.serve.requests import Ask, Busy, DocumentFacts, Load, Outcome, new_id
from anchorkv.serve.room import Room
from anchorkv.serve.rounds import Rounds
from anchorkv.serve.slots import Slot, Upload
from anchorkv.serve.writing import Writing

log = logging.getLogger("anchorkv.serve")
MEASURED_EVERY = 1.0
"""Seconds; to count the cells of forty sessions takes a tenth of a step."""


class Scheduler:
    """Many requests on one engine, which it alone may touch while it runs; whoever made the engine closes it."""

    def __init__(
        self, engine: Engine, cells: int, *, more: Sequence[Engine] = (), max_sessions: int = 64,
        max_waiting: int = 256, documents: Documents | None = None, slice_tokens: int = 256,
        background_share: float = 0.1, idle_seconds: float = 600.0, clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """cells: KV cells there are in all. more: further contexts of the same model (`engine.split`); each holds its
        part of the cells. max_sessions: most requests that run at once; max_waiting: that wait.

        slice_tokens: most tokens of a prompt that are read between two steps. background_share: part of the time that
        requests of low priority may take while others run; they take free cells, and those of what nobody has gone on
        from for `idle_seconds`.
        """
        self.engine, self.max_sessions, self.max_waiting = engine, max_sessions, max_waiting
        self.documents = documents or Documents(engine)
        self._clock = clock
        self._changed = threading.Condition()
        self._draining = self._stopping = False
        self._thread: threading.Thread | None = None
        self._files = ThreadPoolExecutor(1, thread_name_prefix="anchorkv-files")
        self.cells = cells
        self._room = Room([engine, *more], cells // (1 + len(more)), self.documents, Prefixes(idle_seconds, clock))
        self._rounds = Rounds(
            self._room, self.documents, self._files, clock, max_sessions=max_sessions, slice_tokens=slice_tokens,
            background_share=background_share,
        )
        self._last_round = clock()
        self._measured = (0, 0, 0, 0)

    @property
    def context_cells(self) -> int:
        """Cells of one context, in which a request must fit."""
        return self._room.cells

    def tell_gaps(self, told: Callable[[float], None]) -> None:
        """Have `told` called, on the engine thread, with the seconds between two tokens of an answer."""
        self._rounds.on_gap = told

    def start(self) -> None:
        """Begin to run what is submitted."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="anchorkv-engine", daemon=True)
            self._thread.start()

    def stop(self, drain: bool = True, timeout: float = 30.0) -> bool:
        """Take nothing new, let what was accepted end (`drain`, at most `timeout` seconds), cancel the rest, free all.

        Returns whether everything that had been accepted ended by itself.
        """
        with self._changed:
            self._draining = True
            whole = self._changed.wait_for(self._rounds.idle, timeout if drain else 0) if self.alive else True
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        else:
            self._rounds.cancel_all()
        self._files.shutdown()
        self._rounds.close()
        return whole

    @property
    def alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread is not None and self._thread.is_alive()

    # --- asks --------------------------------------------------------------------------------------------------

    def submit(self, ask: Ask, *, background: bool = False) -> Handle:
        """Accept `ask`; its answer comes through the handle. Tokenises here, so long prompts are for a worker thread.

        background: low priority: it runs when nothing else does, or within the background's share.
        Raises Busy when the queue is full or the server is stopping, TooLarge when it could never fit, NotFound for an
        unknown document, ConfigError for a prompt, schema or grammar that cannot be used.
        """
        self._refuse_when_full(background)
        tokenizer, document, base = self.engine.tokenizer, None, None
        if ask.document is not None:
            base = self.documents.script(ask.tenant, ask.document, ask.policy)
            document = self.documents.get(ask.tenant, ask.document), len(base)
        script = script_of(ask, tokenizer, base)
        writing = Writing(ask, tokenizer, open_grammar(self.engine, ask.grammar, ask.json_schema))
        handle = Handle(ask, self._rounds.waking, self._wake)
        self._accept(Slot(
            self.engine, script, ask.tenant, ask.policy, self._clock, handle=handle, document=document, low=background,
            writing=writing,
        ))
        return handle

    async def background(self, ask: Ask) -> Outcome:
        """The outcome of `ask` at low priority: when the engine is idle, or within the background's share."""
        async with self.submit(ask, background=True) as handle:
            return await handle.outcome()

    # --- documents ---------------------------------------------------------------------------------------------

    def add_document(self, tenant: str, text: str, policy: AnchorConfig, title: str = "") -> Future[DocumentFacts]:
        """Read a document once, and keep it. The future (`asyncio.wrap_future` awaits it) is done when it is on disk;
        cancelling it stops the reading.

        Raises as `submit`, DocumentError for an empty text; the future SavedStateError when it cannot be written.
        """
        self._refuse_when_full(False)
        script = document_script(title, text, policy, self.engine.tokenizer, strict=True)
        facts = DocumentFacts(
            id=new_id("doc"), tenant=tenant, title=title, tokens=len(script), policy=policy, created=time.time(),
            kept_cells=0, kv_bytes=0,
        )
        upload = Upload(facts, text)
        self._accept(Slot(
            self.engine, script, tenant, policy, self._clock, upload=upload, document=(facts, len(script)),
        ))
        return upload.done

    def list_documents(self, tenant: str) -> list[DocumentFacts]:
        """A tenant's documents, oldest first."""
        return [self._with_residence(facts) for facts in self.documents.list(tenant)]

    def get_document(self, tenant: str, number: str) -> DocumentFacts:
        """Raises NotFound."""
        return self._with_residence(self.documents.get(tenant, number))

    def delete_document(self, tenant: str, number: str) -> None:
        """Remove it from disk and memory, with all that was read after it. Raises NotFound, SavedStateError."""
        self.documents.delete(tenant, number)
        self._rounds.calls.append(lambda: self._room.prefixes.remove_document(number))
        self._wake()

    def _with_residence(self, facts: DocumentFacts) -> DocumentFacts:
        return replace(facts, resident=any(e.document == facts.id for e in list(self._room.prefixes.parked)))

    # --- how full it is ----------------------------------------------------------------------------------------

    def load(self) -> Load:
        """How full it is now; the cells as they were measured about a second ago."""
        running, rounds, figures = list(self._rounds.running), self._rounds, self._rounds.figures
        used, reserved, prefix_cells, document_cells = self._measured
        parked = list(self._room.prefixes.parked)
        documents = sum(entry.document is not None for entry in parked)
        return Load(
            cells=self.cells, used_cells=used, reserved_cells=reserved, prefix_cells=prefix_cells,
            document_cells=document_cells, reading=sum(slot.reading for slot in running),
            writing=sum(not slot.reading for slot in running), waiting=len(rounds.waiting) + len(rounds.low),
            max_waiting=self.max_waiting, sessions=len(running), max_sessions=self.max_sessions,
            prompt_tokens_total=figures.prompt_tokens, completion_tokens_total=figures.completion_tokens,
            cached_tokens_total=figures.cached_tokens, prefill_seconds_total=figures.prefill_seconds,
            decode_seconds_total=figures.decode_seconds, steps_total=figures.steps, prefixes=len(parked) - documents,
            documents=documents, sent_away_total=figures.sent_away, draining=self._draining,
            last_step_age=self._clock() - self._last_round,
        )

    # --- inside ------------------------------------------------------------------------------------------------

    def _refuse_when_full(self, low: bool) -> None:
        if self._draining:
            raise Busy("The server is stopping; ask again when it is back.", 10.0)
        waiting = len(self._rounds.low if low else self._rounds.waiting)
        if waiting >= self.max_waiting:
            rounds = (waiting + 1) / max(1, len(self._rounds.running))
            after = min(120.0, max(1.0, rounds * self._rounds.figures.request_seconds))
            raise Busy(f"{waiting} requests are waiting already; try again later.", after)

    def _accept(self, slot: Slot) -> None:
        self._room.check(slot)
        with self._changed:
            self._refuse_when_full(slot.low)
            (self._rounds.low if slot.low else self._rounds.waiting).put(slot)
            self._rounds.look = True
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._rounds.look = True
            self._changed.notify_all()

    def _run(self) -> None:
        measured = -1.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._rounds.busy(), 1.0)
                if self._stopping:
                    break
            try:
                self.round()
                if self._clock() - measured > MEASURED_EVERY:
                    self._measured, measured = self._room.measure(self._rounds.running), self._clock()
            except Exception:  # whatever it was, requests that were not hit by it go on
                log.exception("a round of the engine thread failed")
            with self._changed:
                self._changed.notify_all()
        self._rounds.cancel_all()

    def round(self) -> None:
        """One round, for tests that have not started the thread."""
        self._rounds.round()
        self._last_round = self._clock()
