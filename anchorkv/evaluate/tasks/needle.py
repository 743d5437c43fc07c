"""A needle in a haystack: one made-up fact in long prose, asked for by a question, at every depth of every length.

The test is Kamradt's (github.com/gkamradt/LLMTest_NeedleInAHaystack, 2023). With several needles the others are facts
of the same form about other things, RULER's "multi-key" task (Hsieh et al., arXiv 2404.06654). The form was fixed with
the full cache of the built-in model alone, which found a single needle in every trial at 1,024 and 2,048 tokens; among
three it now and then gives another one's number. Answers are greedy; one is right when the number asked for is among
the numbers in it, digit for digit.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from anchorkv.config import RecallMode
from anchorkv.engines.base import Ints, Tokenizer
from anchorkv.errors import ConfigError, DataError
from anchorkv.evaluate.asking import around, ask, compared, modes, with_full
from anchorkv.evaluate.passages import SEPARATOR
from anchorkv.evaluate.rows import Rows, find
from anchorkv.evaluate.run import Item, Models, Record, Row, seed_of
from anchorkv.evaluate.ways import Way
from anchorkv.extract import extract

THINGS = "harbour library market theatre bridge garden museum hospital tower station school bakery".split()
CITIES = "Lisbon Oslo Vienna Prague Dublin Athens Warsaw Helsinki Madrid Geneva Naples Bergen".split()
LEAD = "The special number of the {thing} in {city} is "
ASKED = "What is the special number of the {thing} in {city}?"
ALL = "all"
"""The depth of a row over all depths."""
_SENTENCE_END = re.compile(r"(?<=[a-z]{4}[.!?])(?=\s)|(?<=[。！？])")  # no "Mr." and no initial
_CHARACTERS = 8
"""A token is taken to have no more."""
_SHORTEST = 256


@dataclass(frozen=True)
class Fact:
    """One needle."""

    thing: str
    city: str
    number: str

    @property
    def lead(self) -> str:
        """What its sentence, and a whole answer, says before the number."""
        return LEAD.format(thing=self.thing, city=self.city)

    @property
    def sentence(self) -> str:
        return f"{self.lead}{self.number}."

    @property
    def question(self) -> str:
        return ASKED.format(thing=self.thing, city=self.city)


@dataclass(frozen=True)
class Needle:
    """Facts in real prose: DATA/lm/pg19.test.jsonl, or a user's own texts. One text and question an item.

    Raises ConfigError for options that fit nothing.
    """

    name: ClassVar[str] = "needle"
    columns: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("tokens", "length", ""), ("needles", "needles", ""), ("depth", "depth", ""), ("policy", "policy", ""),
        ("recall", "recall", ""), ("found", "score", ".0%"), ("full finds", "full_score", ".0%"),
        ("answer loss", "answer_loss", ".2f"), ("full / kept", "reduction", "{:.1f}×"),
        ("recalled", "recalled_cells", ".0f"),
    )

    data: Path | None = None
    """Folder with lm/pg19.test.jsonl or .jsonl.gz, rows with a field "text"."""
    limit: int | None = None
    """Items in all, of a fixed seeded order that covers lengths, depths and numbers of needles evenly; None: all."""
    seed: int = 0
    """Of the facts, the prose, where needles lie that are not asked for, and the order."""
    skip_bad_rows: bool = False
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Tokens in all: the text, the question and its answer."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle lies: 0 is before the text's first sentence, 1 behind its last."""
    needles: tuple[int, ...] = (1, 3)
    """Facts in one text, one of them asked for."""
    repeats: int = 1
    """Texts of every length, depth and number of needles, each with other prose and other facts."""
    recalls: tuple[RecallMode, ...] = ("off", "auto", "on")
    max_tokens: int = 24
    files: tuple[Path, ...] = ()
    """The user's own prose (txt, md, html, pdf, docx) instead of the books."""

    bad_rows: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    """What was wrong with the rows passed over."""
    _texts: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (self.lengths and self.depths and self.needles and self.recalls):
            raise ConfigError("Needle needs a length, a depth, a number of needles and a recall mode.")
        if min(self.lengths) < _SHORTEST:
            raise ConfigError(f"{min(self.lengths)} tokens are no haystack; ask for at least {_SHORTEST}.")
        if min(self.depths) < 0 or max(self.depths) > 1:
            raise ConfigError("A depth is a share of the text, from 0 (its beginning) to 1 (its end).")
        if min(self.needles) < 1 or max(self.needles) > len(CITIES):
            raise ConfigError(f"A text takes 1 to {len(CITIES)} needles.")
        if min(self.repeats, self.max_tokens, 1 if self.limit is None else self.limit) < 1:
            raise ConfigError("Needle needs at least one repeat, one item and one token for the answer.")

    # --- what is read ------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Further lengths, depths, needles and repeats go on from those measured before, so they are not in it."""
        digest = hashlib.sha256(SEPARATOR.join(self._read()).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return {
            "texts": digest, "seed": self.seed, "recalls": list(self.recalls), "max_tokens": self.max_tokens,
            "form": [LEAD, ASKED],
        }

    def items(self) -> list[Item]:
        """All of the grid once, then again with other prose and facts, each time in an order that any beginning of
        covers it evenly."""
        self._read()
        grid = list(product(*(list(dict.fromkeys(axis)) for axis in (self.lengths, self.needles, self.depths))))
        order = [(*cell, repeat) for repeat in range(self.repeats) for cell in _evenly(grid, self.seed)]
        return [
            Item(
                f"{length}/{needles}/{depth:g}/{repeat}",
                {"length": length, "needles": needles, "depth": depth, "repeat": repeat},
            )
            for length, needles, depth, repeat in order[: self.limit]
        ]

    def _read(self) -> list[str]:
        """The texts. Raises DataError or DocumentError when there is nothing to read."""
        if self._texts:
            return self._texts
        if self.files:
            self._texts.extend(extract(path) for path in self.files)
        elif self.data is not None:
            rows = Rows(find(self.data, "lm/pg19.test.jsonl"), {"text": str}, self.skip_bad_rows)
            self._texts.extend(row["text"] for row in rows)
            self.bad_rows.extend(rows.bad)
        else:
            raise DataError(
                "A needle needs prose to be hidden in: name the folder that holds lm/pg19.test.jsonl with --data, or "
                "files in a plan (files: [book.txt])."
            )
        return self._texts

    def text(self, tokenizer: Tokenizer, item: Item) -> tuple[str, Fact]:
        """The text of `item` and the fact that is asked for. All depths of a length and repeat share their prose.

        Raises DataError when there is too little prose.
        """
        length, needles, depth, repeat = (item.fields[name] for name in ("length", "needles", "depth", "repeat"))
        random = np.random.default_rng(seed_of(self.seed, item.id))
        things, cities = random.permutation(THINGS), random.permutation(CITIES)
        drawn = random.choice(np.arange(10_000, 100_000), needles, replace=False)
        facts = [Fact(str(t), str(c), str(n)) for t, c, n in zip(things, cities, drawn, strict=False)]
        needed = sum(len(tokenizer.encode(f" {fact.sentence}")) for fact in facts)
        room = length - around(tokenizer, facts[0].question) - self.max_tokens - needed
        pieces, ends = self._haystack(tokenizer, repeat, room)
        at = int(np.abs(ends - depth * ends[-1]).argmin())
        places = [at, *random.integers(0, len(ends), needles - 1).tolist()]
        for place, fact in sorted(zip(places, facts, strict=True), key=lambda pair: -pair[0]):
            pieces.insert(place, f" {fact.sentence}")
        return "".join(pieces).strip(), facts[0]

    def _haystack(self, tokenizer: Tokenizer, repeat: int, room: int) -> tuple[list[str], Ints]:
        """Sentences that fill `room` tokens, and how many tokens precede each of them and the end."""
        texts = sorted(self._read(), key=lambda text: seed_of(self.seed, text))
        turn, at = divmod(repeat, len(texts))
        first, *others = *texts[at:], *texts[:at]
        # Title pages and contents are no prose; once every text has been the first, each begins further on.
        prose = first[len(first) * (turn % 8 + 1) // 10 :]
        for text in others:
            if len(prose) < room * _CHARACTERS:
                prose += SEPARATOR + text
        _, *sentences = _SENTENCE_END.split(prose[: room * _CHARACTERS])
        sizes = [len(tokenizer.encode(sentence)) for sentence in sentences]
        ends = np.cumsum([0, *sizes])
        fit = int(np.searchsorted(ends, room, side="right")) - 1
        if fit < 1 or (fit == len(sizes) and ends[-1] < 0.9 * room):
            raise DataError(
                f"There is too little prose for a text of {room:,} tokens; give longer texts, or lower lengths."
            )
        return [f" {sentences[0].lstrip()}", *sentences[1:fit]], ends[: fit + 1]

    # --- measuring ---------------------------------------------------------------------------------------------

    def ways(self, ways: Sequence[Way]) -> list[Way]:
        return with_full(ways)

    def measure(self, models: Models, way: Way, item: Item) -> Record:
        """`answers`: {recall mode: what `ask` gave, and its score}. Its loss is that of the digits after the fact's own
        words, so that how the model likes to begin an answer does not blur it."""
        model = models.of(way)
        text, fact = self.text(model.engine.tokenizer, item)
        with model.read_text(text) as document:
            answers = {}
            for mode in modes(way.policy, self.recalls):
                given = ask(document, fact.question, [fact.number], mode, self.max_tokens, lead=fact.lead)
                answers[mode] = {**given, "score": float(fact.number in numbers(given["answer"]))}
        return {
            **item.fields, "tokens": document.reading.tokens, "number": fact.number, "stated": True,
            "answers": answers, "beyond_window": item.fields["length"] > model.engine.info.window,
        }

    # --- results -----------------------------------------------------------------------------------------------

    def rows(self, records: Sequence[Record], ways: Sequence[Way]) -> list[Row]:
        """By length, needles, policy and recall: over all depths first, then (`detail`) for each; see `compared`."""
        whole: list[Row] = []
        single: list[Row] = []
        for length, needles in sorted({(r["length"], r["needles"]) for r in records if "answers" in r}):
            group = [r for r in records if r["item"].startswith(f"{length}/{needles}/")]
            whole += self._rows(group, ways, {"length": length, "needles": needles, "depth": ALL})
            for depth in sorted({r["depth"] for r in group if "answers" in r}):
                cell = [r for r in group if r["item"].startswith(f"{length}/{needles}/{depth:g}/")]
                key = {"length": length, "needles": needles, "depth": depth, "detail": True}
                single += self._rows(cell, ways, key)
        return whole + single

    def _rows(self, records: Sequence[Record], ways: Sequence[Way], key: Row) -> list[Row]:
        return [
            {**key, **row, "beyond_window": any(record["beyond_window"] for record in mine)}
            for row, mine in compared(records, ways, "score")
        ]


def _evenly(grid: Sequence[tuple[float, ...]], seed: int) -> list[tuple[Any, ...]]:
    """The cells of `grid` in a seeded order: each next one is of the values that had the fewest turns so far."""
    left = sorted(grid, key=lambda cell: seed_of(seed, cell))
    kinds = [len({cell[axis] for cell in grid}) for axis in range(len(grid[0]))]
    turns: Counter[tuple[int, float]] = Counter()
    order = []
    while left:
        cell = min(left, key=lambda cell: sum(turns[part] * kinds[part[0]] for part in enumerate(cell)))
        left.remove(cell)
        order.append(cell)
        turns.update(enumerate(cell))
    return order


def numbers(text: str) -> list[str]:
    """The whole numbers in `text`, without what parts their thousands."""
    return re.findall(r"\d+", re.sub(r"(?<=\d)[, \u00a0\u202f](?=\d{3}(?!\d))", "", text))
