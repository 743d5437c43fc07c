"""Needles: where they lie, what surrounds them, which items a limit leaves, and what is measured."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import ByteTokenizer, FakeEngine

from anchorkv.config import AnchorConfig, preset
from anchorkv.engines.base import Output
from anchorkv.errors import ConfigError, DataError, DocumentError
from anchorkv.evaluate.asking import around
from anchorkv.evaluate.run import Item, Models, Record
from anchorkv.evaluate.tasks.needle import LEAD, Fact, Needle, numbers
from anchorkv.evaluate.ways import Way
from anchorkv.models import Model

POLICY = AnchorConfig(reduction=6, min_segment=16, max_segment=48, scorer="frequency", recall_cells=160)
FULL, ANCHORED = Way("full", preset("full")), Way("anchored", POLICY)
EXAMPLE = Path(__file__).parent.parent / "examples" / "english.txt"
TOKENIZER = ByteTokenizer()
NEEDLE = re.compile(r" ?The special number of the \w+ in \w+ is \d{5}\.")


class FakeModels(Models):
    """The fake engine, whatever the way."""

    def __init__(self, window: int = 8192) -> None:
        super().__init__()
        self.fake = FakeEngine(window)

    def of(self, way: Way) -> Model:
        return Model(self.fake, way.policy)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Three books whose sentences say which they are."""
    (tmp_path / "lm").mkdir()
    rows = [
        {"text": "".join(f"Mr. Brown wrote sentence {n} of volume {book} by candlelight. " for n in range(250))}
        for book in range(3)
    ]
    (tmp_path / "lm/pg19.test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return tmp_path


def item(length: int = 1024, needles: int = 1, depth: float = 0.5, repeat: int = 0) -> Item:
    fields = {"length": length, "needles": needles, "depth": depth, "repeat": repeat}
    return Item(f"{length}/{needles}/{depth:g}/{repeat}", fields)


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("length", [700, 4096])
def test_the_needle_lies_where_it_should(books: Path, depth: float, length: int) -> None:
    task = Needle(data=books)
    text, fact = task.text(TOKENIZER, item(length, depth=depth))
    assert text.count(fact.sentence) == 1
    before = text.index(fact.sentence)
    rest = len(text) - len(fact.sentence) - 1
    assert before / rest == pytest.approx(depth, abs=40 / rest)  # half a sentence
    assert not before or text[before - 2 : before] == ". "  # behind a whole sentence, and "Mr." is none
    total = len(TOKENIZER.encode(text)) + around(TOKENIZER, fact.question) + task.max_tokens
    assert length - 70 < total <= length


def test_all_depths_of_a_length_share_their_prose(books: Path) -> None:
    task = Needle(data=books)
    bare = {NEEDLE.sub("", task.text(TOKENIZER, item(depth=depth))[0]).strip() for depth in (0, 0.5, 1)}
    assert len(bare) == 1
    (prose,) = bare
    longer = NEEDLE.sub("", task.text(TOKENIZER, item(2048))[0]).strip()
    assert longer.startswith(prose[:-60])
    other = NEEDLE.sub("", task.text(TOKENIZER, item(repeat=1))[0]).strip()
    assert other != prose


def test_several_needles_are_of_different_things_and_one_is_asked_for(books: Path) -> None:
    task = Needle(data=books)
    text, fact = task.text(TOKENIZER, item(needles=3, depth=0))
    found = re.findall(r"number of the (\w+) in (\w+) is (\d{5})\.", text)
    assert len(found) == 3
    assert all(len(set(column)) == 3 for column in zip(*found, strict=True))
    assert text.startswith(fact.sentence)
    assert (fact.thing, fact.city, fact.number) in found
    again, same = Needle(data=books).text(TOKENIZER, item(needles=3, depth=0))
    assert (again, same) == (text, fact)
    assert Needle(data=books, seed=1).text(TOKENIZER, item(needles=3, depth=0))[1] != fact


def test_a_limit_covers_the_grid_evenly(books: Path) -> None:
    task = Needle(data=books, repeats=2)
    every = task.items()
    assert len({item.id for item in every}) == len(every) == 4 * 5 * 2 * 2
    for limit in (4, 8, 20, 40):
        some = Needle(data=books, repeats=2, limit=limit).items()
        assert some == every[:limit]
        for name, kinds in (("length", 4), ("needles", 2), ("depth", 5)):
            counts = Counter(item.fields[name] for item in some)
            assert len(counts) == min(kinds, limit)
            assert max(counts.values()) - min(counts.values()) <= 1
    assert {item.fields["repeat"] for item in every[:40]} == {0}


@pytest.mark.parametrize("options", [
    {"lengths": (256,), "depths": (0.5,), "needles": (1,)}, {"needles": (1, 2, 3)}, {"lengths": (512, 1024, 2048)},
])
def test_every_grid_is_covered_once(books: Path, options: dict[str, Any]) -> None:
    task = Needle(data=books, **options)
    cells = len(task.lengths) * len(task.depths) * len(task.needles)
    assert len({item.id for item in task.items()}) == len(task.items()) == cells


@pytest.mark.parametrize(("answer", "found"), [
    ("It is 48213.", True), ("48,213", True), ("48 213!", True), ("The 48213rd", True),
    ("148213", False), ("482130", False), ("4821", False), ("48.213", False), ("", False),
])
def test_a_number_counts_digit_for_digit(answer: str, found: bool) -> None:
    assert ("48213" in numbers(answer)) is found


def test_an_answer_and_its_loss_are_measured_in_every_mode(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, models = Needle(data=books, max_tokens=64), FakeModels()
    _, fact = task.text(TOKENIZER, item(700))
    writes(models.fake, f"{fact.sentence} Indeed.", monkeypatch)
    record = task.measure(models, ANCHORED, item(700))
    assert list(record["answers"]) == ["off", "auto", "on"]
    for mode, given in record["answers"].items():
        assert given["answer"].startswith(fact.sentence)
        assert given["score"] == 1
        assert given["answer_loss"] < 0.2  # of the digits: the engine expects them after the fact's own words
        assert (given["recalled_cells"] > 0) is (mode != "off")
    assert record["answers"]["on"]["answer_recalled"]
    assert record["answers"]["on"]["reduction"] < record["answers"]["off"]["reduction"]
    assert list(task.measure(models, FULL, item(700))["answers"]) == ["off"]


def writes(engine: FakeEngine, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `engine` expect `text`, byte for byte, after a turn begins."""
    follows = {text[:at].encode()[-12:]: byte for at, byte in enumerate(text.encode())}
    follows[b""] = text.encode()[0]
    memory = type(engine.open())
    real = memory.decode

    def decode(self: Any, tokens: Sequence[int], start: int, **options: Any) -> Output:
        out = real(self, tokens, start, **options)
        past = [token for position, token in sorted(self.cells.items()) if position < start]
        rows = [expected([*past, *tokens[: n + 1]]) for n in range(len(tokens))]
        if out.surprise is None:
            return Output(rows[-1])
        wanted = [expected(past), *rows][: len(tokens)]
        surprise = [0.0 if row.argmax() == token else 9.0 for row, token in zip(wanted, tokens, strict=True)]
        return Output(rows[-1], np.asarray(surprise, dtype=np.float32))

    def expected(seen: list[int]) -> Any:
        turn = bytes(token for token in seen[-len(text) - 12 :] if token < 256).rpartition(b"assistant\n")[2]
        logits = np.zeros(engine.info.vocabulary, dtype=np.float32)
        logits[follows.get(turn[-12:], ord("x"))] = 30
        return logits

    monkeypatch.setattr(memory, "decode", decode)


def test_texts_longer_than_the_window_are_marked(books: Path) -> None:
    task = Needle(data=books, recalls=("off",), max_tokens=2)
    records = [
        {"way": "anchored", "item": one.id, **task.measure(FakeModels(window=900), ANCHORED, one)}
        for one in (item(700), item(1000))
    ]
    whole = [row for row in task.rows(records, [ANCHORED]) if row["depth"] == "all"]
    assert [(row["length"], row["beyond_window"]) for row in whole] == [(700, False), (1000, True)]


def result(way: str, one: Item, score: float, modes: Sequence[str] = ("off",)) -> Record:
    given = {
        "score": score, "answer_loss": 1.0, "reduction": 4.0, "kept_cells": 10, "kv_bytes": 640, "recalled_cells": 3,
        "seconds": 0.1, "answer_recalled": True,
    }
    answers = {mode: {**given, "score": score if mode == "on" or way == "full" else 0.0} for mode in modes}
    return {
        "way": way, "item": one.id, **one.fields, "answers": answers, "stated": True, "beyond_window": False,
    }


def test_rows_over_all_depths_come_first_and_every_depth_follows() -> None:
    cells = [item(depth=depth, repeat=repeat) for depth in (0, 1) for repeat in (0, 1)]
    found = {"full": [1, 1, 1, 0], "anchored": [1, 0, 1, 0]}
    records = [result("full", cell, score) for cell, score in zip(cells, found["full"], strict=True)]
    records += [
        result("anchored", cell, score, ("off", "on")) for cell, score in zip(cells, found["anchored"], strict=True)
    ]
    rows = Needle().rows(records, [FULL, ANCHORED])
    key = [(row["depth"], row["policy"], row["recall"], row["n"], row["score"]) for row in rows]
    assert key == [
        ("all", "full", "off", 4, 0.75), ("all", "anchored", "off", 4, 0), ("all", "anchored", "on", 4, 0.5),
        (0, "full", "off", 2, 1), (0, "anchored", "off", 2, 0), (0, "anchored", "on", 2, 0.5),
        (1, "full", "off", 2, 0.5), (1, "anchored", "off", 2, 0), (1, "anchored", "on", 2, 0.5),
    ]
    assert [bool(row.get("detail")) for row in rows] == [False] * 3 + [True] * 6
    assert rows[2]["difference"] == -0.25
    assert rows[2]["full_score"] == 0.75
    assert rows[2]["difference_stderr"] == 0.25
    assert rows[2]["verdict"] == "tie"


@pytest.mark.parametrize("options", [
    {"lengths": (100,)}, {"lengths": ()}, {"depths": (1.5,)}, {"depths": (-0.1,)}, {"needles": (0,)},
    {"needles": (99,)}, {"repeats": 0}, {"limit": 0}, {"recalls": ()}, {"max_tokens": 0},
])
def test_options_that_fit_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Needle(**options)


def test_missing_or_short_prose_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data"):
        Needle().items()
    with pytest.raises(DataError, match=r"no lm/pg19\.test"):
        Needle(data=tmp_path).items()
    with pytest.raises(DocumentError):
        Needle(files=(tmp_path / "none.txt",)).items()
    (tmp_path / "short.txt").write_text("It was late. Nobody spoke. " * 20, encoding="utf-8")
    with pytest.raises(DataError, match="too little prose"):
        Needle(files=(tmp_path / "short.txt",)).text(TOKENIZER, item())


def test_a_users_own_prose_and_japanese(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("雨が降った。誰も話さなかった。" * 60, encoding="utf-8")
    text, fact = Needle(files=(tmp_path / "long.txt",)).text(TOKENIZER, item())
    assert text.count(fact.sentence) == 1
    assert text[text.index(fact.sentence) - 2] == "。"


def test_a_fact_is_asked_for_in_its_own_words() -> None:
    fact = Fact("harbour", "Lisbon", "48213")
    assert fact.sentence == "The special number of the harbour in Lisbon is 48213."
    assert fact.lead == LEAD.format(thing="harbour", city="Lisbon")
    assert fact.question == "What is the special number of the harbour in Lisbon?"


@pytest.mark.slow
def test_the_built_in_model_finds_the_needle_with_its_full_cache() -> None:
    task = Needle(files=(EXAMPLE,), lengths=(768,), depths=(0.25, 0.75), needles=(1,))
    with Models() as models:
        for one in task.items():
            answer = task.measure(models, FULL, one)["answers"]["off"]
            assert answer["score"] == 1
            assert answer["answer_loss"] < 0.5
