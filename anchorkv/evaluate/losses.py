"""What a model did not expect while it read: -log p of every token, through the engine that users run.

Nothing is masked here: the cells that a policy drops are gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import SURPRISE, Engine, Floats, Output, ScoresTogether
from anchorkv.ledger import Accounting
from anchorkv.session import Session


@dataclass(frozen=True)
class Read:
    """One text read once. `losses`: [n] in nats; that of the first token is NaN, for nothing precedes it."""

    losses: Floats
    kept: dict[int, int]
    """Cells held when so many tokens had been read."""
    accounting: Accounting


def read_losses(engine: Engine, policy: AnchorConfig, tokens: Sequence[int], marks: Sequence[int] = ()) -> Read:
    """Read `tokens` [n] incrementally. marks: numbers of tokens read at which the held cells are counted.

    Added anchors are neither predicted nor scored. Raises CapacityError when the engine has no cell left.
    """
    parts: list[Floats] = []

    def take(first: int, out: Output) -> None:
        if out.surprise is not None:
            parts.append(out.surprise)

    kept: dict[int, int] = {}
    with Session(engine, policy, observe=take, observe_needs=frozenset({SURPRISE})) as session:
        at = 0
        for mark in sorted({*(mark for mark in marks if 0 < mark < len(tokens)), len(tokens)}):
            session.read(tokens[at:mark])
            kept[mark] = session.accounting().kept_cells
            at = mark
        losses = np.concatenate(parts)[~session.ledger.column("added")]
        return Read(losses, kept, session.accounting())


def answer_losses(session: Session, tokens: Sequence[int]) -> Floats:
    """-log p [n] of `tokens` as what comes next in `session`, which has them read afterwards."""
    parts: list[Floats] = []
    start = len(session.ledger)
    session.observe = lambda first, out: parts.append(out.surprise) if out.surprise is not None else None
    session.observe_needs = frozenset({SURPRISE})
    try:
        session.read(tokens)
    finally:
        session.observe, session.observe_needs = None, frozenset()
    losses: Floats = np.concatenate(parts)[~session.ledger.column("added")[start:]]
    return losses


def choice_losses(session: Session, choices: Sequence[Sequence[int]]) -> list[Floats]:
    """-log p [n] of each of `choices`, none of them empty, as what comes next in `session`, which stays as it is.

    In one batch where the engine can and no segment ends within: what a choice costs is mostly its decode.
    """
    engine = session.engine
    if isinstance(engine, ScoresTogether) and all(session.reads_on(choice[:-1]) for choice in choices):
        return engine.score_together(session.memory, len(session.ledger), choices)
    found = []
    for choice in choices:
        with session.fork() as fork:
            found.append(answer_losses(fork, choice))
    return found


def context_recovered(none: float, anchored: float, full: float) -> float:
    """Of perplexities, the same weights in all three: 1 is the full cache, 0 nothing but sinks and the recent window.

    NaN where memory does not help at all, for there is nothing to recover.
    """
    return (none - anchored) / (none - full) if none > full else math.nan
