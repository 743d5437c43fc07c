"""Training data: every kind of file, every bad one, and a stream of blocks that loses, repeats and forgets nothing."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import types
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_engine import END, OPEN, VOCABULARY, ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorkv.errors import AnchorKVError, ConfigError, DataError
from anchorkv.train import data as train_data
from anchorkv.train import sources
from anchorkv.train.data import Block, Blocks, check
from anchorkv.train.sources import Recipe, Source, files, texts

DOCUMENTS = ["It was a dark night.\nThe rain fell.\n", "吾輩は猫である。\n", "Call me Ishmael. " * 20]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}


class Numbers(ByteTokenizer):
    """Every word is the number of a token, so that a test can make each token of its data a different one."""

    eos_ids = frozenset()

    def encode(self, text: str, special: bool = False) -> list[int]:
        return [int(word) for word in text.split()]

    def start_ids(self) -> list[int]:
        return [0]


def write(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(documents: Sequence[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in documents).encode()


def parquet(folder: Path, documents: Sequence[object], field: str = "text") -> bytes:
    arrow, table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = folder / "made"
    table.write_table(arrow.table({"id": list(range(len(documents))), field: documents}), path)
    data = path.read_bytes()
    path.unlink()
    return data


def numbered(lengths: Sequence[int]) -> list[str]:
    """Documents of these lengths; no two tokens of them are the same."""
    firsts = [1 + sum(lengths[:at]) for at in range(len(lengths))]
    return [" ".join(map(str, range(first, first + n))) for first, n in zip(firsts, lengths, strict=True)]


def refusal(act: Callable[[], object], *words: str) -> str:
    """The one sentence with which `act` fails."""
    with pytest.raises(AnchorKVError) as caught:
        act()
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def all_texts(path: Path) -> list[object]:
    return [text for source in Recipe.load(path).sources for text in texts(source)]


# --- files to texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables(tmp_path: Path, kind: str, packed: str) -> None:
    data = jsonl(DOCUMENTS, "body") if kind == "jsonl" else parquet(tmp_path, DOCUMENTS, "body")
    path = write(tmp_path, f"a.{kind}{packed}", PACK[packed](data))
    read = list(texts(Source(path=path, field="body")))
    assert [text for text, _ in read] == DOCUMENTS
    assert [where for _, where in read] == [f"{path.name}:{line}" for line in (1, 2, 3)]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", ["txt", "md"])
def test_plain_text(tmp_path: Path, kind: str, packed: str) -> None:
    path = write(tmp_path, f"a.{kind}{packed}", PACK[packed](b"\xef\xbb\xbf" + "".join(DOCUMENTS).encode()))
    assert all_texts(path) == [("".join(DOCUMENTS), f"{path.name}:1")]


def test_zst(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor().compress
    data = jsonl(DOCUMENTS * 2000)
    path = write(tmp_path, "a.jsonl.zst", pack(data) + pack(data))  # two frames
    assert len(all_texts(path)) == 12000
    write(tmp_path, "a.jsonl.zst", pack(data)[:-20])
    refusal(lambda: all_texts(path), "a.jsonl.zst:", "cut off")
    write(tmp_path, "a.jsonl.zst", b"not zst at all")
    refusal(lambda: all_texts(path), "a.jsonl.zst:1", "damaged")


def test_a_long_text_is_cut_at_empty_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHAPTER", 50)
    lines = ["a" * 30, "b" * 30, "", "c" * 60, "d" * 60, "e"]
    read = list(texts(Source(path=write(tmp_path, "a.txt", "\r\n".join(lines)))))
    assert read == [
        ("\n".join(lines[:3]) + "\n", "a.txt:1"), ("\n".join(lines[3:5]) + "\n", "a.txt:4"), ("e", "a.txt:6")
    ]


def test_blank_rows_and_half_surrogates(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b'{"text": " "}\n\n{"text": "a\\ud800b"}\n')
    assert all_texts(path) == [("a\ufffdb", "a.jsonl:3")]


def test_folder(tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    for name, data in (("b/c.txt", b"c"), ("a.jsonl.gz", gzip.compress(jsonl(["a"]))), ("d.md", b"d")):
        write(folder, name, data)
    for name in ("README.md", "LICENSE.txt", ".cache/x.txt", "picture.png"):
        write(folder, name, b"not data")
    assert all_texts(folder) == [("a", "lm/a.jsonl.gz:1"), ("c", "lm/b/c.txt:1"), ("d", "lm/d.md:1")]


# --- the hub -------------------------------------------------------------------------------------------------------


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: str, split: str, streaming: bool) -> object:
        assert (names, split, streaming) == (("owner/name", None), "train", True)
        return [{"text": "one"}, {"text": "two"}, {"text": None}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (source,) = Recipe.load("owner/name").sources
    rows = texts(source)
    assert list(islice(rows, 2)) == [("one", "owner/name:1"), ("two", "owner/name:2")]
    refusal(lambda: next(rows), "owner/name:3", "not text")
    refusal(lambda: list(texts(Source(dataset="owner/name", split="test"))), "owner/name", "test", "cannot be opened")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refusal(lambda: list(texts(source)), "pip install datasets")


def test_check_reads_the_beginning_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ({"text": f"Row {n} " * 9} for n in count())
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: stream))
    check(Recipe.load("owner/name"), ByteTokenizer(), VOCABULARY, rows=20)
    assert next(stream)["text"].startswith("Row 20 ")


@pytest.mark.slow
def test_hub_library(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path, "data/train.jsonl", jsonl(DOCUMENTS))
    read = list(texts(Source(dataset=str(tmp_path / "data"))))
    assert [text for text, _ in read] == DOCUMENTS


# --- recipes -------------------------------------------------------------------------------------------------------


def test_recipe(tmp_path: Path) -> None:
    pg19 = write(tmp_path, "lm/pg19.jsonl", jsonl(DOCUMENTS, "body"))
    recipe = write(
        tmp_path, "recipe.yaml",
        "sources:\n  - path: lm/pg19.jsonl  # books\n    weight: 2\n    field: body\n    licence: public domain\n"
        "  - dataset: owner/name\n    split: validation\n    weight: 0.5\n",
    )
    assert Recipe.load(recipe).sources == (
        Source(path=pg19, weight=2, field="body", licence="public domain"),
        Source(dataset="owner/name", split="validation", weight=0.5),
    )
    assert Recipe.load(pg19).sources == (Source(path=pg19),)
    assert Recipe.load(str(pg19.parent)).sources == (Source(path=pg19.parent),)
    assert files(Source(path=pg19.parent)) == [pg19]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", (":1", "no sources")),
        ("sources: []\n", (":1", "no sources")),
        ("just words\n", (":1", "no sources")),
        ("sources:\n  - path: a.txt\n  bad\n", (":3", "not YAML")),
        ("sources:\n  - path: a.txt\nname: x\n", (":3", "'name'")),
        ("sources:\n  - path: a.txt\n    weigth: 2\n", (":3", "'weigth'", "weight")),
        ("sources:\n  - path: a.txt\n    weight: -1\n", (":3", "above 0", "-1")),
        ("sources:\n  - path: a.txt\n    weight: .nan\n", (":3", "above 0")),
        ("sources:\n  - path: a.txt\n    weight: two\n", (":3", "above 0")),
        ("sources:\n  - path: a.txt\n    field: 2\n", (":3", "field", "text")),
        ("sources:\n  - path: a.txt\n  - weight: 1\n", (":3", "`path` or a `dataset`")),
        ("sources:\n  - path: a.txt\n    dataset: o/n\n", (":2", "`path` or a `dataset`")),
        ("sources:\n  - a.txt\n", (":2", "- path:")),
        ("sources:\n  - path: a.txt\n  - path: b.txt\n", (":3", "b.txt", "no file")),
        ("sources:\n  - path: c.csv\n", (":2", "c.csv", "ending")),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    write(tmp_path, "a.txt", "text")
    write(tmp_path, "c.csv", "text")
    path = write(tmp_path, "recipe.yaml", text)
    refusal(lambda: Recipe.load(path), "recipe.yaml", *words)


def test_recipe_that_is_no_text(tmp_path: Path) -> None:
    refusal(lambda: Recipe.load(tmp_path / "none.yaml"), "none.yaml", "no recipe")
    refusal(lambda: Recipe.load(write(tmp_path, "bad.yaml", b"\xff\xfe\x00")), "bad.yaml", "UTF-8")
    refusal(lambda: Recipe(()), "no sources")
    refusal(lambda: Source(path=tmp_path, weight=0), "above 0")


# --- bad data ------------------------------------------------------------------------------------------------------

GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"", ("a.txt", "is empty")),
        ("a.txt", b" \n\n", ("a.txt", "no text")),
        ("a.txt", b"fine\nf\xff\xfene\n", ("a.txt:2", "UTF-8")),
        ("a.txt", b"fine\n\x7fELF\0\0\n", ("a.txt:2", "binary")),
        ("a.csv", b"a,b\n", ("a.csv", "ending")),
        ("a", b"text", ("a has an ending",)),
        ("a.jsonl", GOOD + b'{"text": "fine"\n', ("a.jsonl:2", "not JSON")),
        ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", ("a.jsonl:2", "not JSON")),
        ("a.jsonl", GOOD + b"\n[1]\n", ("a.jsonl:3", "not a JSON object")),
        ("a.jsonl", GOOD + b'{"body": "x"}\n', ("a.jsonl:2", "'text'", "'body'")),
        ("a.jsonl", GOOD + b"{}\n", ("a.jsonl:2", "'text'", "none")),
        ("a.jsonl", GOOD + b'{"text": null}\n', ("a.jsonl:2", "not text")),
        ("a.jsonl", GOOD + b'{"text": "\xe9"}\n', ("a.jsonl:2", "UTF-8")),
        ("a.jsonl.gz", GOOD, ("a.jsonl.gz:1", "cannot be read")),
        ("a.parquet", GOOD, ("a.parquet:1", "cannot be read")),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, words: tuple[str, ...]) -> None:
    path = write(tmp_path, name, data)
    refusal(lambda: check(Recipe.load(path), ByteTokenizer(), VOCABULARY), *words)


@pytest.mark.parametrize("packed", [ending for ending in PACK if ending])
def test_cut_off(tmp_path: Path, packed: str) -> None:
    lines = jsonl([f"{n} {n * n} {n**3}" * 10 for n in range(2000)])  # far more rows than are tokenised
    path = write(tmp_path, "a.jsonl" + packed, PACK[packed](lines)[:-20])
    refusal(lambda: check(Recipe.load(path), ByteTokenizer(), VOCABULARY), f"a.jsonl{packed}:", "cut off")


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    refusal(lambda: Recipe.load(tmp_path / "none.txt"), str(tmp_path / "none.txt"), "no file")
    refusal(lambda: Recipe.load("none/such.txt"), "none/such.txt", "no file")
    refusal(lambda: Recipe.load("nonesuch"), "nonesuch", "owner/name")
    write(tmp_path, "lm/picture.png", b"x")
    refusal(lambda: Recipe.load(tmp_path / "lm"), str(tmp_path / "lm"), "no data files")
    write(tmp_path, "lm/a.txt", b"text")
    write(tmp_path, "lm/b.txt", b"")
    refusal(lambda: Recipe.load(tmp_path / "lm"), "b.txt", "is empty")


def test_giant_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"fine\n" + b"x" * (sources.LINE + 1))
    refusal(lambda: all_texts(path), "a.txt:2", "50 MB")


def test_bad_parquet(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet", parquet(tmp_path, ["fine", None]))
    refusal(lambda: all_texts(path), "a.parquet:2", "not text")
    path = write(tmp_path, "a.parquet", parquet(tmp_path, DOCUMENTS, "body"))
    refusal(lambda: all_texts(path), "a.parquet", "'text'", "'body'")
    path = write(tmp_path, "a.parquet", parquet(tmp_path, DOCUMENTS)[:-30])
    refusal(lambda: all_texts(path), "a.parquet:1", "cut off")


def test_check(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", jsonl(["It was a dark night, and the rain fell in torrents."]) * 400 + b"[]\n")
    recipe = Recipe.load(path)
    refusal(lambda: check(recipe, ByteTokenizer(), VOCABULARY), "a.jsonl:401")
    refusal(lambda: check(recipe, ByteTokenizer(), END), "a.jsonl:1", f"token {END}", f"has {END}")
    write(tmp_path, "a.jsonl", jsonl(DOCUMENTS))
    check(recipe, ByteTokenizer(), VOCABULARY)
    refusal(lambda: check(recipe, ByteTokenizer(), VOCABULARY, min_tokens=1000), "a.jsonl", "1000 tokens")


# --- blocks --------------------------------------------------------------------------------------------------------


def take(blocks: Blocks, count: int) -> list[list[list[int]]]:
    return [block.documents for block in islice(blocks, count)]


def cut(ids: list[int], room: int, least: int) -> list[list[int]]:
    """The pieces of a document that are long enough."""
    pieces = (ids[at : at + room] for at in range(0, len(ids), room))
    return [piece for piece in pieces if len(piece) >= least]


lengths = st.lists(st.integers(1, 90), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blocks")


def mixture(folder: Path, *documents: list[str], weights: Sequence[float] = (1, 2, 3)) -> Recipe:
    paths = [write(folder, f"{at}.jsonl", jsonl(texts)) for at, texts in enumerate(documents)]
    return Recipe(tuple(Source(path=path, weight=w) for path, w in zip(paths, weights, strict=False)))


def test_a_document_has_its_ends(tmp_path: Path) -> None:
    class Opening(ByteTokenizer):
        def start_ids(self) -> list[int]:
            return [OPEN]

    recipe = mixture(tmp_path, ["abcdefgh", "xyz"])
    documents = [document for block in take(Blocks(recipe, Opening(), 5, min_tokens=2), 20) for document in block]
    wanted = ([OPEN, *b"abcd"], [OPEN, *b"efgh"], [OPEN, *b"xyz", END])  # [OPEN, END] alone would be 2 tokens
    assert {tuple(document) for document in documents} == {*map(tuple, wanted), (OPEN, END)}
    documents = [document for block in take(Blocks(recipe, Opening(), 5, min_tokens=3), 20) for document in block]
    assert {tuple(document) for document in documents} == set(map(tuple, wanted))


@given(lengths, st.integers(8, 40), st.integers(2, 8), st.integers(1, 9), st.integers(0, 40))
def test_nothing_is_lost_or_repeated(
    folder: Path, sizes: list[int], length: int, least: int, buffer: int, n: int
) -> None:
    documents = numbered([*sizes, 50])
    blocks = Blocks(mixture(folder, documents), Numbers(), length, min_tokens=least, buffer=buffer)
    seen: Counter[int] = Counter()
    for block in islice(blocks, n):
        assert least <= len(block) <= length
        for first, *ids in block.documents:
            assert first == 0
            assert ids == list(range(ids[0], ids[0] + len(ids)))
            seen.update(ids)
    # With what waits half-packed and what the epoch has yet to give, every token has come once an epoch.
    ids = [Numbers().encode(text) for text in documents]
    state = blocks.state()
    for places in state["packing"]:
        for _, row, start, stop in places:
            seen.update(ids[row][start:stop])
    (source,) = state["sources"]
    waiting = [(row, offset) for row, offset in source["open"]] + [(row, 0) for row in range(source["read"], len(ids))]
    for row, offset in waiting:
        for piece in cut(ids[row][offset:], length - 1, least - 1):
            seen.update(piece)
    every = [token for document in ids for piece in cut(document, length - 1, least - 1) for token in piece]
    assert seen == Counter(every * (blocks.epochs[0] + 1))


def test_blocks_are_full(tmp_path: Path) -> None:
    sizes = [20 + 37 * n % 400 for n in range(500)]
    blocks = Blocks(mixture(tmp_path, numbered(sizes)), Numbers(), 512)
    filled = [len(block) for block in islice(blocks, 200)]
    assert sum(filled) / len(filled) > 0.95 * 512


def test_long_documents_take_turns(tmp_path: Path) -> None:
    blocks = Blocks(mixture(tmp_path, numbered([1000] * 20)), Numbers(), 101)
    books = [block[0][1] // 1000 for block in take(blocks, 40)]
    assert len(set(books)) > 10
    assert sum(a == b for a, b in pairwise(books)) < 10


def test_weights(tmp_path: Path) -> None:
    sizes = ([300] * 30, [20, 40, 60] * 50, [5000])
    recipe = mixture(tmp_path, *map(numbered, sizes), weights=(1, 2, 0.5))
    blocks = Blocks(recipe, Numbers(), 128, min_tokens=10)
    assert blocks.epochs == (0, 0, 0)
    given_out = sum(len(block) for block in islice(blocks, 300))
    shares = [drawn / sum(blocks.tokens) for drawn in blocks.tokens]
    assert shares == pytest.approx([1 / 3.5, 2 / 3.5, 0.5 / 3.5], abs=0.01)
    assert 0 <= sum(blocks.tokens) - given_out <= 17 * 128
    assert blocks.epochs[1] > blocks.epochs[0] >= 1
    assert blocks.epochs[2] >= 0
    assert blocks.blocks == 300


def test_seeds_and_epochs_differ(tmp_path: Path) -> None:
    recipe = mixture(tmp_path, numbered([50] * 40))

    def order(seed: int) -> list[list[list[int]]]:
        return take(Blocks(recipe, Numbers(), 51, seed), 80)

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1)[:40] != order(1)[40:]
    assert sorted(order(1)[:40]) == sorted(order(1)[40:]) == sorted(order(2)[:40])


@given(lengths, st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=30)
def test_ranks_share_one_stream(folder: Path, sizes: list[int], world: int, seed: int) -> None:
    recipe = mixture(folder, numbered([*sizes, 50]), numbered([60, *sizes[::-1]]))
    whole = take(Blocks(recipe, Numbers(), 40, seed, min_tokens=4), 6 * world)
    ranks = [Blocks(recipe, Numbers(), 40, seed, rank, world, min_tokens=4) for rank in range(world)]
    parts = [take(blocks, 6) for blocks in ranks]
    assert [block for turn in zip(*parts, strict=True) for block in turn] == whole
    assert all(blocks.state() == ranks[0].state() for blocks in ranks)


@given(lengths, st.integers(1, 9), st.integers(0, 30), st.integers(1, 3), st.data())
def test_resume(folder: Path, sizes: list[int], buffer: int, before: int, world: int, data: st.DataObject) -> None:
    recipe = mixture(folder, numbered([*sizes, 50]), numbered([60, *sizes[::-1]]))

    def blocks(rank: int = 0, world: int = 1) -> Blocks:
        return Blocks(recipe, Numbers(), 40, 7, rank, world, min_tokens=4, buffer=buffer)

    whole = take(blocks(), (before + 5) * world)
    first = blocks(data.draw(st.integers(0, world - 1)), world)
    take(first, before)
    state = json.loads(json.dumps(first.state()))
    # By one process, or by as many as before; and again from a state that a resumed stream gave.
    one = blocks()
    one.resume(state)
    assert one.state() == state
    assert take(one, 2 * world) == whole[before * world : (before + 2) * world]
    rank = data.draw(st.integers(0, world - 1))
    many = blocks(rank, world)
    many.resume(json.loads(json.dumps(one.state())))
    assert take(many, 3) == whole[(before + 2) * world + rank :: world][:3]
    assert (many.epochs, many.tokens) >= (first.epochs, first.tokens)


def test_resume_when_characters_bound_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_data, "HELD", 2000)
    recipe = mixture(tmp_path, numbered([n * 7 % 150 for n in range(1, 100)]))
    whole = take(Blocks(recipe, Numbers(), 64), 60)
    for before in range(0, 55, 7):
        first, second = Blocks(recipe, Numbers(), 64), Blocks(recipe, Numbers(), 64)
        take(first, before)
        assert len(first.state()["sources"][0]["open"]) < 20
        second.resume(first.state())
        assert take(second, 5) == whole[before : before + 5]


def test_resume_tokenises_little(tmp_path: Path) -> None:
    encoded: list[str] = []

    class Counting(Numbers):
        def encode(self, text: str, special: bool = False) -> list[int]:
            encoded.append(text)
            return super().encode(text)

    recipe = mixture(tmp_path, numbered([300] * 500))
    first = Blocks(recipe, Counting(), 64, buffer=8)
    take(first, 1000)
    assert len(encoded) > 150
    encoded.clear()
    again = Blocks(recipe, Counting(), 64, buffer=8)
    again.resume(first.state())
    assert len(encoded) <= 24
    assert take(again, 3) == take(first, 3)
    assert len(json.dumps(first.state())) < 2000


def test_resume_refuses(tmp_path: Path) -> None:
    recipe = mixture(tmp_path, numbered([50] * 40))
    blocks = Blocks(recipe, Numbers(), 51)
    take(blocks, 5)
    state = blocks.state()

    def resume(changed: Any = None, length: int = 51) -> Callable[[], None]:
        return lambda: Blocks(recipe, Numbers(), length).resume(state if changed is None else changed)

    refusal(resume(length=60), "have changed")
    for key in state:
        refusal(resume({k: v for k, v in state.items() if k != key}), "damaged")
    refusal(resume({**state, "sources": [{"epoch": 0}]}), "damaged")
    refusal(resume([]), "damaged")
    resume()()
    write(tmp_path, "0.jsonl", jsonl(numbered([50] * 39)))
    refusal(resume(), "have changed")


def test_bad_settings(tmp_path: Path) -> None:
    recipe = mixture(tmp_path, ["1 2 3", "4"])
    for arguments in (
        {"length": 31}, {"length": 64, "min_tokens": 1}, {"length": 64, "rank": 1}, {"length": 64, "rank": -1},
        {"length": 64, "world": 0}, {"length": 64, "buffer": 0},
    ):
        with pytest.raises(ConfigError):
            Blocks(recipe, Numbers(), **arguments)
    with pytest.raises(DataError, match="no text of 32 tokens"):
        next(Blocks(recipe, Numbers(), 64))
    assert len(Block([[1, 2], [3]])) == 3
