"""Where anchors fail: what each kind of text and of token loses against the full cache, and the worst examples.

    python benchmarks/failures.py --data ../shared/data

Every text is read twice with the same weights, with the full cache and with `default`; what a token loses is the rise
of its -log p, in nats. Tokens are sorted by what they are (number, name, other word, punctuation) and by whether the
same word stood in the text before. Code and tables are Python's own library, so that every machine has the same kind.
Writes results/failures.json; docs/where-anchors-fail.md tells what it means.
"""

from __future__ import annotations

import argparse
import re
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from inference import ROOT, console, write_results
from rich.console import Console
from rich.progress import track
from rich.table import Table

import anchorkv
from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Engine, Floats
from anchorkv.evaluate.losses import read_losses
from anchorkv.evaluate.rows import Rows, find
from anchorkv.evaluate.statistics import mean

UNSCORED = 512
"""Tokens at the start of each text that are not judged: hardly anything has been dropped there."""
TEXTS = {
    "books": "lm/pg19.test.jsonl", "encyclopedia": "lm/wikitext2.test.jsonl", "meetings": "long/qmsum.test.jsonl",
    "Japanese": "ja/js_primer.jsonl",
}
LIBRARY = {"code": ("argparse.py", "dataclasses.py"), "tables": ("encodings/cp437.py", "encodings/cp850.py")}
WORSE = 6
"""Examples shown of each kind of text."""


def texts(data: Path) -> Iterator[tuple[str, list[str]]]:
    """(kind of text, its texts). Short texts are read one after the other."""
    for kind, name in TEXTS.items():
        yield kind, [row["text"] for row in islice(Rows(find(data, name), {"text": str}), 12)]
    library = Path(sysconfig.get_path("stdlib"))
    for kind, files in LIBRARY.items():
        yield kind, [(library / name).read_text(encoding="utf-8") for name in files]


def kinds(engine: Engine, tokens: Sequence[int]) -> list[str]:
    """What each token is: "number", "name" (begins with a capital inside a sentence), "word", "punctuation"."""
    found, before = [], "."
    for token in tokens:
        piece = engine.tokenizer.piece(token).decode("utf-8", errors="replace")
        word = piece.strip()
        if any(letter.isdigit() for letter in word):
            found.append("number")
        elif not any(letter.isalpha() for letter in word):
            found.append("punctuation")
        elif word[0].isupper() and not re.search(r"[.!?\n:\"]\s*$", before):
            found.append("name")
        else:
            found.append("word")
        before = piece if piece.strip() else before + piece
    return found


def said_before(tokens: Sequence[int]) -> np.ndarray:
    """Whether the same token stood in the text before, [n]."""
    seen: set[int] = set()
    return np.asarray([token in seen or bool(seen.add(token)) for token in tokens])


def losses(engine: Engine, policy: AnchorConfig, tokens: Sequence[int]) -> tuple[Floats, float]:
    """-log p [n], and how many times fewer cells are kept at the end."""
    read = read_losses(engine, policy, tokens)
    return read.losses, read.accounting.reduction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with lm/, long/ and ja/")
    parser.add_argument("--length", type=int, default=3072, help="tokens of each kind of text")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "failures.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    with anchorkv.load() as model:
        engine = model.engine
        work = list(texts(options.data))
        for kind, parts in track(work, "reading", console=console, transient=True):
            tokens = engine.tokenizer.encode("\n\n".join(parts)[: 8 * options.length])[: options.length]
            full, _ = losses(engine, anchorkv.preset("full"), tokens)
            anchored, reduction = losses(engine, model.policy.replace(recall="off", cell_budget=None), tokens)
            lost = (anchored - full)[UNSCORED:]
            what, again = np.asarray(kinds(engine, tokens))[UNSCORED:], said_before(tokens)[UNSCORED:]
            groups = {"all": np.ones(len(lost), dtype=bool), "said before": again, "new": ~again}
            groups |= {name: what == name for name in ("number", "name", "word", "punctuation")}
            for name, group in groups.items():
                if not group.any():
                    continue
                risen = mean(lost[group])
                rows.append({
                    "text": kind, "tokens": name, "count": risen.n, "reduction": reduction,
                    "full_loss": float(full[UNSCORED:][group].mean()), "rise": risen.value, "rise_stderr": risen.stderr,
                })
            for at in np.argsort(-lost)[:WORSE].tolist():
                place = at + UNSCORED
                examples.append({
                    "text": kind, "before": engine.tokenizer.decode(list(tokens[place - 24 : place])),
                    "token": engine.tokenizer.decode([tokens[place]]), "full_loss": float(full[place]),
                    "anchored_loss": float(anchored[place]),
                })
    table = Table(title=f"What tokens lose against the full cache (nats), {options.length:,} tokens of each text")
    for heading in ("text", "tokens", "count", "full", "rise", "±"):
        table.add_column(heading, justify="left" if heading in ("text", "tokens") else "right")
    for row in rows:
        table.add_row(
            row["text"], row["tokens"], f"{row['count']:,}", f"{row['full_loss']:.2f}", f"{row['rise']:+.3f}",
            f"{row['rise_stderr']:.3f}", end_section=row["tokens"] == "punctuation",
        )
    Console().print(table)
    write_results(options.out, rows=rows, examples=examples, settings={"length": options.length, "unscored": UNSCORED})


if __name__ == "__main__":
    main()
