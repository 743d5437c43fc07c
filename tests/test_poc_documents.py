"""A folder of documents becomes areas: what is read, what is skipped and why, and what is never followed."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest
from fake_engine import ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st
from pypdf import PdfWriter

from anchorkv.errors import DocumentError
from anchorkv.poc.documents import Source, collect, cut
from anchorkv.poc.report.words import LANGS, Words
from anchorkv.poc.sentences import sentence_at, sentences


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two areas, one of them deep, and a file beside them."""
    found = tmp_path / "texts"
    for name, text in {
        "contracts/a.txt": "The fee is 20 euro.", "contracts/2020/b.md": "The term is 3 years.",
        "logs/c.txt": "The disk of host 7 is full.", "readme.txt": "Which text is where.",
    }.items():
        (found / name).parent.mkdir(parents=True, exist_ok=True)
        (found / name).write_text(text, encoding="utf-8")
    return found


def reasons(folder: Path, **options: object) -> dict[str, str]:
    _, skipped = collect(folder, **options)  # type: ignore[arg-type]
    return {one.path: one.reason for one in skipped}


def source(text: str) -> Source:
    return Source(id="a/b.txt", area="a", title="b", path="a/b.txt", text=text, sha256="")


def test_sub_folders_are_areas_with_all_that_lies_in_them(folder: Path) -> None:
    sources, skipped = collect(folder)
    assert [(one.id, one.area, one.title) for one in sources] == [
        ("contracts/2020/b.md", "contracts", "b"), ("contracts/a.txt", "contracts", "a"),
        ("logs/c.txt", "logs", "c"), ("texts/readme.txt", "texts", "readme"),
    ]
    assert sources[1].text == "The fee is 20 euro.\n"
    assert len({one.sha256 for one in sources}) == 4
    assert skipped == []


def test_the_same_folder_gives_the_same_ids_wherever_it_is_named_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [one.id for one in collect(folder)[0]]
    monkeypatch.chdir(folder)
    assert [one.id for one in collect(Path())[0]] == ids


def test_files_beside_an_area_of_the_folders_own_name_keep_ids_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "x" / "x").mkdir(parents=True)
    (tmp_path / "x" / "x" / "a.txt").write_text("One fact.", encoding="utf-8")
    (tmp_path / "x" / "a.txt").write_text("Another fact.", encoding="utf-8")
    assert sorted(one.id for one in collect(tmp_path / "x")[0]) == ["x (files)/a.txt", "x/a.txt"]


def test_what_cannot_be_read_is_listed_with_its_reason(folder: Path) -> None:
    (folder / "logs" / "empty.txt").write_bytes(b"")
    (folder / "logs" / "blank.txt").write_bytes(b" \n ")
    (folder / "logs" / "photo.jpg").write_bytes(bytes(range(256)) * 20)
    (folder / "logs" / "large.txt").write_text("word " * 1000, encoding="utf-8")
    (folder / "logs" / "again.txt").write_text("The fee is 20 euro.", encoding="utf-8")
    (folder / "logs" / ".secret").write_text("hidden", encoding="utf-8")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("hidden too", encoding="utf-8")
    found = reasons(folder, max_bytes=4000)
    assert found["logs/empty.txt"] == "is empty"
    assert found["logs/blank.txt"] == "is empty"
    assert "is too large" in found["logs/large.txt"]
    assert found["logs/again.txt"] == "has the same text as contracts/a.txt"
    assert found["logs/.secret"] == found[".git"] == "is hidden"
    assert not any(str(folder) in reason for reason in found.values())
    assert "binary" in reasons(folder)["logs/photo.jpg"]


def test_what_is_said_of_a_file_has_a_key_for_every_language(folder: Path) -> None:
    locked = PdfWriter()
    locked.add_blank_page(100, 100)
    blank = io.BytesIO()
    locked.write(blank)
    locked.encrypt("secret")
    secret = io.BytesIO()
    locked.write(secret)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("a.txt", "text")
    content = {
        "encrypted": ("a.pdf", secret.getvalue()), "scanned": ("b.pdf", blank.getvalue()),
        "old_word": ("c.doc", b"\xd0\xcf\x11\xe0" * 9), "wordless": ("d.txt", b"... !"), "empty": ("e.txt", b" \n"),
        "archive": ("f.docx", archive.getvalue()), "binary": ("g.jpg", bytes(range(256)) * 20),
        "damaged": ("h.pdf", b"%PDF-1.7\n%%EOF"), "hidden": (".i.txt", b"text"),
        "too_large": ("j.txt", b"word " * 9000), "same_text": ("k.txt", b"The fee is 20 euro."),
    }
    for name, data in content.values():
        (folder / "logs" / name).write_bytes(data)
    _, skipped = collect(folder, max_bytes=40_000)
    assert {one.path: one.key for one in skipped} == {f"logs/{name}": key for key, (name, _) in content.items()}
    for lang in LANGS:
        assert all(Words(lang)(f"said.{one.key}", **one.values) for one in skipped)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes and links")
