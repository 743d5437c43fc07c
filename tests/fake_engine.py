"""An engine without a model: bytes as tokens, logits that depend on what is seen. For fast tests of what lies above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from anchorkv.engines.base import SURPRISE, Bools, Cells, Ints, Memory, ModelInfo, Output, surprise_of
from anchorkv.errors import SavedStateError

END, OPEN, ANCHOR = 256, 257, 258
VOCABULARY = 259
HIDDEN_SIZE = 8
_CONTROLS = {END: "<|end|>", OPEN: "<|open|>", ANCHOR: "<|anchor|>"}


class ByteTokenizer:
    """One token a byte, and three control tokens."""

    eos_ids = frozenset({END})

    def encode(self, text: str, special: bool = False) -> list[int]:
        if not special:
            return list(text.encode())
        out: list[int] = []
        while text:
            token = next((token for token, name in _CONTROLS.items() if text.startswith(name)), None)
            out += [token] if token is not None else text[0].encode()
            text = text[len(_CONTROLS[token]) if token is not None else 1 :]
        return out

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", "replace")

    def chat(self, messages: Sequence[dict[str, str]], generate: bool = True) -> str:
        text = "".join(f"<|open|>{m['role']}\n{m['content']}<|end|>\n" for m in messages)
        return text + ("<|open|>assistant\n" if generate else "")

    def start_ids(self) -> list[int]:
        return []

    def anchor_id(self) -> int:
        return ANCHOR


class FakeMemory:
    """Which positions are held, and the token of each."""

    def __init__(self, engine: FakeEngine, cells: dict[int, int] | None = None) -> None:
        self.engine = engine
        self.cells = dict(cells or {})

    def decode(
        self, tokens: Sequence[int], start: int, *, visible: Ints | None = None, mask: Bools | None = None,
        needs: frozenset[str] = frozenset(), logits: bool = True,
    ) -> Output:
        assert mask is None
        seen = [p for p in self.cells if p < start] if visible is None else visible.tolist()
        total = sum((self.engine.table[self.cells[p]] for p in seen), np.zeros(VOCABULARY))
        rows = []
        for token in tokens:
            total = total + self.engine.table[token]
            rows.append(self.engine.logits(total, token))
        for at, token in enumerate(tokens, start=start):
            self.cells.setdefault(at, token)
        surprise = None
        if SURPRISE in needs:
            follows = [surprise_of(row, token) for row, token in zip(rows, tokens[1:], strict=False)]
            surprise = np.asarray([1.0, *follows], dtype=np.float32)
        return Output(rows[-1], surprise)

    def drop(self, positions: Ints) -> None:
        for position in positions.tolist():
            self.cells.pop(position, None)

    def fork(self) -> Memory:
        return FakeMemory(self.engine, self.cells)

    def positions(self) -> Ints:
        return np.asarray(sorted(self.cells), dtype=np.int64)

    def nbytes(self) -> int:
        return len(self.cells) * self.engine.info.cell_bytes

    def read_cells(self, positions: Ints) -> Cells:
        values = np.asarray([self.engine.table[self.cells[p]][:HIDDEN_SIZE] for p in positions.tolist()])
        return Cells(values.astype(np.float32), np.abs(values[:, :2]).astype(np.float32))

    def state(self) -> dict[str, npt.NDArray[Any]]:
        return {"cells": np.asarray(sorted(self.cells.items()), dtype=np.int64).reshape(-1, 2)}

    def close(self) -> None:
        self.cells = {}


class FakeEngine:
    """Deterministic; prefers letters and spaces, and ends a turn now and then."""

    name = "fake"
    masks = False
    threads = 2

    def __init__(self, window: int = 8192, batch: int = 64) -> None:
        self.tokenizer = ByteTokenizer()
        self.batch = batch
        self.info = ModelInfo(
            name="fake", architecture="fake", layers=2, kv_heads=1, head_dim=8, hidden_size=HIDDEN_SIZE,
            vocabulary=VOCABULARY, window=window, cell_bytes=64, fingerprint="fake-1", weights="none",
        )
        self.table = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY))
        self.bias = np.full(VOCABULARY, -50.0)
        self.bias[ord("a") : ord("z") + 1] = 0
        self.bias[[ord(" "), ord("."), END]] = (2, 0, -1)
        self.closed = False

    def logits(self, total: npt.NDArray[np.float64], token: int) -> npt.NDArray[np.float32]:
        return (self.bias + 2 * np.sin(total) + self.table[token]).astype(np.float32)

    def open(self) -> Memory:
        return FakeMemory(self)

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> Memory:
        try:
            return FakeMemory(self, dict(state["cells"].tolist()))
        except (KeyError, ValueError) as error:
            raise SavedStateError(f"the cells do not fit ({error})") from None

    def decode_together(self, steps: Sequence[tuple[Memory, int, int]], parts: int = 1) -> list[Output]:
        return [memory.decode([token], position) for memory, token, position in steps]

    def close(self) -> None:
        self.closed = True
