"""The bundled samples: licensed, small, answerable, and Japanese that is cut at its sentences."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from anchorkv import samples
from anchorkv.config import AnchorConfig
from anchorkv.evaluate.metrics import contains
from anchorkv.extract import extract
from anchorkv.models import builtin
from anchorkv.segment import split

FREE = AnchorConfig(min_segment=1, max_segment=200)
LICENCES = ("public domain", "CC0 1.0", "CC BY 4.0")
ROW = re.compile(r"^\| `([^`]+\.txt)` \| [^|]+ \| ([\d,]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
"""File, tokens, source and licence."""

README = (Path(samples.__file__).parent / "README.md").read_text(encoding="utf-8")
FILES = {str(path.relative_to(samples.folder())): path for path in sorted(samples.folder().glob("*/*"))}
QUESTIONS: list[dict[str, Any]] = [
    json.loads(line) for line in samples.questions().read_text(encoding="utf-8").splitlines()
]
JAPANESE = FILES["japanese/business_travel.txt"].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def vocabulary() -> llama_cpp.Llama:
    return llama_cpp.Llama(model_path=str(builtin()), vocab_only=True, verbose=False)


def tokens(vocabulary: llama_cpp.Llama, text: str) -> list[int]:
    return vocabulary.tokenize(text.encode(), add_bos=False, special=False)


def test_the_folder_holds_areas_of_text_files_and_nothing_else() -> None:
    areas = sorted(samples.folder().iterdir())
    assert len(areas) >= 5
    assert "japanese" in {area.name for area in areas}
    assert all(area.is_dir() for area in areas)
    assert {path.suffix for path in FILES.values()} == {".txt"}


def test_every_file_is_listed_with_its_source_and_a_free_licence() -> None:
    rows = ROW.findall(README)
    assert sorted(name for name, *_ in rows) == sorted(FILES)
    for name, _, source, licence in rows:
        assert licence.startswith(("public domain", "CC0 1.0", "[CC BY 4.0](https://creativecommons.org/")), name
        assert any(known in licence for known in LICENCES), name
        assert re.search(r"repository [\w-]+/[\w.-]+, commit [0-9a-f]{7}", source), name


def test_attribution_names_the_authors_where_the_licence_asks_for_it() -> None:
    for name, _, source, licence in ROW.findall(README):
        if "CC BY" in licence:
            assert "©" in source, name
            assert "https://" in source, name
            assert f"- **{name.split('/')[0]}**" in README, "changes must be stated"


@pytest.mark.parametrize("name", FILES)
def test_texts_are_clean_utf8(name: str) -> None:
    text = FILES[name].read_bytes().decode("utf-8")
    assert extract(FILES[name]) == text
    assert not re.search(r"[\t\r\ufffd]| $|\n{3}|\{\{|\]\(|[\w.]+@[\w.]+\.\w", text, re.MULTILINE)


def test_token_counts_are_the_stated_ones_and_small(vocabulary: llama_cpp.Llama) -> None:
    stated = {name: int(count.replace(",", "")) for name, count, *_ in ROW.findall(README)}
    counted = {name: len(tokens(vocabulary, path.read_text(encoding="utf-8"))) for name, path in FILES.items()}
    assert counted == stated
    assert all(1_000 <= count <= 2_500 for count in counted.values())
    assert sum(counted.values()) <= 13_000


@pytest.mark.parametrize("entry", QUESTIONS, ids=lambda entry: entry["answers"][0])
def test_the_answer_stands_in_the_text_and_not_in_the_question(entry: dict[str, Any]) -> None:
    text = FILES[entry["document"]].read_text(encoding="utf-8")
    assert entry["answers"][0] in text
    assert contains(text, entry["answers"][:1])
    assert not contains(entry["question"], entry["answers"])


def test_questions_cover_every_document_from_beginning_to_end() -> None:
    count = Counter(entry["document"] for entry in QUESTIONS)
    assert count.keys() == FILES.keys()
    assert all(5 <= number <= 8 for number in count.values())
    assert len({entry["question"] for entry in QUESTIONS}) == len(QUESTIONS)
    for name, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        answers = [entry["answers"][0] for entry in QUESTIONS if entry["document"] == name]
        thirds = {3 * text.index(answer) // len(text) for answer in answers}
        assert thirds == {0, 1, 2}, name


def test_japanese_questions_are_japanese() -> None:
    for entry in QUESTIONS:
        assert bool(re.search("[ぁ-ん]", entry["question"])) == entry["document"].startswith("japanese/")


# ---------------------------------------------------------------------------------------------- Japanese is cut rightly


def sentences(text: str) -> list[str]:
    """What a reader calls sentences here: a line ends one, and so does a 。 that no bracket closes after."""
    return [part.strip() for line in text.splitlines() for part in re.findall(r".+?(?:。(?!）)|$)", line)]


def cut(vocabulary: llama_cpp.Llama, text: str) -> list[str]:
    segments = split(tokens(vocabulary, text), FREE, lambda token: vocabulary.detokenize([token]))
    texts = (vocabulary.detokenize(segment).decode("utf-8").strip() for segment in segments)
    return [text for text in texts if text]


def test_the_japanese_sample_is_cut_at_its_sentences(vocabulary: llama_cpp.Llama) -> None:
    text = "\n".join(line for line in JAPANESE.splitlines() if "。）" not in line)
    found = cut(vocabulary, text)
    assert found == sentences(text)
    assert sum(part.endswith("。") for part in found) >= 20


def test_a_definition_in_brackets_does_not_end_its_sentence(vocabulary: llama_cpp.Llama) -> None:
    assert cut(vocabulary, JAPANESE) == sentences(JAPANESE)