def test_links_that_lead_round_and_pipes_do_not_hang(folder: Path) -> None:
    (folder / "logs" / "round").symlink_to(folder, target_is_directory=True)
    (folder / "logs" / "self").symlink_to(folder / "logs" / "self")
    (folder / "logs" / "lost.txt").symlink_to(folder / "nowhere.txt")
    (folder / "logs" / "good.txt").symlink_to(folder.parent / "elsewhere.txt")
    (folder.parent / "elsewhere.txt").write_text("A text elsewhere.", encoding="utf-8")
    os.mkfifo(folder / "logs" / "pipe")
    sources, skipped = collect(folder)
    found = {one.path: one.reason for one in skipped}
    assert found["logs/round"] == "is a link to a folder, which is not followed"
    assert found["logs/self"].startswith("cannot be opened (")
    assert found["logs/lost.txt"].startswith("cannot be opened (")
    assert found["logs/pipe"] == "is no regular file"
    assert "logs/good.txt" in {one.id for one in sources}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_skipped(folder: Path) -> None:
    (folder / "logs" / "c.txt").chmod(0)
    assert "cannot be read" in reasons(folder)["logs/c.txt"]


def test_a_file_that_vanishes_or_cannot_be_read_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        raise DocumentError(f"{path} cannot be read (Input/output error); check the path and its permissions.")

    monkeypatch.setattr("anchorkv.poc.documents.extract", broken)
    with pytest.raises(DocumentError, match=r"4 skipped, the first: contracts/2020/b.md cannot be read \(Input"):
        collect(folder)


def test_names_that_are_no_utf8_stay_apart_and_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "area").mkdir()
    try:
        for number, name in enumerate((b"\xff.txt", b"\xfe.txt")):
            Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "area"), name))).write_text(f"Fact {number}.")
    except (OSError, UnicodeError):
        pytest.skip("this system has no such names")
    ids = {one.id for one in collect(tmp_path)[0]}
    assert len(ids) == 2
    assert all(one.encode() for one in ids)


def test_what_is_left_out_on_request_is_not_a_document(folder: Path) -> None:
    sources, skipped = collect(folder, leave=[folder / "readme.txt", folder / "logs"])
    assert [one.area for one in sources] == ["contracts", "contracts"]
    assert skipped == []


@pytest.mark.parametrize(("name", "words"), [
    ("nowhere", "does not exist"), ("file.txt", "is a file"), ("empty", "no document"),
])
def test_a_folder_without_documents_is_one_sentence(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DocumentError, match=words) as raised:
        collect(tmp_path / name)
    assert str(raised.value).count(". ") == 0


# --- cutting -------------------------------------------------------------------------------------------------------


def test_a_long_document_is_cut_at_the_end_of_a_line_or_word() -> None:
    tokenizer = ByteTokenizer()
    long = source("The first line says this.\nThe second says that.\nThe third is cut")
    assert cut(long, tokenizer, 52).text == "The first line says this.\nThe second says that.\n"
    assert cut(source("one two three four five six"), tokenizer, 16).text == "one two three "
    assert cut(long, tokenizer, 500) is long


@given(st.text(min_size=1, max_size=80), st.integers(2, 60))
def test_what_is_cut_is_a_beginning_that_fits(text: str, most: int) -> None:
    found = cut(source(text), ByteTokenizer(), most)
    assert text.startswith(found.text)
    assert len(found.text.encode()) <= most


# --- sentences -----------------------------------------------------------------------------------------------------


def test_sentences_of_both_languages() -> None:
    assert sentences("Dr. Lee paid $3.50 twice. He left.\n\nWhy?") == [
        "Dr. Lee paid $3.50 twice.", " He left.", "\n\nWhy?",
    ]
    assert sentences("第1条　目的\n期限は7日以内とする。ただし、例外がある。") == [
        "第1条　目的\n", "期限は7日以内とする。", "ただし、例外がある。",
    ]


@given(st.text(max_size=300))
def test_sentences_lose_nothing(text: str) -> None:
    assert "".join(sentences(text)) == text


@given(st.text(alphabet="ab .\n。", min_size=1, max_size=200), st.data())
def test_a_place_lies_in_its_sentence(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    found = sentence_at(text, start, start + 1)
    assert found in text
    assert text[start].isspace() or text[start] in found


def test_the_sentence_of_a_place_far_into_a_text() -> None:
    text = "The pump ran. " * 500 + "The valve opens at 7 bar. " + "The pump ran. " * 500
    at = text.index("7 bar")
    assert sentence_at(text, at, at + 5) == "The valve opens at 7 bar."
