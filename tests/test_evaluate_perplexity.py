"""`anchorkv eval perplexity`: its figures against other computations, which documents are read, and what is said."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from fake_engine import FakeEngine
from tiny_gguf import reference, weights

from anchorkv.config import AnchorConfig, preset
from anchorkv.engines.base import SURPRISE
from anchorkv.engines.llama import LlamaEngine
from anchorkv.errors import AnchorKVError, ConfigError, DataError, DocumentError
from anchorkv.evaluate.run import Models, Record, Row, Store, run
from anchorkv.evaluate.statistics import bootstrap
from anchorkv.evaluate.tasks.perplexity import BLOCK, Perplexity, ground_of
from anchorkv.evaluate.ways import BASE, FULL, Way, way, ways
from anchorkv.models import Model
from anchorkv.session import Session

SENTENCES = ("The pump on deck two was replaced. ", "It ran for nine hours, and nobody asked! ", "Was it the wire? ")


def prose(seed: int, characters: int) -> str:
    random = np.random.default_rng(seed)
    return "".join(random.choice(SENTENCES) for _ in range(characters // 15))[:characters]


def write(folder: Path, name: str, texts: Sequence[str]) -> Path:
    """The folder with lm/NAME.jsonl.gz in it."""
    (folder / "lm").mkdir(exist_ok=True)
    with gzip.open(folder / "lm" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return folder


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LlamaEngine, LlamaEngine]]:
    """Two models of one tokenizer, which stand for a model with its adapter and without."""
    folder = tmp_path_factory.mktemp("tiny")
    both = tuple(LlamaEngine(tiny_gguf.write(folder / f"{seed}.gguf", seed), threads=1) for seed in (0, 1))
    yield both
    for engine in both:
        engine.close()


def models_of(adapted: Any, plain: Any = None, name: str | None = None) -> Models:
    models = Models(name)
    models._loaded = {True: Model(adapted, preset("full")), False: Model(plain or adapted, preset("full"))}
    return models


def evaluated(task: Perplexity, names: Sequence[str], models: Models, folder: Path) -> dict[tuple[str, str], Row]:
    rows = run([task], ways(names), models, Store(folder, task.settings()))
    return {(row["text"], row["policy"]): row for row in rows}


# --- figures -------------------------------------------------------------------------------------------------------


def mean_loss(engine: Any, policy: AnchorConfig, documents: Sequence[str]) -> tuple[float, float]:
    """Mean -log p of what follows the first 512 tokens of each, and full cells per kept one, read with nothing else."""
    scored: list[np.ndarray] = []
    reductions = []
    for text in documents:
        parts: list[np.ndarray] = []
        observer = {"observe": lambda _, out, to=parts: to.append(out.surprise), "observe_needs": frozenset({SURPRISE})}
        with Session(engine, policy, **observer) as session:
            session.read(engine.tokenizer.encode(text))
            scored.append(np.concatenate(parts)[512:])
            reductions.append(session.accounting().reduction)
    return float(np.concatenate(scored).mean()), float(np.mean(reductions))


def test_figures_are_what_their_definitions_say(engines: tuple[LlamaEngine, LlamaEngine], tmp_path: Path) -> None:
    documents = [prose(1, 600), prose(2, 600)]
    task = Perplexity(data=write(tmp_path, "books", documents), texts=("books",), length=600)
    names = ("base", "base/default", "window", "default:reduction=24")
    rows = evaluated(task, names, models_of(*engines), tmp_path / "out")
    assert list(rows) == [("books", name) for name in (FULL, *names)]
    for adapter, full, others in ((True, FULL, names[2:]), (False, BASE, names[1:2])):
        engine = engines[0] if adapter else engines[1]
        whole = mean_loss(engine, preset("full"), documents)[0]
        base = mean_loss(engines[1], preset("full"), documents)[0]
        # No memory: the sinks, recent window and segments of the policy, and nothing else.
        none = mean_loss(engine, preset("default").replace(anchors=(), recall="off", cell_budget=None), documents)[0]
        assert rows["books", full]["perplexity"] == pytest.approx(math.exp(whole), rel=1e-5)
        assert rows["books", full]["ratio_to_base"] == pytest.approx(math.exp(whole - base), rel=1e-5)
        for name in others:
            row, (loss, reduction) = rows["books", name], mean_loss(engine, way(name).policy, documents)
            assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
            assert row["ratio"] == pytest.approx(math.exp(loss - whole), rel=1e-5)
            assert row["ratio_to_base"] == pytest.approx(math.exp(loss - base), rel=1e-5)
            assert row["reduction"] == pytest.approx(reduction)
            assert (row["documents"], row["tokens"]) == (2, 2 * 88)
            if none > whole:  # a random model may read better without memory
                recovered = (math.exp(none) - math.exp(loss)) / (math.exp(none) - math.exp(whole))
                assert row["context_recovered"] == pytest.approx(recovered, rel=1e-3)
            else:
                assert math.isnan(row["context_recovered"])


def test_perplexity_is_that_of_a_plain_forward(engines: tuple[LlamaEngine, LlamaEngine], tmp_path: Path) -> None:
    text = prose(3, 400)
    task = Perplexity(data=write(tmp_path, "books", [text]), texts=("books",), length=400, first=100, limit=1)
    rows = evaluated(task, ("no-memory", "default"), models_of(engines[0], name="tiny.gguf"), tmp_path / "out")
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    logits = reference(weights(0), tokens, np.tri(400, dtype=bool))
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    loss = -log_p[np.arange(99, 399), tokens[100:]].mean()
    full, none, default = (rows["books", name] for name in (FULL, "no-memory", "default"))
    assert full["perplexity"] == pytest.approx(math.exp(loss), rel=5e-3)
    assert (full["ratio"], full["ratio_stderr"], full["context_recovered"]) == (1, 0, 1)
    assert full["reduction"] == 1
    assert full["kv_bytes"] == full["peak_kv_bytes"] == 400 * engines[0].info.cell_bytes
    # A random model may read better without memory, which leaves nothing to recover.
    assert none["context_recovered"] == 0 or none["perplexity"] <= full["perplexity"]
    assert none["ratio"] == pytest.approx(none["perplexity"] / full["perplexity"])
    assert none["difference"] == pytest.approx(-math.log(none["ratio"]))
    assert default["kv_bytes"] < default["peak_kv_bytes"] < full["kv_bytes"]
    assert [point["length"] for point in full["curve"]] == [256, 400]
    assert full["curve"][-1] == {"length": 400, "perplexity": full["perplexity"], "kept_cells": 400}
    # A model that somebody names has no adapter to leave out: nothing is measured twice, and nothing is claimed.
    assert math.isnan(full["ratio_to_base"])


def record(name: str, number: int, losses: Sequence[float], kept: int, **more: Any) -> Record:
    """What `name` gave on document `number`: a mean loss for each block of 256 tokens behind the first."""
    blocks = [[0.0, 0], *([BLOCK * loss, BLOCK] for loss in losses)]
    length = BLOCK * len(blocks)
    return {
        "task": "perplexity", "way": name, "item": f"t/{number}", "seconds": 1.0, "text": "t", "document": number,
        "tokens": length, "blocks": blocks, "kept": [[256, kept], [length, kept]], "reduction": length / kept,
        "kv_bytes": 10 * kept, "peak_kv_bytes": 20 * kept, "beyond_window": False, **more,
    }


def test_errors_are_paired_over_blocks_and_documents(tmp_path: Path) -> None:
    task = Perplexity(data=tmp_path, texts=("t",), seed=5)
    asked = ways(["default", "no-memory"])
    ground = asked[1].ground.name
    full, mine = np.asarray([3.0, 3.4, 2.8, 3.1]), np.asarray([3.2, 3.5, 3.1, 3.2])
    records = [
        record(name, number, losses[2 * number : 2 * number + 2], kept)
        for name, losses, kept in (
            (FULL, full, 768), ("default", mine, 100), (ground, mine + 0.3, 50), (BASE, full - 0.1, 768),
            ("no-memory", mine + 0.2, 50),
        ) for number in (0, 1)
    ]
    whole, row, none = task.rows(records, asked)
    assert (whole["ratio"], whole["ratio_stderr"], whole["context_recovered"]) == (1, 0, 1)
    assert (none["context_recovered"], none["context_recovered_stderr"]) == (0, 0)
    assert row["perplexity"] == pytest.approx(math.exp(mine.mean()))
    assert row["ratio"] == pytest.approx(math.exp((mine - full).mean()))
    paired = bootstrap(lambda drawn: math.exp((mine - full)[drawn].mean()), 4, seed=5)
    assert row["ratio_stderr"] == pytest.approx(paired)
    assert row["ratio_stderr"] < row["perplexity_stderr"] / math.exp(full.mean())
    assert row["ratio_to_base"] == pytest.approx(row["ratio"] * math.exp(0.1))
    recovered = (math.exp(mine.mean() + 0.3) - math.exp(mine.mean())) / (
        math.exp(mine.mean() + 0.3) - math.exp(full.mean())
    )
    assert row["context_recovered"] == pytest.approx(recovered)
    assert (row["kv_bytes"], row["peak_kv_bytes"], row["kv_bytes_stderr"]) == (1000, 2000, 0)
    assert task.figures(records[:4], asked) == f"t: full 21.65, default {row['perplexity']:.2f} ({row['ratio']:.3f}×)"


def test_all_ways_are_judged_by_the_same_documents(tmp_path: Path) -> None:
    task, asked = Perplexity(data=tmp_path, texts=("t",)), ways(["default"])
    failed = {"task": "perplexity", "way": FULL, "item": "t/1", "seconds": 1.0, "error": "no cell is left"}
    records = [record(FULL, 0, [3.0], 512), failed, record("default", 0, [3.1], 90), record("default", 1, [9.0], 90)]
    full, default = task.rows(records, asked)
    assert full["documents"] == default["documents"] == 1
    assert default["ratio"] == pytest.approx(math.exp(0.1))
    assert math.isnan(default["context_recovered"])  # its ground was not measured
    assert task.rows([failed], asked) == []


def test_every_ground_is_measured_once() -> None:
    asked = ways(["default", "window", "default:reduction=24", "no-memory", "base", "base/default"])
    names = [one.name for one in Perplexity().ways(asked)]
    assert len(names) == len(set(names)) == len(asked) + 2
    assert [name for name in names if name.startswith("no-memory ")] == [asked[1].ground.name, asked[-1].ground.name]
    assert ground_of(way(FULL)) is None
    assert ground_of(way("no-memory")) == way("no-memory")
    assert BASE in {one.name for one in Perplexity().ways(ways(["default"]))}


# --- what is read --------------------------------------------------------------------------------------------------


def test_short_articles_are_read_one_after_the_other(tmp_path: Path) -> None:
    rows = ["a" * 50, "b" * 60, "c" * 300, "d" * 40, "e" * 70]
    task = Perplexity(data=write(tmp_path, "t", rows), texts=("t",), length=100, first=10, limit=4)
    found = [bytes(tokens).decode() for tokens in task._documents(FakeEngine(), "t")]
    assert found == ["a" * 50 + "b" * 50, "c" * 100, "d" * 40 + "e" * 60]
    assert [item.id for item in task.items()] == ["t/0", "t/1", "t/2", "t/3"]
    models, asked = models_of(FakeEngine()), ways(["default"])
    assert task.notes(models, asked) == ["t has 3 of the 4 documents asked for (100 tokens each)."]
    store = Store(tmp_path / "out", {})
    (row, _) = run([task], asked, models, store)
    assert row["documents"] == 3
    assert not [r for r in store.of("perplexity") if "error" in r]


def test_a_larger_limit_goes_on_from_a_smaller_one(tmp_path: Path) -> None:
    data = write(tmp_path, "t", [prose(seed, 900) for seed in range(3)])
    few, more = (Perplexity(data=data, texts=("t",), length=90, first=10, limit=limit) for limit in (1, 3))
    assert few.settings() == more.settings()
    assert [item.id for item in few.items()] == [item.id for item in more.items()][:1]
    assert Perplexity(data=data, texts=("t",), length=91, first=10).settings() != few.settings()
    write(tmp_path, "t", [prose(seed, 900) for seed in (0, 1, 5)])
    assert Perplexity(data=data, texts=("t",), length=90, first=10).settings() != few.settings()


def test_own_files_and_long_documents(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(prose(7, 350), encoding="utf-8")
    (tmp_path / "short.md").write_text("Too short.", encoding="utf-8")
    task = Perplexity(files=(tmp_path / "mine.txt", tmp_path / "short.md"), length=500, first=20)
    models, asked = models_of(FakeEngine(window=300)), ways(["default"])
    notes = task.notes(models, asked)
    assert "500 tokens are more than the 300" in notes[0]
    assert notes[1] == "short.md has 0 of the 1 documents asked for (22 tokens each)."
    rows = run([task], asked, models, Store(tmp_path / "out", {}))
    assert {(row["text"], row["length"], row["tokens"]) for row in rows} == {("mine.txt", 351, 331)}
    assert all(row["beyond_window"] for row in rows)


def test_bad_rows_and_missing_data_are_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, "t", ["good " * 40])
    with gzip.open(tmp_path / "lm" / "t.jsonl.gz", "at", encoding="utf-8") as file:
        file.write('{"words": 1}\n{"text": "' + "more " * 40 + '"}\n')
    options: dict[str, Any] = {"data": tmp_path, "texts": ("t",), "length": 100, "first": 10}
    with pytest.raises(DataError, match=r"t\.jsonl\.gz:2: the row has no field 'text'"):
        Perplexity(**options).items()
    task = Perplexity(**options, skip_bad_rows=True)
    assert len(task.items()) == 2
    assert task.bad_rows == ["t.jsonl.gz:2: the row has no field 'text'"]
    for bad, error, words in (
        (Perplexity(), DataError, "--data"), (Perplexity(data=tmp_path), DataError, "no lm/pg19.test.jsonl"),
        (Perplexity(files=(tmp_path / "none.txt",)), DocumentError, "no file"),
        (Perplexity(files=(tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt")), ConfigError, "same name"),
    ):
        with pytest.raises(error, match=words):
            bad.items()
    for options in ({"length": 512}, {"first": -1}, {"limit": 0}, {"documents": 0}):
        with pytest.raises(AnchorKVError):
            Perplexity(**options)


def test_the_first_token_is_never_scored(tmp_path: Path) -> None:
    task = Perplexity(data=write(tmp_path, "t", ["a b c d " * 40]), texts=("t",), length=260, first=0, limit=1)
    (item,) = task.items()
    found = task.measure(models_of(FakeEngine()), Way(FULL, preset("full")), item)
    assert [count for _, count in found["blocks"]] == [255, 4]
    assert all(math.isfinite(total) for total, _ in found["blocks"])
