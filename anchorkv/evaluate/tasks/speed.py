"""Speed and memory of each way, measured together with the full cache: prefill, decode, time to first token.

In one process and one run, in turns: slices of a document are read, questions are asked after it, and it is written on
in bursts. Figures are medians over slices, questions and bursts, and ratios of these medians (design.md). The full side
runs at its own library's best settings. The way "full" is the full cache against itself: how far its ratios are from 1
is the noise of the machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, ClassVar, NamedTuple

import numpy as np

from anchorkv.config import PRESETS
from anchorkv.engines.base import Engine, Tokenizer
from anchorkv.errors import CapacityError, ConfigError, DataError
from anchorkv.evaluate.rows import Rows, find
from anchorkv.evaluate.run import Item, Models, Record, Row, failures, good, seed_of
from anchorkv.evaluate.statistics import Estimate, verdict
from anchorkv.evaluate.timing import (
    SLICE,
    SessionSide,
    Side,
    Whole,
    WholeLlama,
    WholeTorch,
    fastest,
    in_turns,
    own_engine,
    rate,
    ratio_of_medians,
)
from anchorkv.evaluate.ways import FULL, Way
from anchorkv.extract import extract

QUESTION = 32
"""Tokens."""
TURNS = 8
"""Slices read at least: a short document is read several times."""
_CHARACTERS = 12
"""A token is taken to have no more; what a long text has beyond is not tokenized."""
PREFILL, DECODE, FIRST_TOKEN = "prefill", "decode", "first_token"
_CELLS = {
    "reduction": "reduction", "kept_cells": "kept_cells", "peak_cells": "peak_cells", "full_cells": "full_cells",
    "kv_bytes": "kept_bytes", "peak_kv_bytes": "peak_bytes", "full_kv_bytes": "full_bytes",
    "recalled_cells": "recalled_cells",
}
"""Figure of a row -> field of a record."""


@dataclass(frozen=True)
class Speed:
    """Tokens/s of reading and of writing, seconds to the first token of an answer, cells and bytes.

    Raises ConfigError for options that fit nothing.
    """

    name: ClassVar[str] = "speed"
    policies: ClassVar[tuple[str, ...]] = (FULL, "default", "sepllm")
    columns: ClassVar[tuple[tuple[str, str, object], ...]] = (
        ("tokens", "length", ""), ("policy", "policy", ""), ("prefill tok/s", "prefill_tok_s", ".0f"),
        ("to full", "prefill_ratio", "{:.2f}×"), ("decode tok/s", "decode_tok_s", ".1f"),
        ("to full", "decode_ratio", "{:.2f}×"), ("first token", "first_token_s", "{:.2f} s"),
        ("to full", "first_token_ratio", "{:.2f}×"), ("full / kept", "reduction", "{:.1f}×"),
        ("KV cache", "kv_bytes", lambda value: f"{value / 2**20:.1f} MiB"),
    )

    data: Path | None = None
    """Folder with lm/pg19.test.jsonl (or .gz), or a file: jsonl with a field "text", or a document. None: random words
    of the model's vocabulary, in sentences. Speed does not depend on what words say."""
    lengths: tuple[int, ...] = (1024, 4096, 8192)
    """Tokens of a document."""
    limit: int | None = None
    """Most documents a length, where `documents` asks for more."""
    seed: int = 0
    """Of random words and of questions."""
    skip_bad_rows: bool = False
    documents: int = 1
    """A length."""
    burst: int = 12
    """Tokens written in one turn."""
    rounds: int = 12
    """Questions asked, and bursts written, that count."""

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 2 * QUESTION:
            raise ConfigError(f"A document of fewer than {2 * QUESTION} tokens is too short to time; raise lengths.")
        if min(self.documents, self.burst, 1 if self.limit is None else self.limit) < 1 or self.rounds < 2:
            raise ConfigError("Speed needs at least one document, one token a burst and two rounds.")

    # --- what is read ------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Further lengths and documents go on from those measured before, so they are not in it."""
        digest = hashlib.sha256("\0".join(self._texts()).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return {"texts": digest, "seed": self.seed, "burst": self.burst, "rounds": self.rounds, "slice": SLICE}

    def items(self) -> list[Item]:
        """Lengths, ascending, and the first documents of the data."""
        most = self.documents if self.limit is None else min(self.documents, self.limit)
        count = min(most, len(self._texts()) or most)
        return [
            Item(f"{length}/{number}", {"length": length, "document": number})
            for length in sorted(set(self.lengths)) for number in range(count)
        ]

    def _texts(self) -> tuple[str, ...]:
        return read_texts(self.data, self.skip_bad_rows)

    def ways(self, ways: Sequence[Way]) -> list[Way]:
        return list(ways)

    # --- measuring ---------------------------------------------------------------------------------------------

    def measure(self, models: Models, way: Way, item: Item) -> Record:
        """`samples`: {figure: {"way", "full": seconds of each turn}}, a token's where tokens are read or written; "at":
        which slice of the document that was. Kept cells and bytes are those after the document, the peak is that of
        reading, asking and writing."""
        length, number = item.fields["length"], item.fields["document"]
        engine, room = models.of(way).engine, QUESTION + self.burst * (self.rounds + 1)
        tokens = document_tokens(engine, self._texts(), number, length + room, self.seed)
        asked = [_stretch(tokens[:length], seed_of(self.seed, item.id, turn)) for turn in range(self.rounds + 1)]
        recalled: list[int] = []

        def ask(side: Side, turn: int) -> None:
            side.ask(asked[turn])
            if isinstance(side, SessionSide):
                recalled.append(side.recalled_cells)

        def write(side: Side, turn: int) -> None:
            side.write(tokens[length + turn * self.burst :][: self.burst])

        with ExitStack() as stack:
            full = stack.enter_context(full_sides(models, way, length, room))
            same = way.policy == PRESETS[FULL]
            mine = stack.enter_context((full_sides if same else session_side)(models, way, length, room))
            sides = [*mine, *full]
            slices, spent = _prefill(sides, tokens[:length])
            samples: dict[str, dict[str, list[float]]] = {}
            settings: dict[str, str] = {}
            held = mine[0].accounting()

            def keep(figure: str, seconds: Sequence[Sequence[float]], amount: int = 1) -> None:
                ours, theirs = fastest(seconds[: len(mine)]), len(mine) + fastest(seconds[len(mine) :])
                settings[figure] = sides[theirs].label
                best = {"way": seconds[ours], "full": seconds[theirs]}
                samples[figure] = {side: [turn / amount for turn in turns] for side, turns in best.items()}

            keep(PREFILL, spent)
            samples[PREFILL]["at"] = slices
            keep(FIRST_TOKEN, in_turns([partial(ask, side) for side in sides], self.rounds, warm_up=1))
            keep(DECODE, in_turns([partial(write, side) for side in sides], self.rounds, warm_up=1), self.burst)
            peak = mine[0].accounting()
        return {
            "length": length, "engine": engine.name, "weights": engine.info.weights, "samples": samples,
            "full_settings": settings,
            "medians": {figure: {side: median(of[side]) for side in ("way", "full")} for figure, of in samples.items()},
            "ratios": {figure: median(of["full"]) / median(of["way"]) for figure, of in samples.items()},
            **asdict(held), "full_cells": length, "full_bytes": length * engine.info.cell_bytes,
            "peak_cells": peak.peak_cells, "peak_bytes": peak.peak_bytes, "reduction": length / held.kept_cells,
            "recalled_cells": mean(recalled) if recalled else 0.0,
        }

    # --- results -----------------------------------------------------------------------------------------------

    def rows(self, records: Sequence[Record], ways: Sequence[Way]) -> list[Row]:
        """By length and policy. `x_ratio`: how many times as fast as the full cache that took turns with it (of the
        first token: how many times as soon); `full_x`: what that one gave. `verdict`: of the three ratios; the full
        cache against itself is neither better nor worse."""
        found = []
        for length in sorted({int(record["item"].partition("/")[0]) for record in records}):
            of_length = [record for record in records if record["item"].startswith(f"{length}/")]
            for way in ways:
                mine = list(good(of_length, way).values())
                if mine:
                    row = {"policy": way.name, "length": length, **_figures(mine)}
                    found.append(row if way.policy == PRESETS[FULL] else {**row, "verdict": _verdict(row)})
                found += [{"policy": way.name, "length": length, "error": why} for why in failures(of_length, way)]
        return found


def _samples(records: Sequence[Record], figure: str) -> tuple[list[float], list[float], list[float] | None]:
    """Seconds of the full side's turns, of the way's, and where in the document each was."""
    samples = [record["samples"][figure] for record in records]
    full, ours, at = ([turn for one in samples for turn in one.get(name, ())] for name in ("full", "way", "at"))
    return full, ours, at or None


def _figures(records: Sequence[Record]) -> Row:
    row: Row = {}
    for figure, name in ((PREFILL, "prefill_tok_s"), (DECODE, "decode_tok_s"), (FIRST_TOKEN, "first_token_s")):
        full, ours, at = _samples(records, figure)
        for key, turns in ((name, ours), (f"full_{name}", full)):
            value = rate(turns, at)
            if figure == FIRST_TOKEN:  # seconds, not something a second; its relative error is the same
                value = Estimate(1 / value.value, value.stderr / value.value**2, value.n)
            row |= {key: value.value, f"{key}_stderr": value.stderr}
        ratio = ratio_of_medians(full, ours, at)
        row |= {f"{figure}_ratio": ratio.value, f"{figure}_ratio_stderr": ratio.stderr}
    for key, name in _CELLS.items():
        row[key] = mean(record[name] for record in records)
    settings = [f"{figure.replace('_', ' ')}: {label}" for figure, label in records[0]["full_settings"].items()]
    return row | {"documents": len(records), "engine": records[0]["engine"], "full_settings": "; ".join(settings)}


def _verdict(row: Row) -> str:
    """One word where the three ratios agree."""
    said = {
        figure.replace("_", " "): verdict(Estimate(row[f"{figure}_ratio"] - 1, row[f"{figure}_ratio_stderr"], 0))
        for figure in (PREFILL, DECODE, FIRST_TOKEN)
    }
    if len(set(said.values())) == 1:
        return said["decode"]
    return ", ".join(f"{figure} {word}" for figure, word in said.items())


def _prefill(sides: Sequence[Side], tokens: Sequence[int]) -> tuple[list[float], list[list[float]]]:
    """Which slice each turn read, and its seconds a token [side][turn]. The document is cut into equal slices and read
    again until there are TURNS of them."""
    count = -(-len(tokens) // SLICE)
    cuts = [len(tokens) * n // count for n in range(count + 1)]
    parts = [tokens[first:last] for first, last in pairwise(cuts)]
    for side in sides:  # the first decode of all sets up what later ones find
        side.read(parts[0])
    at: list[float] = []
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(-(-TURNS // count)):
        for side in sides:
            side.restart()
        spent = in_turns([partial(_read, side, parts) for side in sides], count)
        at += range(count)
        for kept, seconds in zip(found, spent, strict=True):
            kept += [second / len(part) for second, part in zip(seconds, parts, strict=True)]
    return at, found


def _read(side: Side, parts: Sequence[Sequence[int]], turn: int) -> None:
    side.read(parts[turn])


def _stretch(tokens: Sequence[int], seed: int) -> list[int]:
    """A question: tokens of the document itself, so that recall has something to find."""
    at = int(np.random.default_rng(seed).integers(0, len(tokens) - QUESTION))
    return list(tokens[at : at + QUESTION])


# --- documents -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def read_texts(data: Path | None, skip_bad_rows: bool = False) -> tuple[str, ...]:
    """Texts of `Speed.data`; none where random words are read. Raises DataError or DocumentError."""
    if data is None:
        return ()
    if data.is_dir():
        data = find(data, "lm/pg19.test.jsonl")
    if ".jsonl" in data.suffixes:
        return tuple(row["text"] for row in Rows(data, {"text": str}, skip_bad_rows))
    return (extract(data),)


def document_tokens(engine: Engine, texts: Sequence[str], number: int, count: int, seed: int) -> list[int]:
    """`count` tokens of a text, repeated as often as it takes, or of random words where there are no texts."""
    if not texts:
        return random_words(engine.tokenizer, engine.info.vocabulary, count, seed_of(seed, number))
    tokens = engine.tokenizer.encode(texts[number][: _CHARACTERS * count])
    return (tokens * (count // len(tokens) + 1))[:count]


def random_words(tokenizer: Tokenizer, vocabulary: int, count: int, seed: int) -> list[int]:
    """Tokens [count]: words of the vocabulary, drawn alike, and a full stop after every 8 to 24 of them."""
    pieces = (tokenizer.piece(token).decode("utf-8", "replace") for token in range(vocabulary))
    words = [token for token, piece in enumerate(pieces) if piece.strip().isalpha()]
    if not words:
        raise DataError("The model's vocabulary has no words to make a text of; name a file with --data.")
    random = np.random.default_rng(seed)
    drawn = random.choice(np.asarray(words), count)
    ends = np.cumsum(random.integers(9, 26, count // 9 + 1)) - 1
    drawn[ends[ends < count]] = tokenizer.encode(".")[-1]
    return [int(token) for token in drawn]

# --- the full side at its best -------------------------------------------------------------------------------------


class LlamaSetting(NamedTuple):
    """How llama.cpp runs the full cache."""

    flash: bool
    kv_type: str
    batch: int

    @property
    def kernel(self) -> tuple[bool, str]:
        return self.flash, self.kv_type

    @property
    def label(self) -> str:
        return f"{'flash' if self.flash else 'no flash'}, {self.kv_type} cells, batch {self.batch}"

    @property
    def options(self) -> dict[str, Any]:
        return {"flash_attention": self.flash, "kv_type": self.kv_type, "batch": self.batch}


SETTINGS = tuple(
    LlamaSetting(flash, kind, batch)
    for flash, kind in ((True, "f16"), (False, "f16"), (True, "q8_0")) for batch in (128, SLICE)
)


@contextmanager
def full_sides(models: Models, way: Way, length: int, more: int) -> Iterator[list[Side]]:
    """The weights of `way` with everything kept, as their own library runs them. There are several where no setting is
    the fastest in everything; of their figures the best counts.

    length: tokens of the document; more: tokens that follow it.
    """
    loaded = models.of(way).engine
    with ExitStack() as stack:
        if loaded.name == "llama":
            sides: list[Side] = []
            for setting in best_settings(models, way.adapter, length):
                own = own_engine(models, way, cells=length + more, sessions=1, **setting.options)
                sides.append(WholeLlama(stack.enter_context(own), setting.label))
        elif loaded.name == "torch":
            sides = [WholeTorch(loaded, "transformers' DynamicCache"), Whole(loaded, "this package's cache")]
        else:
            sides = [Whole(loaded, "everything kept")]
        yield sides
        for side in sides:
            side.close()


@contextmanager
def session_side(models: Models, way: Way, length: int, more: int) -> Iterator[list[Side]]:
    """What users of this package run; its context grows when the policy needs it."""
    with own_engine(models, way) as engine:
        side = SessionSide(engine, way.policy, way.name)
        yield [side]
        side.close()


@lru_cache
def best_settings(models: Models, adapter: bool, length: int) -> tuple[LlamaSetting, ...]:
    """Of SETTINGS, the fastest to read the middle of `length` tokens and the fastest to write after them: one or two,
    found by a short trial of all of them in turns. Raises CapacityError when none can be had."""
    way, middle = Way(FULL, PRESETS[FULL], adapter), max(1, length // 2)
    with ExitStack() as stack:
        tried: dict[LlamaSetting, WholeLlama] = {}
        for setting in SETTINGS:
            own = own_engine(models, way, cells=length + 2 * SLICE, sessions=3, **setting.options)
            try:
                tried[setting] = WholeLlama(stack.enter_context(own), setting.label)
            except CapacityError:  # not every model's heads can be held as q8_0
                if setting is SETTINGS[-1] and not tried:
                    raise
        sides, known = list(tried.values()), list(tried)
        tokens = [token % sides[0].engine.info.vocabulary for token in range(min(SLICE, length))]
        for side in sides:
            side.read(tokens[:middle])
            side.hold(middle)
        reading = in_turns([partial(_read_and_forget, side, tokens) for side in sides], 2)
        for side in sides:
            side.hold(length)
        writing = in_turns([partial(_write, side, tokens[:8]) for side in sides], 3, warm_up=1)
    first = known[fastest(reading)]
    kernel = known[fastest(writing)].kernel
    # The batch does not matter to one token at a time: among equals, the one that reads fastest.
    same = [index for index, setting in enumerate(known) if setting.kernel == kernel]
    second = known[same[fastest([reading[index] for index in same])]]
    return tuple(dict.fromkeys((first, second)))


def _read_and_forget(side: Whole, tokens: Sequence[int], turn: int) -> None:
    keep = side.at
    side.read(tokens)
    side.forget(keep)


def _write(side: Side, tokens: Sequence[int], turn: int) -> None:
    side.write(tokens)
