"""Files from outside: what is in them, and how little they can do."""

from __future__ import annotations

import asyncio
import io
import zipfile

import pytest

from anchorkv.errors import DocumentError
from anchorkv.serve.extraction import extract_apart
from anchorkv.serve.refusals import Refused


def extract(data: bytes, name: str, seconds: float = 60, most: int = 10_000) -> str:
    return asyncio.run(extract_apart(data, name, seconds=seconds, most=most))


def test_text_comes_out() -> None:
    assert extract("Grüße aus der Mühle.".encode(), "a.txt") == "Grüße aus der Mühle.\n"
    assert extract(b"<html><body><p>One.</p><p>Two.</p></body></html>", "A.HTML") == "One.\n\nTwo.\n"
    assert extract(b"# Title\n\nWords.", "noname") == "# Title\n\nWords.\n"


@pytest.mark.parametrize(("data", "name", "words"), [
    (b"", "a.txt", "The file is empty"), (b"\x00\x01\x02\x03" * 50, "a.txt", "The file"), (b"x y", "a.py", "'.py'"),
    (b"%PDF-1.7 nothing", "a.pdf", "The file is not a readable PDF"),
])
def test_what_is_no_text_is_told_without_a_path(data: bytes, name: str, words: str) -> None:
    with pytest.raises(DocumentError) as caught:
        extract(data, name)
    assert words in str(caught.value)
    assert "/" not in str(caught.value).replace("pdf or docx", "")


def test_too_much_text() -> None:
    with pytest.raises(Refused, match="more than 1,000 bytes") as caught:
        extract(b"word " * 1000, "a.txt", most=1000)
    assert caught.value.status == 413


def test_a_file_that_takes_too_long() -> None:
    with pytest.raises(DocumentError, match=r"more than 0\.01 seconds"):
        extract(b"x y", "a.txt", seconds=0.01)


def test_a_small_archive_that_holds_a_huge_document() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("word/document.xml", "w", force_zip64=True) as file:
            for _ in range(1200):
                file.write(b" " * 2**20)
        archive.writestr("[Content_Types].xml", "<Types/>")
    assert len(packed.getvalue()) < 10 * 2**20
    with pytest.raises(DocumentError, match="The file"):
        extract(packed.getvalue(), "a.docx")
