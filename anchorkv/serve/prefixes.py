"""What was read and may be read on: sessions parked after a system prompt, a document, a turn.

A session is found by the tokens that it has read: the one that holds the longest beginning of a new script is forked,
and only the rest is read. What a fork gives is what reading anew would give, since a session's state follows from its
tokens and its policy alone (nothing that recall brought back is ever parked). Tenants share nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import numpy as np

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Engine, Ints
from anchorkv.serve.cells import Held

Owner = tuple[str, str]
"""(tenant, what of the policy decides how a text is read)."""


def owner(tenant: str, policy: AnchorConfig) -> Owner:
    """Policies that differ in recall alone read a text alike."""
    return tenant, policy.model_dump_json(exclude={"recall", "recall_cells"})


class Claim(Enum):
    """What parked sessions make way for."""

    BACKGROUND = "background"
    """Work that can wait: only what nobody has gone on from for a while makes way, and no answer comes later for it."""
    REQUEST = "request"
    """A request: what no waiting request goes on from."""
    ALL = "all"
    """One that has waited long, or could not run otherwise."""


@dataclass(eq=False)
class Parked:
    """A session that waits to be forked. `stream`: [tokens read], as `Script.stream`."""

    held: Held
    owner: Owner
    stream: Ints = field(repr=False)
    recall: str = ""
    """The recall settings under which nothing was recalled on the way."""
    document: str | None = None
    """Id of the document that ends where this session stands."""
    shared: bool = False
    """Whether many may go on from here: a document, a system prompt, a prompt with several answers."""
    wanted: bool = False
    """Whether a waiting request goes on from here: evicting it would have all of it read again."""
    used: float = 0.0
    """When it was parked or found last, by the clock of `Prefixes`; -inf: it is the first to go."""

    @property
    def engine(self) -> Engine:
        return self.held.session.engine

    @cached_property
    def keys(self) -> Ints:
        """As `Held.keys`; a parked session does not change."""
        return self.held.keys()

    def begins(self, stream: Ints) -> bool:
        """Whether `stream` goes on where this one ends, or ends there with something to write on."""
        size = len(self.stream)
        if size > len(stream) or stream[size - 1] != self.stream[-1]:  # which tells most of them apart at once
            return False
        if size == len(stream) and self.held.session.logits is None:
            return False
        return bool(np.array_equal(self.stream, stream[:size]))


class Prefixes:
    """Parked sessions, least recently used first to go. Belongs to the engine thread."""

    def __init__(self, idle_seconds: float = 600.0, clock: Callable[[], float] = time.monotonic) -> None:
        """idle_seconds: what nobody has gone on from for so long makes way for background work."""
        self.parked: list[Parked] = []
        """Least recently used first."""
        self._idle_seconds, self._clock = idle_seconds, clock

    def find(self, who: Owner, stream: Ints, recall_at: int, recall: str) -> Parked | None:
        """The longest beginning of `stream` that `who` has read; beyond `recall_at` only what was read under the same
        settings of recall."""
        allowed = (e for e in self.parked if e.owner == who and (len(e.stream) <= recall_at or e.recall == recall))
        fitting = [entry for entry in allowed if entry.begins(stream)]
        if not fitting:
            return None
        found = max(fitting, key=lambda entry: len(entry.stream))
        self._touch(found)
        return found

    def want(self, entries: Iterable[Parked | None]) -> None:
        """These, and no others, are what waiting requests go on from."""
        wanted = {id(entry) for entry in entries}
        for entry in self.parked:
            entry.wanted = id(entry) in wanted

    def holds(self, who: Owner, stream: Ints) -> bool:
        """Whether a session stands exactly at the end of `stream`."""
        return any(
            entry.owner == who and len(entry.stream) == len(stream) and bool(np.array_equal(entry.stream, stream))
            for entry in self.parked
        )

    def add(self, entry: Parked) -> None:
        self.parked.append(entry)
        self._touch(entry)

    def went_on(self, entry: Parked) -> None:
        """A request goes on from `entry`, and holds most of its cells now: a conversation seldom goes on twice from one
        place, so unless it is `shared` it is the first to go."""
        if not entry.shared:
            entry.used = -math.inf
            self.parked.remove(entry)
            self.parked.insert(0, entry)

    def stay(self, claim: Claim) -> list[Parked]:
        """Those that do not make way for `claim`."""
        if claim is Claim.BACKGROUND:
            since = self._clock() - self._idle_seconds
            return [entry for entry in self.parked if entry.wanted or entry.used > since]
        return [entry for entry in self.parked if entry.wanted] if claim is Claim.REQUEST else []

    def evict(self, engine: Engine | None = None, claim: Claim = Claim.ALL, keep: Parked | None = None) -> bool:
        """Free the least recently used one (of `engine`) that makes way for `claim`, `keep` excepted and wanted ones
        last. False when there is none."""
        stay = {id(entry) for entry in (*self.stay(claim), *([keep] if keep is not None else []))}
        candidates = [e for e in self.parked if id(e) not in stay and engine in (None, e.engine)]
        if not candidates:
            return False
        self.remove(min(candidates, key=lambda entry: entry.wanted))
        return True

    def remove(self, entry: Parked) -> None:
        self.parked.remove(entry)
        entry.held.session.close()

    def remove_document(self, number: str) -> None:
        """Everything that was read of this document goes, what was asked after it included."""
        ends = [e for e in self.parked if e.document == number]
        for end in ends:
            for entry in [e for e in self.parked if e.owner == end.owner and len(e.stream) >= len(end.stream)]:
                if np.array_equal(entry.stream[: len(end.stream)], end.stream):
                    self.remove(entry)

    def clear(self) -> None:
        while self.evict():
            pass

    def _touch(self, entry: Parked) -> None:
        entry.used = self._clock()
        self.parked.remove(entry)
        self.parked.append(entry)
