"""What an auditor wants to know of a session: per segment, what is held, what was dropped, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from anchorkv.ledger import State
from anchorkv.serve.requests import RecalledSegment, SegmentFacts
from anchorkv.session import Session


def segment_facts(session: Session) -> tuple[SegmentFacts, ...]:
    """All segments, in order."""
    ledger = session.ledger
    if not len(ledger):
        return ()
    why: defaultdict[int, list[str]] = defaultdict(list)
    for change in ledger.changes:
        why[change.segment].append(f"{change.count} {change.state}: {change.reason}")
    segment, states, tokens = ledger.column("segment"), ledger.column("state"), ledger.tokens
    starts = np.flatnonzero(np.diff(segment, prepend=-1)).tolist()
    texts = _pieces(session)
    return tuple(
        _facts(int(segment[start]), start, stop, states[start:stop], tokens[start:stop].tolist(), texts, why)
        for start, stop in zip(starts, [*starts[1:], len(ledger)], strict=True)
    )


def _facts(
    number: int, start: int, stop: int, states: np.ndarray, tokens: list[int], texts: dict[int, bytes],
    why: dict[int, list[str]],
) -> SegmentFacts:
    counts = np.bincount(states, minlength=len(State)).tolist()
    dropped = counts[State.DROPPED]
    thinned = dropped > 0 or counts[State.RECALLED] > 0
    stayed = np.flatnonzero((states != State.DROPPED) & (states != State.RECALLED)).tolist() if thinned else []
    return SegmentFacts(
        number=number, start=start, stop=stop, tokens=stop - start, kept=stop - start - dropped, dropped=dropped,
        pinned=counts[State.PINNED], recalled=counts[State.RECALLED], why=tuple(why.get(number, ())),
        text=_text(tokens, texts), anchors=tuple(_text([tokens[at]], texts) for at in stayed),
    )


def recalled_facts(session: Session, numbers: Sequence[int]) -> tuple[RecalledSegment, ...]:
    """The segments that recall brought back, in the order in which it did; `cells` as it brought them."""
    texts, ledger, found = _pieces(session), session.ledger, []
    for number in dict.fromkeys(numbers):
        span = ledger.span(number)
        cells = [c.count for c in ledger.reasons(number) if c.state == State.RECALLED.name.lower()]
        text = _text(ledger.tokens[span].tolist(), texts)
        found.append(RecalledSegment(number, cells[-1] if cells else 0, int(span[0]), int(span[-1]) + 1, text))
    return tuple(found)


def _pieces(session: Session) -> dict[int, bytes]:
    piece = session.engine.tokenizer.piece
    return {token: piece(token) for token in np.unique(session.ledger.tokens).tolist()}


def _text(tokens: list[int], texts: dict[int, bytes]) -> str:
    return b"".join(texts[token] for token in tokens).decode("utf-8", errors="replace")
