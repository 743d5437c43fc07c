"""Perplexity of long texts, read through the engine that users run, beside the full cache of the same weights.

Every way reads the same documents; "context recovered" sets it against its own ground, the same sinks, recent window
and segments with no memory beyond them (design.md). Losses are kept by blocks of 256 tokens, and standard errors are
the bootstrap's over these blocks, the same drawn ones on both sides of a ratio.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from anchorkv.config import preset
from anchorkv.engines.base import Engine, Floats, Ints
from anchorkv.errors import ConfigError, DataError
from anchorkv.evaluate.losses import context_recovered, read_losses
from anchorkv.evaluate.rows import Rows, find
from anchorkv.evaluate.run import Item, Models, Record, Row
from anchorkv.evaluate.statistics import Numbers, bootstrap, mean
from anchorkv.evaluate.ways import BASE, FULL, WINDOW, Way, no_memory
from anchorkv.extract import extract

BLOCK = 256
"""Tokens whose losses are drawn together: neighbours are not independent."""
DOCUMENTS = 2
_CHARACTERS = 8
"""A token is taken to have no more; what a long text has beyond is not read."""
Figure = Callable[..., float]
"""Of the blocks [n, 2] of one or several sides: sums of losses, and how many."""


@dataclass(frozen=True)
class Perplexity:
    """Documents out of DATA/lm/TEXT.jsonl, and whole files. Raises ConfigError for options that fit nothing."""

    name: ClassVar[str] = "perplexity"
    policies: ClassVar[tuple[str, ...]] = (FULL, BASE, WINDOW, "default", "default:reduction=24")
    columns: ClassVar[tuple[tuple[str, str, object], ...]] = (
        ("text", "text", ""), ("policy", "policy", ""), ("full / kept", "reduction", "{:.1f}×"),
        ("perplexity", "perplexity", ".2f"), ("to full", "ratio", ".3f"), ("to base", "ratio_to_base", ".3f"),
        ("recovered", "context_recovered", ".1%"),
    )

    data: Path | None = None
    """Folder with lm/TEXT.jsonl or .jsonl.gz, rows with a field "text"."""
    limit: int | None = None
    """Documents of each text."""
    seed: int = 0
    """Of the bootstrap; the documents are the first ones, whatever it is."""
    skip_bad_rows: bool = False
    texts: tuple[str, ...] = ("pg19.test", "wikitext2.test")
    files: tuple[Path, ...] = ()
    """Documents of the user's own (txt, md, html, pdf, docx), the first `length` tokens of each."""
    documents: int | None = None
    """Of each text; None: `limit`, else 2."""
    length: int = 4096
    """Tokens of a document."""
    first: int = 512
    """Tokens at the start of each that are read but not scored: older context hardly exists there."""

    bad_rows: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    """What was wrong with the rows passed over."""
    _rows: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _tokens: dict[tuple[str, str], list[list[int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.first < 0 or self.length <= self.first + 1:
            raise ConfigError(
                f"Of {self.length} tokens the first {self.first} are not scored, which leaves nothing; raise length or "
                "lower first."
            )
        if self._count < 1:
            raise ConfigError(f"{self._count} documents are none; ask for at least one.")

    @property
    def _count(self) -> int:
        return next(number for number in (self.documents, self.limit, DOCUMENTS) if number is not None)

    # --- what is read ------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """More documents go on from fewer, so their number is not in it; nor is the seed, which no record knows of."""
        digests = {name: _digest(rows) for name, rows in self._read().items()}
        return {"texts": digests, "length": self.length, "first": self.first}

    def items(self) -> list[Item]:
        """Documents of the data's texts first. There may turn out to be fewer: only tokens can tell."""
        found = []
        for name, rows in self._read().items():
            count = 1 if name in self._own else min(self._count, len(rows))
            found += [Item(f"{name}/{number}", {"text": name, "document": number}) for number in range(count)]
        return found

    @property
    def _own(self) -> dict[str, Path]:
        """The user's files by the name that they have in results."""
        return {path.name: path for path in self.files}

    def _read(self) -> dict[str, list[str]]:
        """{text: rows}, long rows cut. Raises DataError or DocumentError when there is nothing to read."""
        if self._rows:
            return self._rows
        if self.data is None and not self.files:
            raise DataError(
                "Perplexity needs documents: name the folder that holds lm/*.jsonl with --data, or files in a plan "
                "(files: [report.pdf])."
            )
        if len(self._own) < len(self.files):
            raise ConfigError("Two of the files have the same name; results could not tell them apart.")
        most = _CHARACTERS * self.length
        if self.data is not None:
            for name in self.texts:
                rows = Rows(find(self.data, f"lm/{name}.jsonl"), {"text": str}, self.skip_bad_rows)
                self._rows[name] = [row["text"][:most] for row in rows]
                self.bad_rows.extend(rows.bad)
        self._rows.update({name: [extract(path)[:most]] for name, path in self._own.items()})
        return self._rows

    def _documents(self, engine: Engine, text: str) -> list[list[int]]:
        """The first `length` tokens of the first rows that have as many; short rows are read one after the other. A
        user's file may be shorter."""
        key = engine.info.fingerprint, text
        if key not in self._tokens:
            found: list[list[int]] = []
            waiting: list[int] = []
            for row in self._read()[text]:
                waiting += engine.tokenizer.encode(row)
                if len(waiting) >= self.length or (text in self._own and len(waiting) > self.first + 1):
                    found.append(waiting[: self.length])
                    waiting = []
                if len(found) == self._count:
                    break
            self._tokens[key] = found
        return self._tokens[key]

    def notes(self, models: Models, ways: Sequence[Way]) -> list[str]:
        """What a user should know before anything is measured, a sentence each."""
        engine = models.of(ways[0]).engine
        found = []
        if self.length > engine.info.window:
            found.append(
                f"{self.length:,} tokens are more than the {engine.info.window:,} that the model was trained for; "
                "positions beyond that were never trained, and the rows are marked."
            )
        for text in self._read():
            have, asked = len(self._documents(engine, text)), 1 if text in self._own else self._count
            if have < asked:
                enough = self.first + 2 if text in self._own else self.length
                found.append(f"{text} has {have} of the {asked} documents asked for ({enough:,} tokens each).")
        return found

    # --- measuring ---------------------------------------------------------------------------------------------

    def ways(self, ways: Sequence[Way]) -> list[Way]:
        """Those asked for, the base model's full cache, and the grounds that anchors start from."""
        asked = {way.name: way for way in ways}
        wanted = [*asked.values(), *([] if BASE in asked else [Way(BASE, preset(FULL), adapter=False)])]
        grounds = {way.name: way for way in map(ground_of, ways) if way is not None and way.name not in asked}
        return [*wanted, *grounds.values()]

    def measure(self, models: Models, way: Way, item: Item) -> Record:
        """`blocks`: [sum of losses in nats, tokens scored] of each 256 tokens; `kept`: [tokens read, cells held]."""
        if not way.adapter and models.name is not None:
            return {"skipped": "only the built-in model has an adapter that can be left out"}
        engine = models.of(way).engine
        documents = self._documents(engine, item.fields["text"])
        if item.fields["document"] >= len(documents):
            return {"skipped": "the text has no such document"}
        tokens = documents[item.fields["document"]]
        read = read_losses(engine, way.policy, tokens, _marks(len(tokens)))
        cells = read.accounting
        return {
            **item.fields, "tokens": len(tokens), "blocks": _blocks(read.losses, self.first),
            "kept": sorted(read.kept.items()), "reduction": cells.reduction, "kv_bytes": cells.kept_bytes,
            "peak_kv_bytes": cells.peak_bytes, "beyond_window": len(tokens) > engine.info.window,
        }

    # --- results -----------------------------------------------------------------------------------------------

    def rows(self, records: Sequence[Record], ways: Sequence[Way]) -> list[Row]:
        """By text and policy. `ratio` is to the full cache of the same weights; `difference` its negative logarithm, in
        nats a token, more is better. All ways of a text are judged by the documents that all of them read."""
        found = []
        for text in _texts(records):
            reads = _reads(records, text, self.ways(ways))
            found += [self._row(text, way, reads) for way in ways if way.name in reads]
        return found

    def _row(self, text: str, way: Way, reads: dict[str, list[Record]]) -> Row:
        mine = reads[way.name]
        full, base = reads.get(way.full), reads.get(BASE)
        ground = ground_of(way)
        none = reads.get(ground.name) if ground is not None else None
        row: Row = {
            "policy": way.name, "text": text, "documents": len(mine), "length": max(r["tokens"] for r in mine),
            "tokens": sum(count for r in mine for _, count in r["blocks"]),
            **self._figure("perplexity", perplexity, mine),
            **self._figure("ratio", ratio, mine, full), **self._figure("ratio_to_base", ratio, mine, base),
        }
        if ground is None:
            row |= {"context_recovered": 1.0, "context_recovered_stderr": 0.0}
        else:
            row |= self._figure("context_recovered", recovered, none, mine, full)
        row |= self._figure("difference", lambda *sides: -math.log(ratio(*sides)), mine, full)
        for name in ("reduction", "kv_bytes", "peak_kv_bytes"):
            over = mean([r[name] for r in mine])
            row |= {name: over.value, f"{name}_stderr": over.stderr}
        return row | {"beyond_window": any(r["beyond_window"] for r in mine), "curve": _curve(mine)}

    def _figure(self, name: str, figure: Figure, *sides: list[Record] | None) -> Row:
        """`figure` of what the sides read, and its standard error over their blocks. NaN where a side is missing."""
        parts = [_scored(side) for side in sides if side is not None]
        if len(parts) < len(sides):
            return {name: math.nan, f"{name}_stderr": math.nan}

        def drawn(indices: Ints) -> float:
            return figure(*(part[indices] for part in parts))

        value = figure(*parts)
        error = bootstrap(drawn, len(parts[0]), self.seed) if math.isfinite(value) else math.nan
        return {name: value, f"{name}_stderr": error}

    def figures(self, records: Sequence[Record], ways: Sequence[Way]) -> str:
        """For the line under the progress bar: perplexities so far, and their ratios to the full cache."""
        said = []
        for text in _texts(records):
            parts = []
            for way in ways:
                mine, full = (_of_text(records, name, text) for name in (way.name, way.full))
                both = [item for item in mine if item in full]
                if both:
                    ours, theirs = (_scored(side[item] for item in both) for side in (mine, full))
                    part = f"{way.name} {perplexity(ours):.2f}"
                    parts.append(part if way.name == way.full else f"{part} ({ratio(ours, theirs):.3f}×)")
            said += [f"{text}: {', '.join(parts)}"] if parts else []
        return " · ".join(said)


def ground_of(way: Way) -> Way | None:
    """What `way` is set against for "context recovered": itself where it has no memory; None for a full cache."""
    if way.policy == preset(FULL):
        return None
    return way if no_memory(way.policy) == way.policy else way.ground


def perplexity(blocks: Numbers) -> float:
    return math.exp(blocks[:, 0].sum() / blocks[:, 1].sum())


def ratio(blocks: Numbers, others: Numbers) -> float:
    return perplexity(blocks) / perplexity(others)


def recovered(none: Numbers, anchored: Numbers, full: Numbers) -> float:
    return context_recovered(perplexity(none), perplexity(anchored), perplexity(full))


def _marks(length: int) -> list[int]:
    """256, 512, 1,024 … below `length`, and `length`."""
    doubled = [BLOCK << power for power in range(length.bit_length()) if BLOCK << power < length]
    return [*doubled, length]


def _blocks(losses: Floats, first: int) -> list[list[float]]:
    scored = np.arange(len(losses)) >= max(first, 1)  # nothing precedes the first token
    values = np.where(scored, losses, 0).astype(np.float64)
    starts = range(0, len(losses), BLOCK)
    return [[float(values[at : at + BLOCK].sum()), int(scored[at : at + BLOCK].sum())] for at in starts]


def _texts(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record["text"] for record in records if "blocks" in record))


def _of_text(records: Iterable[Record], way: str, text: str) -> dict[str, Record]:
    """{item: record} of what `way` read of `text`."""
    return {r["item"]: r for r in records if "blocks" in r and r["way"] == way and r["text"] == text}


def _reads(records: Sequence[Record], text: str, ways: Sequence[Way]) -> dict[str, list[Record]]:
    """{way: its records of `text`}, of the documents that every way read that could read any."""
    found = {way.name: mine for way in ways if (mine := _of_text(records, way.name, text))}
    shared = set.intersection(*map(set, found.values())) if found else set()
    return {name: [mine[item] for item in sorted(shared)] for name, mine in found.items() if shared}


def _scored(records: Iterable[Record]) -> Numbers:
    """[n, 2]: the blocks that have scored tokens, of all records."""
    blocks = [block for record in records for block in record["blocks"] if block[1] > 0]
    return np.asarray(blocks, dtype=np.float64).reshape(-1, 2)


def _curve(records: Sequence[Record]) -> list[Row]:
    """Perplexity of the scored tokens up to each length, and the cells held there. All documents are as long."""
    found = []
    for at, (length, _) in enumerate(records[0]["kept"]):
        blocks = _scored({"blocks": record["blocks"][: math.ceil(length / BLOCK)]} for record in records)
        if len(blocks):
            cells = float(np.mean([record["kept"][at][1] for record in records]))
            found.append({"length": length, "perplexity": perplexity(blocks), "kept_cells": cells})
    return found


def _digest(rows: Sequence[str]) -> str:
    """Of what is read: other rows would be another measurement."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(row.encode("utf-8", "surrogatepass") + b"\0")
    return whole.hexdigest()[:16]
