"""What an auditor wants to know of a session: per segment, what is held, what was dropped, and why; and where the
attention of an answer went."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from anchorkv.engines.base import ShowsAttention
from anchorkv.ledger import State
from anchorkv.serve.requests import AttentionFacts, RecalledSegment, SegmentFacts
from anchorkv.session import Session
from anchorkv.visibility import dense_mask


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
        anchor_positions=tuple(start + at for at in stayed), anchor_spans=_spans(tokens, stayed, texts),
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


def attention_facts(session: Session, prompt: int) -> AttentionFacts | None:
    """Where the attention went while the answer was written, by one more pass over it. None where the engine does not
    tell, or nothing was written.

    prompt: tokens of the text before the answer, added anchors not counted. What the answer still saw whole and is
    freed by now is read again for it; a segment that recall brought meanwhile and took away again is left out.
    Raises CapacityError, ModelError.
    """
    engine, ledger = session.engine, session.ledger
    real = np.flatnonzero(~ledger.column("added"))
    if not isinstance(engine, ShowsAttention) or not 0 < prompt < len(real):
        return None
    answer, stop = int(real[prompt]), int(real[-1])  # nothing was drawn after the last token
    held, segment = session.memory.positions(), ledger.column("segment")
    seen_whole = ledger.span(max(0, int(segment[answer - 1]) - session.config.recent_window))[0]
    start = int(np.setdiff1d(np.arange(seen_whole, answer - 1), held).min(initial=answer - 1))
    queries = np.arange(start, stop)
    keys = np.concatenate([held, queries])
    mask = dense_mask(ledger.layout(), queries, keys)
    mask[:, : len(held)] &= held < start  # what is read again is not seen twice
    shares = engine.attention(session.memory, ledger.tokens[queries].tolist(), start, mask, stop - answer + 1)

    kinds = np.where(keys < answer, ledger.column("state")[keys], -1)

    def of(*states: int) -> float:
        return float(shares[np.isin(kinds, states)].sum())

    return AttentionFacts(
        sinks=of(State.SINK), pinned=of(State.PINNED), anchors=of(State.ANCHOR), recalled=of(State.RECALLED),
        recent=of(State.WHOLE, State.DROPPED), answer=of(-1),
        segments=tuple(np.bincount(segment[keys], weights=shares, minlength=ledger.segments).tolist()),
    )


def _spans(tokens: list[int], wanted: list[int], texts: dict[int, bytes]) -> tuple[tuple[int, int], ...]:
    """Of the tokens at `wanted`: their first character in the text of `tokens`, and the one after their last."""
    decoder, spans, done = getincrementaldecoder("utf-8")("replace"), [], 0
    for token in tokens if wanted else ():
        first = done
        done += len(decoder.decode(texts[token]))
        begun = bool(decoder.getstate()[0])  # a character that the next token ends
        spans.append((first, done + begun))
    return tuple(spans[at] for at in wanted)


def _pieces(session: Session) -> dict[int, bytes]:
    piece = session.engine.tokenizer.piece
    return {token: piece(token) for token in np.unique(session.ledger.tokens).tolist()}


def _text(tokens: list[int], texts: dict[int, bytes]) -> str:
    return b"".join(texts[token] for token in tokens).decode("utf-8", errors="replace")
