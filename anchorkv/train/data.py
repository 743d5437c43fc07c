"""Texts to blocks of tokens: an endless, shuffled, weighted stream that every process sees alike and that can resume.

Documents pass through a buffer of open ones. A draw takes the next piece of one of them, chosen by a hash of the seed,
the epoch and the number of the draw, so that the blocks of one book do not follow each other and no state of a random
generator has to be kept. Pieces of less than a block are packed, several to a block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from anchorkv.engines.base import Tokenizer
from anchorkv.errors import ConfigError, DataError
from anchorkv.train.sources import Recipe, Source, Text, files, texts

HELD = 1 << 26
"""Characters of open documents after which a source opens no more, whatever the buffer's size in documents."""
OPEN_BLOCKS = 16
"""Blocks being packed at once: enough that little room is left over, few enough that no document waits long."""
LOOKED_AT = 1 << 28
"""Characters of a local source that `check` reads at most."""
MIN_TOKENS = 32
"""Of a document, or the piece of one, in a block."""

_VERSION = 1


@dataclass(frozen=True)
class Block:
    """One training sample: documents (token ids) of at most `length` tokens together. Each starts at position 0."""

    documents: list[list[int]]

    def __len__(self) -> int:
        return sum(map(len, self.documents))


@dataclass(frozen=True)
class _Piece:
    """A run of one document's tokens. `place` = [source, row, start, stop] finds it again."""

    place: tuple[int, int, int, int]
    tokens: list[int]


def check(recipe: Recipe, tokenizer: Tokenizer, vocabulary: int, min_tokens: int = MIN_TOKENS, rows: int = 300) -> None:
    """Look for bad data before training: `rows` rows of each source are tokenised (their beginnings), and local files
    are read on, up to LOOKED_AT characters, so that a file that is cut off is found now and not in the night.

    Raises DataError at the first thing that is wrong, or when a token is not below `vocabulary`, or when a source has
    no text of `min_tokens` tokens.
    """
    start, end = _edges(tokenizer)
    beginning = max(4000, 40 * min_tokens)
    for source in recipe.sources:
        characters = longest = 0
        for seen, text in enumerate(texts(source), start=1):
            if seen <= rows or longest < min_tokens:
                ids = start + tokenizer.encode(text.text[:beginning]) + end
                longest = max(longest, len(ids))
                wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
                if wrong is not None:
                    raise DataError(
                        f"{text.where} becomes token {wrong}, but the model's vocabulary has {vocabulary}; "
                        "the tokenizer belongs to another model."
                    )
            characters += len(text.text)
            if seen >= rows and (source.path is None or characters >= LOOKED_AT):
                break
        if longest < min_tokens:
            raise _too_short(source, min_tokens)


