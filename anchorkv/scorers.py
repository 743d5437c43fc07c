"""Which tokens deserve to stay (kind SEL): a score for every token of a segment, higher is more useful.

A scorer is one small class with one method. It sees a segment once, in stream order, so that it may count what the
document has said so far and still decide the same however the text was chunked. `scorer(name)` finds one by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Protocol, Self

import numpy as np
from threadpoolctl import ThreadpoolController

from anchorkv.engines.base import CELLS, SURPRISE, Bools, Cells, Floats, ModelInfo
from anchorkv.errors import ConfigError, ModelError
from anchorkv.shipped import scorer_path


@dataclass(frozen=True)
class SegmentView:
    """What a scorer may know of a segment of n tokens. Features are present when the scorer's `needs` name them."""

    tokens: Sequence[int]
    pieces: Sequence[bytes]
    """The bytes each token stands for; b"" for control tokens."""
    start: int
    """Position of the first token in the stream."""
    surprise: Floats | None
    """-log p of each token, [n]."""
    cells: Cells | None
    """What their cells hold."""
    vocabulary: int

    def __len__(self) -> int:
        return len(self.tokens)


class Scorer(Protocol):
    """Gives every token of a segment a usefulness score."""

    name: str
    needs: frozenset[str]
    """What it reads of the model: SURPRISE, CELLS, or nothing."""

    def score(self, segment: SegmentView) -> Floats:
        """Scores [n]. Called once a segment, in stream order."""

    def copy(self) -> Self:
        """An independent scorer with the same memory of the document."""


class Stateless:
    """Base of scorers that remember nothing between segments: a copy is the scorer itself."""

    name: str
    needs: frozenset[str] = frozenset()

    def copy(self) -> Self:
        return self


class Endpoint(Stateless):
    """The segment's last token, then the one before it, and so on (EP's choice, as a score)."""

    name = "endpoint"

    def score(self, segment: SegmentView) -> Floats:
        return np.linspace(0, 1, len(segment), dtype=np.float32)


