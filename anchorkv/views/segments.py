"""From a ledger to what a view shows: segments with their text in runs of one state, their figures and reasons.

A token may hold part of a character (three tokens for one 猫 are common). Tokens that share a character are shown
together, in the state of whichever is still held, so that no kept cell is invisible; the counts stay exact.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from anchorkv.engines.base import Tokenizer
from anchorkv.ledger import Change, Ledger, State
from anchorkv.visibility import NEVER

STATES: dict[str, str] = {
    "whole": "in the current segment or the recent window",
    "anchor": "an anchor: its cell stays when its segment is freed",
    "sink": "one of the first tokens, never dropped",
    "pinned": "never dropped, by your wish or as the prompt",
    "recalled": "was dropped and is visible again",
    "evicted": "was an anchor until better or younger ones needed its cell",
    "dropped": "read and freed",
}
"""Every state a view tells apart, with what it means. `evicted` is the ledger's DROPPED with an eviction."""

_SHOWN_FIRST = ("anchor", "pinned", "sink", "recalled", "whole", "evicted", "dropped")
ADDED = "⚓"
"""How an added <AC> token is shown; it stands for no text."""


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one segment in one state."""

    text: str
    state: str


@dataclass(frozen=True)
class SegmentInfo:
    """One segment as a view shows it. `first`: position of its first token; `kept`: cells held of it now."""

    number: int
    first: int
    tokens: int
    kept: int
    runs: Sequence[Run]
    counts: dict[str, int]
    anchors: Sequence[str]
    changes: Sequence[Change]

    @property
    def dropped(self) -> int:
        return self.tokens - self.kept

    @property
    def density(self) -> float:
        """Share of its cells that is held, 0 to 1."""
        return self.kept / self.tokens

    @property
    def text(self) -> str:
        return "".join(run.text for run in self.runs)

    def why(self) -> list[tuple[str, str]]:
        """(state, reason) for every state its tokens are in now: the ledger's last word, or what the state means."""
        latest = {change.state: change.reason for change in self.changes}
        out = []
        for state, meaning in STATES.items():
            if self.counts.get(state):
                recorded = latest.get("dropped" if state == "evicted" else state)
                out.append((state, recorded or meaning))
        return out


def states_of(ledger: Ledger) -> list[str]:
    """The shown state of each token, by position."""
    names = [State(value).name.lower() for value in range(len(State))]
    column, evicted = ledger.column("state"), ledger.column("evicted") != NEVER
    return [
        "evicted" if gone and value == State.DROPPED else names[value]
        for value, gone in zip(column.tolist(), evicted.tolist(), strict=True)
    ]


def segment_infos(ledger: Ledger, tokenizer: Tokenizer) -> list[SegmentInfo]:
    """Every segment of the stream, in order."""
    states = states_of(ledger)
    runs, anchors = _runs(ledger, tokenizer, states)
    changes: defaultdict[int, list[Change]] = defaultdict(list)
    for change in ledger.changes:
        changes[change.segment].append(change)
    out = []
    for number in np.unique(ledger.column("segment")).tolist():
        span = ledger.span(number)
        counts = Counter(states[position] for position in span.tolist())
        kept = len(span) - counts["dropped"] - counts["evicted"]
        out.append(SegmentInfo(
            number=number, first=int(span[0]), tokens=len(span), kept=kept, runs=tuple(runs[number]),
            counts=dict(counts), anchors=tuple(anchors[number]), changes=tuple(changes[number]),
        ))
    return out


def counts_of(segments: Sequence[SegmentInfo]) -> dict[str, int]:
    """Tokens in each shown state, over all segments."""
    total: Counter[str] = Counter()
    for segment in segments:
        total.update(segment.counts)
    return {state: total.get(state, 0) for state in STATES}


def segment_text(ledger: Ledger, tokenizer: Tokenizer, number: int) -> str:
    """The text of one segment, without added anchors."""
    span = ledger.span(number)
    return tokenizer.decode(ledger.tokens[span[~ledger.column("added")[span]]].tolist())


def _runs(
    ledger: Ledger, tokenizer: Tokenizer, states: Sequence[str]
) -> tuple[defaultdict[int, list[Run]], defaultdict[int, list[str]]]:
    """Runs and anchor texts of each segment; a character that crosses a segment's end belongs to the first."""
    segment = ledger.column("segment").tolist()
    runs: defaultdict[int, list[Run]] = defaultdict(list)
    anchors: defaultdict[int, list[str]] = defaultdict(list)
    for first, last, text in _characters(ledger, tokenizer):
        state = min((states[position] for position in range(first, last)), key=_SHOWN_FIRST.index)
        number = segment[first]
        if state == "anchor":
            anchors[number].append(text)
        if not text:
            continue
        mine = runs[number]
        if mine and mine[-1].state == state:
            mine[-1] = Run(mine[-1].text + text, state)
        else:
            mine.append(Run(text, state))
    return runs, anchors


def _characters(ledger: Ledger, tokenizer: Tokenizer) -> Iterator[tuple[int, int, str]]:
    """(first position, one past the last, text) of the smallest groups of tokens that hold whole characters."""
    added = ledger.column("added").tolist()
    first, held, marks = 0, b"", ""
    for position, token in enumerate(ledger.tokens.tolist()):
        piece = b"" if added[position] else tokenizer.piece(token)
        if held and piece and piece[0] & 0xC0 != 0x80:  # a character that never became whole
            yield first, position, held.decode("utf-8", "replace") + marks
            first, held, marks = position, b"", ""
        held += piece
        marks += ADDED if added[position] else ""
        if _missing(held) == 0:
            yield first, position + 1, held.decode("utf-8", "replace") + marks
            first, held, marks = position + 1, b"", ""
    if held:
        yield first, len(added), held.decode("utf-8", "replace") + marks


def _missing(data: bytes) -> int:
    """How many bytes the last character of `data` still lacks."""
    for back, byte in enumerate(reversed(data[-4:]), start=1):
        if byte & 0xC0 != 0x80:
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return max(0, length - back)
    return 0