class Blocks(Iterator[Block]):
    """An endless stream of blocks of at most `length` tokens, drawn from the recipe's sources by weight (in tokens).

    A document is `start_ids`, its text and one end token. One that is longer than a block is cut into consecutive
    pieces, each with `start_ids` of its own, for a model always wants them before a text. Pieces shorter than
    `min_tokens` are left out. Each source is shuffled anew every epoch, among `buffer` open documents: files that are
    sorted by theme are better given as several sources.

    Rank r of `world` gets blocks r, r + world … of the same stream; each tokenises all of it. The same arguments and
    data give the same blocks. Raises ConfigError when an argument is out of range, DataError (from `next`) as `texts`.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, length: int, seed: int = 0, rank: int = 0, world: int = 1, *,
        min_tokens: int = MIN_TOKENS, buffer: int = 256,
    ) -> None:
        start, _ = _edges(tokenizer)
        if not len(start) < min_tokens <= length:
            raise ConfigError(f"min_tokens ({min_tokens}) must be above {len(start)} and at most length ({length}).")
        if not 0 <= rank < world:
            raise ConfigError(f"rank ({rank}) must be from 0 to world - 1 ({world - 1}).")
        if buffer < 1:
            raise ConfigError(f"buffer ({buffer}) must be 1 document or more.")
        self.recipe = recipe
        self.length = length
        self._rank, self._world = rank, world
        self._start = start
        self._min_tokens = min_tokens
        self._fingerprint = _fingerprint(recipe, [seed, length, min_tokens, buffer])
        self._draws = [
            _Draws(source, number, tokenizer, length, seed, min_tokens, buffer)
            for number, source in enumerate(recipe.sources)
        ]
        self._tokens = [0] * len(recipe.sources)
        self._packing: list[list[_Piece]] = []
        self._blocks = 0

    @property
    def blocks(self) -> int:
        """Blocks of the whole stream so far, those of all ranks."""
        return self._blocks

    @property
    def epochs(self) -> tuple[int, ...]:
        """How often each source, in the recipe's order, has been read to its end."""
        return tuple(draws.epoch for draws in self._draws)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens drawn from each source so far, for all ranks."""
        return tuple(self._tokens)

    def __next__(self) -> Block:
        # All ranks stand between the same two rounds, so one rank's state serves them all, and another `world`.
        round_of_blocks = [self._next_block() for _ in range(self._world)]
        self._blocks += self._world
        return Block([self._start + piece.tokens for piece in round_of_blocks[self._rank]])

    def _next_block(self) -> list[_Piece]:
        while True:
            piece = self._draw()
            room = self.length - self._size([piece])
            fitting = [block for block in self._packing if self._size(block) <= room]
            if fitting:
                block = max(fitting, key=self._size)
            else:
                self._packing.append(block := [])
            block.append(piece)
            if self.length - self._size(block) < self._min_tokens:
                self._packing = [other for other in self._packing if other is not block]
                return block
            if len(self._packing) > OPEN_BLOCKS:
                return self._packing.pop(0)

    def _draw(self) -> _Piece:
        # The source that lags behind its share most: exact shares without any chance in them.
        weights = [source.weight for source in self.recipe.sources]
        source = min(range(len(weights)), key=lambda n: self._tokens[n] / weights[n])
        piece = self._draws[source].next()
        self._tokens[source] += self._size([piece])
        return piece

    def _size(self, pieces: Sequence[_Piece]) -> int:
        return sum(len(self._start) + len(piece.tokens) for piece in pieces)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, for `resume`: JSON-able, some kilobytes a source, the same on every rank."""
        return {
            "version": _VERSION,
            "data": self._fingerprint,
            "blocks": self._blocks,
            "tokens": list(self._tokens),
            "sources": [draws.state() for draws in self._draws],
            "packing": [[list(piece.place) for piece in block] for block in self._packing],
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken, with any rank and world. The data is read up to there, not tokenised.

        Raises DataError when the state is damaged, or the recipe, its files or the settings are no longer the same;
        this object is then of no more use.
        """
        try:
            if state["version"] != _VERSION or state["data"] != self._fingerprint:
                raise DataError(
                    "The training data, its recipe or the block settings have changed since the run was saved; "
                    "put them back as they were, or start a new run."
                )
            packing = [[(int(a), int(b), int(c), int(d)) for a, b, c, d in block] for block in state["packing"]]
            tokens = [int(count) for count in state["tokens"]]
            pieces: dict[tuple[int, int, int, int], _Piece] = {}
            for number, (draws, saved) in enumerate(zip(self._draws, state["sources"], strict=True)):
                for piece in draws.resume(saved, [place for block in packing for place in block if place[0] == number]):
                    pieces[piece.place] = piece
            self._packing = [[pieces[place] for place in block] for block in packing]
            self._tokens, self._blocks = tokens, int(state["blocks"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"The saved place in the training data is damaged ({type(error).__name__}); start from another save."
            ) from None


@dataclass
class _Open:
    """A document in the buffer. Its text becomes ids when a piece of it is first drawn, and is then let go."""

    row: int
    text: str
    size: int
    """Characters of the text."""
    offset: int = 0
    ids: npt.NDArray[np.int32] | None = None


class _Draws:
    """The pieces of one source, epoch after epoch."""

    def __init__(
        self, source: Source, number: int, tokenizer: Tokenizer, length: int, seed: int, min_tokens: int, buffer: int
    ) -> None:
        start, self._end = _edges(tokenizer)
        self._source, self._number, self._tokenizer = source, number, tokenizer
        self._room, self._min_tokens = length - len(start), min_tokens
        self._least = min_tokens - len(start)
        self._seed, self._buffer = seed, buffer
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._rows = texts(self._source)
        self._read = self._drawn = self._held = 0
        self._open: list[_Open] = []
        self._fruitful = False

    def next(self) -> _Piece:
        """The next piece. Raises DataError when a whole epoch has none."""
        while True:
            self._fill()
            if not self._open:
                if not self._fruitful:
                    raise _too_short(self._source, self._min_tokens)
                self._begin(self.epoch + 1)
                continue
            at = self._pick()
            document = self._open[at]
            ids, start = self._ids(document), document.offset
            document.offset = min(start + self._room, len(ids))
            piece = self._piece(document, start, document.offset)
            if document.offset == len(ids):
                self._held -= document.size
                self._open[at] = self._open[-1]
                self._open.pop()
            if len(piece.tokens) >= self._least:
                self._fruitful = True
                return piece

    def _fill(self) -> None:
        while len(self._open) < self._buffer and self._held < HELD:
            text = next(self._rows, None)
            if text is None:
                return
            self._open.append(_Open(self._read, text.text, len(text.text)))
            self._held += len(text.text)
            self._read += 1

    def _pick(self) -> int:
        place = f"{self._seed} {self._number} {self.epoch} {self._drawn}"
        self._drawn += 1
        return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "big") % len(self._open)

    def _piece(self, document: _Open, start: int, stop: int) -> _Piece:
        return _Piece((self._number, document.row, start, stop), self._ids(document)[start:stop].tolist())

    def _ids(self, document: _Open) -> npt.NDArray[np.int32]:
        if document.ids is None:
            document.ids = np.asarray(self._tokenizer.encode(document.text) + self._end, dtype=np.int32)
            document.text = ""
        return document.ids

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "read": self._read,
            "drawn": self._drawn,
            "open": [[document.row, document.offset] for document in self._open],
        }

    def resume(self, state: dict[str, Any], places: Sequence[tuple[int, int, int, int]]) -> list[_Piece]:
        """Go on where `state` was taken. Returns the pieces at `places`, which were drawn but not given out."""
        self._begin(int(state["epoch"]))
        self._drawn = int(state["drawn"])
        self._fruitful = True  # not known; if it is not so, the next epoch will say it
        still_open = [(int(row), int(offset)) for row, offset in state["open"]]
        wanted = {row for row, _ in still_open} | {place[1] for place in places}
        found = self._find(wanted, self._rows, int(state["read"]))
        self._read = int(state["read"])
        # A piece that waits in a half-packed block may come from the end of the epoch before, read from other rows.
        found |= self._find(wanted - found.keys(), texts(self._source), None)
        for row, offset in still_open:
            self._open.append(_Open(row, found[row], len(found[row]), offset))
            self._held += len(found[row])
        documents = {row: _Open(row, text, len(text)) for row, text in found.items()}
        return [self._piece(documents[row], start, stop) for _, row, start, stop in places]

    def _find(self, wanted: set[int], rows: Iterator[Text], read: int | None) -> dict[int, str]:
        """The texts of `wanted` rows among the next `read` of `rows` (None: as many as it takes)."""
        found: dict[int, str] = {}
        row = 0
        while row < read if read is not None else len(found) < len(wanted):
            text = next(rows, None)
            if text is None:
                raise DataError(f"{self._source.name} has fewer texts than when the run was saved; start a new run.")
            if row in wanted:
                found[row] = text.text
            row += 1
        return found


def _edges(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before and after a text. Of several ends the lowest id: a text's end is in the vocabulary before the
    ends of turns that a chat model adds to it."""
    return list(tokenizer.start_ids()), [min(tokenizer.eos_ids)] if tokenizer.eos_ids else []


def _fingerprint(recipe: Recipe, settings: list[int]) -> str:
    """Changes when the recipe, the files' names or sizes, or the settings that shape the stream do."""
    described = [
        [s.dataset, s.subset, s.split, float(s.weight), s.field, [[p.name, p.stat().st_size] for p in files(s)]]
        for s in recipe.sources
    ]
    return hashlib.sha256(json.dumps([described, settings]).encode()).hexdigest()[:16]


def _too_short(source: Source, min_tokens: int) -> DataError:
    return DataError(f"{source.name} has no text of {min_tokens} tokens; give longer texts or lower min_tokens.")
