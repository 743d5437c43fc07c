"""What kind of text suits anchors? The perplexity ratio of many kinds, and a linear model of it from a text's features.

    python benchmarks/suitability.py --data ../shared/data              # measures, then fits; goes on where it stopped
    python benchmarks/suitability.py --data ../shared/data --fit-only   # fits what was measured so far

Every text is read twice with the same weights, with the full cache and with the model's own policy, recall off. Code,
headers and reference texts are Python's own, and tables come with installed packages: most machines have the same.
A file that is named test is never read. Measure anew when the adapter changes: records of other weights lie apart.
Writes results/suitability.json and anchorkv/poc/suitability.json, which the package predicts from.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import platformdirs
from inference import ROOT, console, write_results
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import anchorkv
from anchorkv import samples
from anchorkv.engines.base import Tokenizer
from anchorkv.evaluate.losses import read_losses
from anchorkv.evaluate.rows import Rows, find
from anchorkv.evaluate.run import Item, Models, Record, Store, good, run, settings_of
from anchorkv.evaluate.run import Row as ResultRow
from anchorkv.evaluate.statistics import mean
from anchorkv.evaluate.ways import Way, ways
from anchorkv.poc import suitability
from anchorkv.poc.features import features
from anchorkv.poc.results import Features

WITH_TABLES = ("bm25s", "charset-normalizer", "datasets", "lm_eval", "more-itertools", "peft", "tabulate", "tqdm")
"""Packages that come with those of the extra [eval]."""
LENGTH, UNSCORED, BLOCK = 2048, 512, 128
"""Tokens of a text; those at its start that are not scored; those whose losses are summed to one record's entry."""
HELD_OUT_BOOKS = 6
"""The last books of pg19.train, which the adapter was not trained on (shipped_adapter.py)."""
ROWS = {  # kind: file, field, whether the adapter was trained on texts of this file
    "books": ("lm/pg19.train.jsonl", "text", False),
    "encyclopedia": ("lm/enwiki_sample.train.jsonl", "text", True),
    "encyclopedia, tokenised": ("lm/wikitext2.validation.jsonl", "text", False),
    "passages": ("squad/squad_v1.train.jsonl", "context", False),
    "textbooks": ("lm/openstax_ccby.train.jsonl", "text", True),
    "speeches": ("lm/state_union.train.jsonl", "text", True),
    "meetings": ("long/qmsum.validation.jsonl", "text", False),
    "service dialogues": ("lm/sgd_dialogues.train.jsonl", "text", False),
    "company handbook": ("lm/sourcegraph_handbook.train.jsonl", "text", True),
    "government handbook": ("lm/18f_handbook.train.jsonl", "text", False),
    "Ethereum proposals": ("lm/eips.train.jsonl", "text", True),
    "Python proposals": ("lm/peps.train.jsonl", "text", True),
    "Swift proposals": ("lm/swift_evolution.train.jsonl", "text", False),
    "Rust proposals": ("lm/rust_rfcs.train.jsonl", "text", False),
    "Kubernetes proposals": ("lm/keps.train.jsonl", "text", False),
    "programming book": ("lm/rust_book.train.jsonl", "text", True),
    "formulas": ("lm/d2l.train.jsonl", "text", False),
    "Japanese literature": ("ja/aozora.jsonl", "text", False),
    "Japanese programming book": ("ja/js_primer.jsonl", "text", False),
    "Japanese passages": ("ja/jsquad.validation.jsonl", "context", False),
}


@dataclass(frozen=True)
class Text:
    """One text to measure: its kind, what it was taken from, and itself, `LENGTH` tokens."""

    kind: str
    source: str
    text: str
    tokens: tuple[int, ...]
    sample: bool = False
    """Whether it is one of the package's samples, which may be shorter, and are never fitted: they tell how good the
    fit is."""

    @property
    def id(self) -> str:
        """Changes with the text, so that another text is measured anew."""
        return f"{self.kind}/{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"


