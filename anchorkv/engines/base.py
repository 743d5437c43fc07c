"""The small protocol that the session drives: a model, its tokenizer, and one KV memory a session.

An engine knows cells, positions and logits. It knows nothing of segments, anchors or recall: which cells a token sees
and which are freed is decided above it (visibility, session), so that every engine follows the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

SURPRISE = "surprise"
"""In `needs`: the engine returns each token's own -log p."""
CELLS = "cells"
"""In a scorer's `needs`: what the tokens' cells hold (`Memory.read_cells`)."""


@dataclass(frozen=True)
class ModelInfo:
    """What the program needs to know of a model. `fingerprint` changes when the weights do."""

    name: str
    architecture: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocabulary: int
    window: int
    cell_bytes: int
    fingerprint: str
    scorer: str = ""
    """Path of the scorer that came with the model, "" where none did."""
    weights: str = ""
    """How the weights are stored, for tables: "Q8_0", "fp32" …"""


@dataclass(frozen=True)
class Output:
    """What one decode gave. `logits`: [vocabulary] of the last token; `surprise`: [n]."""

    logits: Floats
    surprise: Floats | None = None


@dataclass(frozen=True)
class Cells:
    """What n held cells say, alike on every engine: keys enter by their length, which no rotation changes.

    values: [n, d], all layers and heads one behind the other. key_norms: [n, layers].
    """

    values: Floats
    key_norms: Floats


class Tokenizer(Protocol):
    """Text to ids and back, with the model's own chat template."""

    eos_ids: frozenset[int]
    """Ids that end a turn or a text."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without any token added at its ends. `special`: parse control tokens written in the text."""

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for; b"" for control tokens."""

    def decode(self, tokens: Sequence[int]) -> str: ...

    def chat(self, messages: Sequence[dict[str, str]], generate: bool = True) -> str:
        """`messages` ({"role", "content"}) in the model's own template; `generate`: open the assistant's turn."""

    def start_ids(self) -> list[int]:
        """What the model wants before a text ([bos] or nothing)."""

    def anchor_id(self) -> int:
        """The added <AC> token; a model without one uses a stand-in that never occurs in text (see docs)."""


class Memory(Protocol):
    """The KV cells of one session. Positions are the tokens' original indices in the session's stream."""

    def decode(
        self, tokens: Sequence[int], start: int, *, visible: Ints | None = None, mask: Bools | None = None,
        needs: frozenset[str] = frozenset(), logits: bool = True,
    ) -> Output:
        """Run `tokens` at positions start, start + 1, … and hold their cells.

        visible: the held positions [m] they may see, besides each other causally (None: everything held below
            `start`; cells at or above `start` are never seen).
        mask: booleans [n, held + n], rows in the order of `tokens`, columns in the order of `positions()` and then
            `tokens`; only where `engine.masks` is true; excludes `visible`.
        A position that is held already (recall runs whole segments again, anchors included) is computed anew for
            the others to see, and its old cell is what stays.
        logits: False when nobody will ask for the last token's logits (saves the output matrix).
        Raises CapacityError when no cell is left; the memory is then as before.
        """

    def drop(self, positions: Ints) -> None:
        """Free the cells at these positions. Positions that are not held are ignored."""

    def fork(self) -> Memory:
        """Another memory with the same cells; writing to one never changes the other."""

    def positions(self) -> Ints:
        """Positions held now, ascending, read from the engine's own structures."""

    def nbytes(self) -> int:
        """Bytes of keys and values of the cells held now, read from the engine's own structures."""

    def read_cells(self, positions: Ints) -> Cells:
        """What the cells at `positions` [n] hold; all of them must be held. Raises ModelError where they are not."""

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything `Engine.restore` needs, as named arrays."""

    def close(self) -> None:
        """Free all cells. A closed memory must not be used."""


class Engine(Protocol):
    """A loaded model that can hold several memories at once."""

    name: str
    info: ModelInfo
    tokenizer: Tokenizer
    masks: bool
    """Whether Memory.decode takes a `mask`, so that several segments can be read in one forward."""
    batch: int
    """Most tokens a decode takes; longer ones are split by the caller."""
    threads: int
    """CPU threads that it computes with."""

    def open(self) -> Memory: ...

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> Memory:
        """A memory as `Memory.state` gave it. Raises SavedStateError when it does not fit this engine."""

    def decode_together(self, steps: Sequence[tuple[Memory, int, int]], parts: int = 1) -> list[Output]:
        """One token (memory, token, position) for each of several sessions, in one batch.

        parts: contexts of the same model that decode at once, each with so many times fewer threads.
        """

    def close(self) -> None: ...


@runtime_checkable
class ShowsAttention(Protocol):
    """What an engine may offer beside `Engine`: where the attention of some tokens goes."""

    def attention(self, memory: Any, tokens: Sequence[int], start: int, mask: Bools, rows: int) -> Floats:
        """Run `tokens` [n] at positions start, start + 1, … aside: `memory`, one of this engine's, stays as it is.

        mask: booleans [n, held + n], as `Memory.decode` takes it.
        Returns [held + n], in the order of the mask's columns: the share of the attention that each cell gets, as the
        mean over layers, heads and the last `rows` tokens; it sums to 1. Raises CapacityError when there is no room,
        ModelError where the model does not tell.
        """


@runtime_checkable
class ScoresTogether(Protocol):
    """What an engine may offer beside `Engine`: several continuations of one memory in one batch."""

    def score_together(self, memory: Any, start: int, texts: Sequence[Sequence[int]]) -> list[Floats]:
        """-log p [n] of each of `texts`, none of them empty, as what comes next at position `start`.

        Each sees all that `memory`, one of this engine's, holds; it stays as it is. Raises CapacityError when there is
        no room.
        """


def surprise_of(logits: Floats, token: int) -> float:
    """-log p(token) under `logits` [vocabulary], in nats."""
    top = float(logits.max())
    return top + float(np.log(np.exp(logits - top).sum())) - float(logits[token])
