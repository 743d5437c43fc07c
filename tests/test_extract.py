"""Files to text: what must come through, and one clear sentence for what cannot be read."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import docx
import pytest
from fpdf import FPDF

from anchorkv.errors import DocumentError
from anchorkv.extract import extract, title_of, unwrap

JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n"


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def refusal(path: Path) -> str:
    """The one sentence with which `path` is refused; it names the file."""
    with pytest.raises(DocumentError) as caught:
        extract(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message
    return message


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp932", "euc_jp", "iso2022_jp"])
@pytest.mark.parametrize("times", [1, 30])
def test_japanese_encodings(tmp_path: Path, encoding: str, times: int) -> None:
    assert extract(write(tmp_path, "a.txt", (JAPANESE * times).encode(encoding))) == JAPANESE * times


@pytest.mark.parametrize("text", ["The café was naïve — déjà vu.\n", "A “test” of quotes.\n", "Größe über alles.\n"])
def test_western_encodings(tmp_path: Path, text: str) -> None:
    assert extract(write(tmp_path, "a.txt", text.encode("cp1252"))) == text


def test_markdown_and_line_ends(tmp_path: Path) -> None:
    assert extract(write(tmp_path, "a.md", b"# Head\r\n\r\n* one\rtwo\r\n")) == "# Head\n\n* one\ntwo\n"


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(JAPANESE.encode("cp932"))))
    assert extract("-") == JAPANESE


def test_titles() -> None:
    assert title_of(["-"]) == "standard input"
    assert title_of([Path("a/b.txt")]) == "b.txt"
    assert title_of(["a/b.txt", "c.txt", "-"]) == "b.txt and 2 more"


def test_missing_folder_empty(tmp_path: Path) -> None:
    assert "There is no file" in refusal(tmp_path / "none.txt")
    assert "folder" in refusal(tmp_path)
    assert "empty" in refusal(write(tmp_path, "e.txt", b""))
    assert "empty" in refusal(write(tmp_path, "w.txt", b" \n\t"))
    assert "no words" in refusal(write(tmp_path, "p.txt", b"... --- !!!"))


@pytest.mark.parametrize(
    "data", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), bytes(range(256)) * 20, b"\x7fELF\0\0\1\2 text text"]
)
def test_binary(tmp_path: Path, data: bytes) -> None:
    assert "binary" in refusal(write(tmp_path, "b.txt", data))


def test_damaged_unicode_is_not_read_as_something_else(tmp_path: Path) -> None:
    data = JAPANESE.encode()
    assert "byte 30" in refusal(write(tmp_path, "d.txt", data[:30] + b"\xff" + data[30:]))
    assert "utf-16" in refusal(write(tmp_path, "u.txt", JAPANESE.encode("utf-16")[:-1]))


def test_old_formats(tmp_path: Path) -> None:
    assert "docx" in refusal(write(tmp_path, "a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600))
    assert "docx" in refusal(write(tmp_path, "a.rtf", rb"{\rtf1 text}"))


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.txt", b"text")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert "Permission denied" in refusal(path)


# --- HTML ----------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html><head><title>no</title><style>p {}</style></head><body><h1>A  heading</h1>
<p>One <b>bold</b>
word.<br>Next line</p><ul><li>first</li><li><p>second</p></li></ul>
<table><tr><th>A</th><th>B</th></tr><tr><td>1</td><td><p>2</p></td></tr></table>
<pre>  code
    more</pre><!-- no --><div hidden>no</div><div style="display: none">no</div><script>no()</script>end</html>"""


def test_html(tmp_path: Path) -> None:
    text = extract(write(tmp_path, "a.html", PAGE.encode()))
    assert text == (
        "A heading\n\nOne bold word.\nNext line\n\n- first\n- second\n\nA | B\n1 | 2\n\n  code\n    more\n\nend\n"
    )


def test_html_is_known_by_its_beginning_and_declares_its_encoding(tmp_path: Path) -> None:
    page = f'<!DOCTYPE html><meta charset="Shift_JIS"><p>{JAPANESE}</p>'
    assert extract(write(tmp_path, "page", page.encode("cp932"))) == JAPANESE


# --- PDF -----------------------------------------------------------------------------------------------------------


def pdf(*pages: str, password: str = "") -> bytes:
    document = FPDF()
    document.set_font("Helvetica", size=11)
    if password:
        document.set_encryption(owner_password="owner", user_password=password)
    for page in pages:
        document.add_page()
        document.multi_cell(0, 6, page)
    return bytes(document.output())


def test_pdf_paragraphs_are_whole_again(tmp_path: Path) -> None:
    sentence = "The bridge over the river was built in nineteen hundred and two by an engineer from the city. "
    text = extract(write(tmp_path, "a.pdf", pdf("Chapter One\n\n" + sentence * 4, "Page two ends here.")))
    assert (sentence * 4).strip() in text
    assert text.startswith("Chapter One\n")
    assert "Page two ends here." in text


def test_pdf_without_text_locked_broken(tmp_path: Path) -> None:
    assert "OCR" in refusal(write(tmp_path, "scan.pdf", pdf("")))
    assert "password" in refusal(write(tmp_path, "locked.pdf", pdf("secret", password="abc")))
    assert "damaged" in refusal(write(tmp_path, "cut.pdf", pdf("some text")[:300]))
    assert "damaged" in refusal(write(tmp_path, "junk.pdf", b"%PDF-1.7\n" + b"junk " * 50))


def test_unwrap() -> None:
    wrapped = (
        "Heading\nThis is the first line of a paragraph that is hard-wrap-\nped by the program that wrote it, and here "
        "it\nends.\n- an item of a list that is about as long as the line\n- another item\n"
    )
    assert unwrap(wrapped).splitlines() == [
        "Heading",
        "This is the first line of a paragraph that is hard-wrapped by the program that wrote it, and here it ends.",
        "- an item of a list that is about as long as the line",
        "- another item",
    ]
    assert unwrap("これは長い段落の一行目で、まだ続\nいています。") == "これは長い段落の一行目で、まだ続いています。"
    assert unwrap("") == ""


# --- Word ----------------------------------------------------------------------------------------------------------


def test_docx_in_document_order(tmp_path: Path) -> None:
    document = docx.Document()
    document.add_heading("A heading", 1)
    document.add_paragraph("A paragraph.")
    table = document.add_table(rows=2, cols=2)
    for row, texts in zip(table.rows, (("a", "b"), ("1", "two\nlines")), strict=True):
        for cell, text in zip(row.cells, texts, strict=True):
            cell.text = text
    document.add_paragraph("first", style="List Bullet")
    document.add_paragraph("second", style="List Bullet")
    document.add_paragraph("猫の最後。")
    path = tmp_path / "a.docx"
    document.save(str(path))
    assert extract(path) == (
        "A heading\n\nA paragraph.\n\na | b\n1 | two lines\n\n- first\n- second\n猫の最後。\n"
    )


def test_docx_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.docx"
    docx.Document().save(str(path))
    assert "no words" in refusal(path)
    whole = path.read_bytes()
    assert "damaged" in refusal(write(tmp_path, "cut.docx", whole[: len(whole) // 2]))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    assert "archive" in refusal(tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "hollow.docx", "w") as archive:
        archive.writestr("word/document.xml", "<not-word/>")
    assert "damaged" in refusal(tmp_path / "hollow.docx")