def pools(data: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(kind, its (source, text) pairs)."""
    for kind, (name, wanted, _) in ROWS.items():
        rows = [(f"{name}:{n}", row[wanted]) for n, row in enumerate(Rows(find(data, name), {wanted: str}), start=1)]
        distinct = {text: source for source, text in rows[-HELD_OUT_BOOKS if kind == "books" else 0 :]}
        yield kind, [(source, text) for text, source in distinct.items()]
    library, headers = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("include"))
    yield "Python code", _files(sorted(library.glob("*.py")))
    yield "C headers", _files(sorted(headers.rglob("*.h")))
    yield "character tables", _files(sorted((library / "encodings").glob("cp*.py")))
    yield "release notes", _files([library / "idlelib" / "NEWS.txt"])
    from pydoc_data.topics import topics

    yield "reference manual", [(f"pydoc_data:{name}", text) for name, text in sorted(topics.items())]
    if (plots := importlib.util.find_spec("matplotlib")) and plots.origin:
        yield "tables", _files(sorted((Path(plots.origin).parent / "mpl-data" / "sample_data").glob("*.csv")))
    yield "descriptions with tables", list(_descriptions())


def _files(paths: Sequence[Path]) -> list[tuple[str, str]]:
    return [(path.name, path.read_text(encoding="utf-8", errors="replace")) for path in paths if path.is_file()]


def _descriptions() -> Iterator[tuple[str, str]]:
    """The long descriptions of installed packages that have tables, from a little before the first one."""
    for name in WITH_TABLES:
        try:
            text = str(metadata(name).json.get("description", ""))
        except PackageNotFoundError:
            continue
        if first := re.search(r"^\|", text, re.MULTILINE):
            start = max(0, first.start() - 1000)
            yield name, text[start : start + 8 * LENGTH]


def texts(data: Path, tokenizer: Tokenizer, count: int) -> list[Text]:
    """`count` texts of every kind, the first ones of all kinds first. Short texts are read one after the other."""
    found: list[list[Text]] = []
    for kind, pool in pools(data):
        chance = random.Random(kind)
        order = chance.sample(range(len(pool)), len(pool))
        mine: dict[str, Text] = {}
        for turn in range(6 * count):
            if len(mine) == count:
                break
            text = _stretch(kind, pool, order[turn % len(order)], tokenizer, chance)
            if text is not None:
                mine[text.id] = text
        found.append(list(mine.values()))
    return [group[n] for n in range(count) for group in found if n < len(group)]


def _stretch(
    kind: str, pool: Sequence[tuple[str, str]], at: int, tokenizer: Tokenizer, chance: random.Random
) -> Text | None:
    """`LENGTH` tokens from a paragraph of text `at` on, with the texts that follow it where it is short."""
    whole, room = pool[at][1], 8 * LENGTH
    if len(whole) > room:  # a long one: from the beginning of some line, so that not every text is a beginning
        whole = whole[whole.find("\n", chance.randrange(len(whole) - room)) + 1 :]
    parts, size, following = [whole[:room]], len(whole), at
    while size < room and following + 1 < len(pool):
        following += 1
        parts.append(pool[following][1])
        size += len(parts[-1])
    tokens = tokenizer.encode("\n\n".join(parts)[:room])[:LENGTH]
    if len(tokens) < LENGTH:
        return None
    return Text(kind, pool[at][0], tokenizer.decode(tokens), tuple(tokens))


def bundled(tokenizer: Tokenizer) -> Iterator[Text]:
    """The package's samples, cut to whole blocks."""
    for path in sorted(samples.folder().rglob("*.txt")):
        tokens = tokenizer.encode(path.read_text(encoding="utf-8"))[:LENGTH]
        tokens = tokens[: len(tokens) // BLOCK * BLOCK]
        yield Text(path.parent.name, path.name, tokenizer.decode(tokens), tuple(tokens), sample=True)


@dataclass
class Suitability:
    """Every text read in every way; a record holds sums of losses a block and the reduction."""

    name: ClassVar[str] = "suitability"
    texts: Sequence[Text] = field(repr=False)

    def settings(self) -> dict[str, Any]:
        return {"length": LENGTH, "unscored": UNSCORED, "block": BLOCK}

    @cached_property
    def by_id(self) -> dict[str, Text]:
        return {text.id: text for text in self.texts}

    def items(self) -> list[Item]:
        return [Item(name) for name in self.by_id]

    def ways(self, ways: Sequence[Way]) -> list[Way]:
        return list(ways)

    def measure(self, models: Models, way: Way, item: Item) -> Record:
        read = read_losses(models.of(way).engine, way.policy, self.by_id[item.id].tokens)
        blocks = read.losses[UNSCORED:].reshape(-1, BLOCK).sum(axis=1, dtype=np.float64)
        return {"blocks": blocks.tolist(), "reduction": read.accounting.reduction}

    def rows(self, records: Sequence[Record], ways: Sequence[Way]) -> list[ResultRow]:
        """A row a text that was read in both ways."""
        full, anchored = (good(records, way) for way in ways)
        rows = []
        for name in [name for name in self.by_id if name in full and name in anchored]:
            text = self.by_id[name]
            trained_on = not text.sample and ROWS.get(text.kind, ("", "", False))[2]
            before, after = (np.asarray(side[name]["blocks"]) / BLOCK for side in (full, anchored))
            rise = mean(after - before)
            rows.append({
                "kind": text.kind, "source": text.source, "id": name, "tokens": len(text.tokens),
                "trained_on": trained_on,
                "full_perplexity": float(np.exp(before.mean())), "ratio": float(np.exp(rise.value)),
                "log_ratio": rise.value, "log_ratio_stderr": rise.stderr, "reduction": anchored[name]["reduction"],
            })
        return rows


def measured(rows: Sequence[ResultRow], tokenizer: Tokenizer, by_id: dict[str, Text]) -> list[ResultRow]:
    """The rows with their texts' features."""
    return [{**row, "features": features(by_id[row["id"]].text, tokenizer).model_dump()} for row in rows]


def judged(rows: Sequence[ResultRow], fit: suitability.Fit) -> dict[str, Any]:
    """How good the fit is, by what it expects of kinds that it did not see. Adds "expected" (a ratio) to every row."""
    kinds = np.asarray([row["kind"] for row in rows])
    target = np.asarray([row["log_ratio"] for row in rows])
    vectors = np.stack([suitability.vector(Features(**row["features"])) for row in rows])
    expected = suitability.left_out(vectors, target, kinds)
    for row, log_ratio in zip(rows, expected.tolist(), strict=True):
        row["expected"] = float(np.exp(log_ratio))
    rest = target - expected
    groups = [kinds == kind for kind in np.unique(kinds)]
    means, errors = np.asarray([[values[group].mean() for group in groups] for values in (target, rest)])
    seen = np.asarray([row["trained_on"] for row in rows])
    levels = [(suitability.level(row["expected"]), suitability.level(row["ratio"])) for row in rows]
    return {
        "error": fit.error, "r2": fit.r2, "penalty": fit.penalty,
        "weights": dict(zip(fit.names, fit.weights, strict=True)),
        "usual_ratio": float(np.exp(fit.intercept)), "spread": float(target.std()),
        "noise": float(np.sqrt(np.mean([row["log_ratio_stderr"] ** 2 for row in rows]))),
        "error_of_kinds": float(np.sqrt((errors**2).mean())),
        "r2_of_kinds": suitability.explained(means, means - errors),
        "median_error": float(np.median(np.abs(rest))),
        "same_level": float(np.mean([expected == found for expected, found in levels])),
        "bias_trained_on": float(rest[seen].mean()) if seen.any() else None,
        "bias_not_trained_on": float(rest[~seen].mean()) if (~seen).any() else None,
    }


def foretold(rows: Sequence[ResultRow], fit: suitability.Fit) -> list[ResultRow]:
    """The samples' rows with what the fit, which never saw them, expects."""
    predictor, found = suitability.Predictor(fit), []
    for row in rows:
        expected = predictor.predict(Features(**row["features"]))
        found.append({
            **row, "expected": expected.expected_ratio, "error": expected.error, "outside": expected.outside,
        })
    return found


def show(rows: Sequence[ResultRow], title: str) -> None:
    table = Table(title=title)
    for heading in ("kind", "texts", "ratio", "expected", "level"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        ratio, expected = (float(np.exp(np.log([row[name] for row in mine]).mean())) for name in ("ratio", "expected"))
        table.add_row(kind, str(len(mine)), f"{ratio:.3f}", f"{expected:.3f}", suitability.level(ratio))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with lm/, long/, ja/ and squad/")
    parser.add_argument("--texts", type=int, default=3, help="of every kind")
    parser.add_argument("--fit-only", action="store_true", help="measure nothing; fit what was measured so far")
    parser.add_argument("--work", type=Path, default=platformdirs.user_cache_path("anchorkv") / "suitability")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "suitability.json")
    parser.add_argument("--packaged", type=Path, default=ROOT / "anchorkv" / "poc" / suitability.FILE)
    options = parser.parse_args()
    with anchorkv.load(threads=1) as loaded:
        own = loaded.policy
    with Models(threads=1) as models:
        both = ways(['default:recall="off"'], own)
        model = models.of(both[0])
        tokenizer = model.engine.tokenizer
        task = Suitability([*bundled(tokenizer), *texts(options.data, tokenizer, options.texts)])
        info = model.engine.info
        store = Store(options.work / info.fingerprint[:16], settings_of([task], both, models))
        if options.fit_only:
            rows = task.rows(store.of(task.name), both)
        else:
            with Progress(console=console, transient=True) as bar:
                reading = bar.add_task("reading", total=None)
                rows = run(
                    [task], both, models, store,
                    lambda done, total, what: bar.update(reading, completed=done, total=total, description=what),
                )
        rows = measured(rows, tokenizer, task.by_id)
    apart = [row for row in rows if task.by_id[row["id"]].sample]
    rows = [row for row in rows if not task.by_id[row["id"]].sample]
    fit = suitability.fitted(
        [Features(**row["features"]) for row in rows], [row["log_ratio"] for row in rows],
        [row["kind"] for row in rows], length=LENGTH, fingerprint=info.fingerprint,
    )
    found = judged(rows, fit)
    apart = foretold(apart, fit)
    missed = [row["log_ratio"] - np.log(row["expected"]) for row in apart]
    found["error_of_samples"] = float(np.sqrt(np.mean(np.square(missed)))) if missed else None
    show(rows, f"perplexity ratio to the full cache, {LENGTH:,} tokens; expected by a fit without the kind")
    show(apart, "the same of the package's samples, which are not fitted")
    Console().print(found)
    policy = both[1].policy.model_dump(mode="json")
    write_results(
        options.out, rows=rows, samples=apart, fit=found,
        settings={**task.settings(), "texts": options.texts, "threads": 1, "policy": policy},
        model={"name": info.name, "fingerprint": info.fingerprint, "weights": info.weights, "adapter": model.adapter},
    )
    options.packaged.write_text(fit.model_dump_json(indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
