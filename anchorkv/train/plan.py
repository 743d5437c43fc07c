"""Which token will see which, before any forward: the session's own decisions over a model that computes nothing.

Training and masked evaluation take their masks from here, so that they cannot differ from inference: the same
segmenter, scorer, budget and ledger run over an engine whose cells are known in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Bools, Cells, Floats, Ints, ModelInfo, Output, Tokenizer
from anchorkv.errors import ModelError
from anchorkv.ledger import Ledger
from anchorkv.scorers import Scorer
from anchorkv.session import Session

_NOTHING = np.zeros(0, dtype=np.float32)


class PlanningEngine:
    """Implements `engines.base.Engine` for one text whose features are known: [n] and [n, …], indexed by position."""

    name = "plan"
    masks = True

    def __init__(
        self, tokenizer: Tokenizer, info: ModelInfo, *, surprise: Floats | None = None, cells: Cells | None = None,
        batch: int = 512,
    ) -> None:
        self.tokenizer, self.info, self.batch, self.threads = tokenizer, info, batch, 1
        self.surprise, self.known_cells = surprise, cells

    def open(self) -> PlanningMemory:
        return PlanningMemory(self)

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> PlanningMemory:
        raise ModelError("A plan is made anew, not restored.")

    def decode_together(self, steps: Sequence[tuple[Any, int, int]], parts: int = 1) -> list[Output]:
        return [memory.decode([token], position) for memory, token, position in steps]

    def close(self) -> None:
        """Nothing is held."""


class PlanningMemory:
    """Positions without cells."""

    def __init__(self, engine: PlanningEngine) -> None:
        self._engine = engine
        self._held: Ints = np.zeros(0, dtype=np.int64)

    def decode(
        self, tokens: Sequence[int], start: int, *, visible: Ints | None = None, mask: Bools | None = None,
        needs: frozenset[str] = frozenset(), logits: bool = True,
    ) -> Output:
        self._held = np.concatenate([self._held, np.arange(start, start + len(tokens))])
        known = self._engine.surprise
        return Output(_NOTHING, None if known is None or not needs else known[start : start + len(tokens)])

    def drop(self, positions: Ints) -> None:
        self._held = self._held[~np.isin(self._held, positions)]

    def fork(self) -> PlanningMemory:
        other = PlanningMemory(self._engine)
        other._held = self._held
        return other

    def positions(self) -> Ints:
        return self._held

    def nbytes(self) -> int:
        return len(self._held) * self._engine.info.cell_bytes

    def read_cells(self, positions: Ints) -> Cells:
        known = self._engine.known_cells
        if known is None:
            raise ModelError("This plan was made without what the cells hold, which its scorer reads.")
        return Cells(known.values[positions], known.key_norms[positions])

    def state(self) -> dict[str, npt.NDArray[Any]]:
        return {"positions": self._held}

    def close(self) -> None:
        self._held = self._held[:0]


def plan(engine: PlanningEngine, config: AnchorConfig, tokens: Sequence[int], scorer: Scorer | None = None) -> Ledger:
    """The ledger of reading `tokens` under `config`. Added anchors are in it; `ledger.layout()` gives the rule's input.

    scorer: instead of the one that `config` names.
    """
    with Session(engine, config) as session:
        if scorer is not None:
            session.choice.scorer = scorer
        session.read(tokens, logits=False)
        return session.ledger