class Random(Stateless):
    """The baseline: a hash of position and token, uniform in [0, 1)."""

    name = "random"

    def score(self, segment: SegmentView) -> Floats:
        position = np.arange(segment.start, segment.start + len(segment), dtype=np.uint64)
        bits = position * np.uint64(0x9E3779B97F4A7C15) + np.asarray(segment.tokens, dtype=np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
            bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
        return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


class Frequency(Stateless):
    """Rare tokens first. A vocabulary learnt by merges gives frequent pieces low ids, so log(id) stands in for rarity.

    Scores lie in [0, 1]: log(1 + id) / log(vocabulary); 0 for control tokens, white space and punctuation, whose ids
    say nothing of their frequency.
    """

    name = "frequency"

    def score(self, segment: SegmentView) -> Floats:
        return rarity(segment) * has_content(segment)


class Landmarks(Stateless):
    """Rare tokens, and always the segment's last one: names and things, and the mark in which a sentence gathers.

    Frequency's score, plus 1 for the last token. Needs nothing from the model.
    """

    name = "landmarks"

    def score(self, segment: SegmentView) -> Floats:
        scores = rarity(segment) * has_content(segment)
        scores[-1:] += 1
        return scores


class Surprise(Stateless):
    """Tokens that the model itself did not expect first. Costs the output matrix for every token of the prompt."""

    name = "surprise"
    needs = frozenset({SURPRISE})

    def score(self, segment: SegmentView) -> Floats:
        if segment.surprise is None:
            raise ConfigError("The scorer 'surprise' needs each token's -log p, and this engine did not give it.")
        return np.nan_to_num(np.asarray(segment.surprise, dtype=np.float32))


def rarity(segment: SegmentView) -> Floats:
    """log(1 + id) / log(vocabulary), [n]."""
    ids = np.asarray(segment.tokens, dtype=np.float64)
    share: Floats = np.clip(np.log1p(ids) / np.log(max(segment.vocabulary, 3)), 0, 1).astype(np.float32)
    return share


def has_content(segment: SegmentView) -> Bools:
    """Whether a piece holds a letter or a digit of any script, [n]."""
    return np.fromiter((any(_CONTENT[byte] for byte in piece) for piece in segment.pieces), dtype=bool)


@cache
def _threads() -> ThreadpoolController:
    """The numerics libraries that are loaded: looking for them takes a millisecond."""
    return ThreadpoolController()


_LIMITING = Lock()
"""The limit is the whole process's, and two at once would leave it behind (a server's contexts score side by side)."""
_KIND = "anchorkv scorer of cells, 1"
_CONTENT = [byte >= 0x80 or chr(byte).isalnum() for byte in range(256)]


def cell_features(segment: SegmentView) -> Floats:
    """What a trained scorer sees of each token, [n, d + layers + 4]: its cell's values, the logs of its keys' lengths,
    its rarity, whether it has content and whether it is the segment's last, and the log of the segment's length.

    The cell is there already and holds a view of every layer, so scoring needs no further look into the model.
    """
    if segment.cells is None:
        raise ConfigError("A trained scorer needs what the tokens' cells hold, and this engine did not give it.")
    last = np.zeros(len(segment), dtype=np.float32)
    last[-1:] = 1
    length = np.full(len(segment), np.log1p(len(segment)), dtype=np.float32)
    return np.concatenate(
        [segment.cells.values, np.log(segment.cells.key_norms + 1e-6)]
        + [column[:, None].astype(np.float32) for column in (rarity(segment), has_content(segment), last, length)],
        axis=1,
    )


@dataclass
class Learned(Stateless):
    """A trained head on `cell_features`: standardise, then a linear map or one hidden ReLU layer.

    mean, std: [d]. weight, bias: [d] and a scalar (linear), or [m, d] and [m] with `out` [m] and `out_bias`.
    """

    mean: Floats
    std: Floats
    weight: Floats
    bias: Floats
    out: Floats | None = None
    out_bias: float = 0.0
    name: str = "learned"
    needs: frozenset[str] = frozenset({CELLS})

    def __post_init__(self) -> None:
        width = self.mean.shape[0]
        rows = self.weight.shape[:-1]
        fits = self.std.shape == (width,) and self.weight.shape == (*rows, width) and self.bias.shape == rows
        fits &= rows == () if self.out is None else len(rows) == 1 and self.out.shape == rows
        if not fits:
            raise ModelError("The scorer's arrays do not fit together: see anchorkv.scorers.Learned for their shapes.")

    def score(self, segment: SegmentView) -> Floats:
        return self.score_features(cell_features(segment))

    def score_features(self, features: Floats) -> Floats:
        """Scores [n] of features [n, d]. Raises ModelError when they are another model's."""
        if features.shape[1] != self.mean.shape[0]:
            raise ModelError(
                f"The scorer '{self.name}' was trained on another model: it reads {self.mean.shape[0]} features a "
                f"token, and this model's cells give {features.shape[1]}."
            )
        # One thread: those of a numerics library go on spinning afterwards, and halve the speed of llama.cpp's own.
        with _LIMITING, _threads().limit(limits=1, user_api="blas"):
            x = (features - self.mean) / self.std
            x = x @ self.weight.T + self.bias
            if self.out is not None:
                x = np.maximum(x, 0) @ self.out + np.float32(self.out_bias)
        return np.asarray(x, dtype=np.float32)

    def save(self, path: str | Path) -> None:
        """Write the head as one safetensors file."""
        from safetensors.numpy import save_file

        arrays = {"mean": self.mean, "std": self.std, "weight": self.weight, "bias": self.bias}
        if self.out is not None:
            arrays |= {"out": self.out, "out_bias": np.asarray([self.out_bias])}
        arrays = {key: np.array(value, dtype=np.float32, order="C") for key, value in arrays.items()}
        arrays["weight"] = arrays["weight"].astype(np.float16)  # most of the file; halves lose nothing that matters
        save_file(arrays, str(path), metadata={"kind": _KIND})

    @classmethod
    def load(cls, path: str | Path) -> Learned:
        """Read what `save` wrote. Raises ModelError when the file is missing, damaged or not a scorer."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                if (file.metadata() or {})["kind"] != _KIND:
                    raise ValueError("another kind of file")
                arrays = {key: file.get_tensor(key).astype(np.float32) for key in file.keys()}  # noqa: SIM118
            out_bias = float(arrays["out_bias"][0]) if "out_bias" in arrays else 0.0
            head = (arrays["mean"], arrays["std"], arrays["weight"], arrays["bias"])
            return cls(*head, arrays.get("out"), out_bias)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ModelError(f"'{path}' is not a scorer that anchorkv saved ({type(error).__name__}).") from None


SCORERS: dict[str, Callable[[], Scorer]] = {
    "default": Landmarks,
    "endpoint": Endpoint,
    "frequency": Frequency,
    "landmarks": Landmarks,
    "random": Random,
    "surprise": Surprise,
}


def scorer(name: str, info: ModelInfo | None = None) -> Scorer:
    """A fresh scorer by its name, or a trained one by the path of its .safetensors file. "default" is the one trained
    for the model `info` where the package has one, else the best that needs no training.

    Raises ConfigError with the known names otherwise.
    """
    path = scorer_file(name, info)
    if path is not None:
        return _load(path)
    try:
        return SCORERS[name]()
    except KeyError:
        known = ", ".join(SCORERS)
        raise ConfigError(
            f"There is no scorer '{name}'; choose one of {known}, or the path of a trained one (.safetensors)."
        ) from None


def scorer_file(name: str, info: ModelInfo | None = None) -> Path | None:
    """The file of the trained scorer that `name` means for the model `info`; None where it means none."""
    if name.endswith(".safetensors"):
        return Path(name)
    return scorer_path(info) if info is not None and name == "default" else None


@cache
def _read(path: Path, changed: float) -> Learned:
    return Learned.load(path)


def _load(path: Path) -> Learned:
    """Read once, and again when the file has changed: every session asks for its scorer."""
    return _read(path, path.stat().st_mtime if path.exists() else 0.0)
