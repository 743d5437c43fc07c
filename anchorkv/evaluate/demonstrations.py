"""A prompt's demonstrations, read once through anchors and shared by everything that is asked after them.

In-context learning puts worked examples before a question. They are the same for every question, so their anchors are
all that has to be kept of them (AnLLM, arXiv 2402.07616). A harness hands over strings, in which
demonstrations are what stands before the last delimiter:

    text -> Context (tokens, where demonstrations end) -> Demonstrations.after() -> a Session that has read it
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from anchorkv.config import AnchorConfig, preset
from anchorkv.engines.base import Engine
from anchorkv.ledger import Accounting
from anchorkv.session import Session

DELIMITER = "\n\n"
"""What ends a demonstration, as lm-eval joins them."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """All that stands before an answer: its tokens, and where each of its demonstrations ends in them, ascending."""

    tokens: Tokens
    ends: Tokens = ()

    @property
    def demonstrations(self) -> tuple[Tokens, ...]:
        """The tokens of each; what is asked follows the last."""
        return tuple(self.tokens[first:last] for first, last in pairwise((0, *self.ends)))

    def first(self, count: int) -> Context:
        """The first `count` demonstrations alone."""
        return Context(self.tokens[: self.ends[count - 1]], self.ends[:count]) if count else Context(())


def context(
    text: str, tokens: Sequence[int], encode: Callable[[str], Sequence[int]], delimiters: Sequence[str] = (DELIMITER,)
) -> Context:
    """Where the demonstrations of `text` end in its `tokens`, which stay those of the text as a whole.

    A tokenizer may put a delimiter and what follows it into one token, so a demonstration ends with the last token that
    it has in common with the text cut there: at most a delimiter early. encode: the tokens of a text.
    """
    text = text.rstrip()
    ends: list[int] = []
    for found in re.finditer("|".join(map(re.escape, delimiters)), text):
        before = ends[-1] if ends else 0
        end = _agree(encode(text[: found.end()]), tokens, before)
        if before < end < len(tokens):
            ends.append(end)
    return Context(tuple(tokens), tuple(ends))


def _agree(some: Sequence[int], others: Sequence[int], start: int) -> int:
    """How many first tokens both have in common; `start` of them probably."""
    at = start if some[:start] == others[:start] else 0
    while at < len(some) and at < len(others) and some[at] == others[at]:
        at += 1
    return at


def shared(contexts: Sequence[Context]) -> list[int]:
    """For each of several different contexts, how many of its first demonstrations another one begins with too."""
    parts = [one.demonstrations for one in contexts]
    order = sorted(range(len(parts)), key=parts.__getitem__)
    found = [0] * len(parts)
    for one, other in pairwise(order):  # neighbours have most in common
        count = 0
        while count < min(len(parts[one]), len(parts[other])) and parts[one][count] == parts[other][count]:
            count += 1
        found[one], found[other] = max(found[one], count), max(found[other], count)
    return found


@dataclass(frozen=True)
class Read:
    """What reading shared demonstrations once took, and what is kept of them."""

    demonstrations: int
    seconds: float
    accounting: Accounting


class Demonstrations:
    """Sessions that have read shared demonstrations, the newest few; close it to free their cells."""

    def __init__(self, engine: Engine, policy: AnchorConfig, *, keep: int = 2, reread: bool = False) -> None:
        """keep: how many different prefixes are held at once. reread: share nothing, so that every context is read
        from its first token, as a model without a prefix cache would."""
        self.engine, self.policy = engine, policy
        self.reads: list[Read] = []
        """Every reading of shared demonstrations, in order."""
        self._keep, self._reread = keep, reread
        self._held: OrderedDict[Context, Session] = OrderedDict()
        # A full cache drops nothing at a segment's end, and reads faster without a pause there.
        self._pause = policy != preset("full")
        # A scorer knows nothing of demonstrations; EP and AC make an anchor of every end themselves.
        self._pin = bool(policy.anchors) and not policy.ends_are_anchors and "AC" not in policy.anchors

    @property
    def seconds(self) -> float:
        """Of all readings of shared demonstrations."""
        return sum(read.seconds for read in self.reads)

    def after(self, context: Context, count: int = 0) -> Session:
        """A session of the caller's own that has read `context`, whose first `count` demonstrations are shared with
        other contexts. Every demonstration ends a segment, and its last token stays: where a policy has anchors, but
        none at a segment's end, it is pinned.

        Raises CapacityError when the engine has no cell or session left.
        """
        prefix = context.first(0 if self._reread else count)
        session = self._shared(prefix).fork() if prefix.ends else Session(self.engine, self.policy)
        try:
            self._read(session, context, len(prefix.ends))
        except BaseException:
            session.close()
            raise
        return session

    def _shared(self, prefix: Context) -> Session:
        """The session that has read `prefix` and nothing else, read now where none is held."""
        if prefix in self._held:
            self._held.move_to_end(prefix)
            return self._held[prefix]
        while len(self._held) >= self._keep:
            self._held.popitem(last=False)[1].close()
        session = Session(self.engine, self.policy)
        started = time.perf_counter()
        try:
            self._read(session, prefix, 0)
        except BaseException:
            session.close()
            raise
        self.reads.append(Read(len(prefix.ends), time.perf_counter() - started, session.accounting()))
        self._held[prefix] = session
        return session

    def _read(self, session: Session, context: Context, done: int) -> None:
        """Read on in `session`, which has read the first `done` demonstrations of `context`."""
        at = context.ends[done - 1] if done else 0
        if self._pause:
            for end in context.ends[done:]:
                pinned = [*[False] * (end - at - 1), True] if self._pin else None
                session.read(context.tokens[at:end], pinned, logits=False)
                session.end_segment()
                at = end
        if at < len(context.tokens):
            session.read(context.tokens[at:])

    def close(self) -> None:
        """Free all cells; what is asked for afterwards is read anew."""
        while self._held:
            self._held.popitem()[1].close()
