"""Files to plain text: txt, md, html, pdf, docx, and standard input. Block structure survives as newlines."""

from __future__ import annotations

import io
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from anchorkv.errors import DocumentError
from anchorkv.textencoding import declared_encoding, decode_bytes

KINDS = "txt, md, html, pdf or docx"


def extract(source: str | Path) -> str:
    """The text of a file, or of standard input for "-". Newlines are "\\n"; there is always at least one letter in it.

    Raises DocumentError, one sentence that names the file and what to do, when there is no text to be had.
    """
    if str(source) == "-":
        return _text_of(sys.stdin.buffer.read(), "standard input", "")
    path = Path(source).expanduser()
    return _text_of(_bytes_of(path), str(path), path.suffix.lower())


def title_of(sources: Sequence[str | Path]) -> str:
    """A short name for one or several sources, for headings and messages."""
    names = ["standard input" if str(source) == "-" else Path(source).name for source in sources]
    if not names:
        return "text"
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _bytes_of(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise DocumentError(f"{path} is a folder; name the files in it that should be read.")
        return path.read_bytes()
    except FileNotFoundError:
        raise DocumentError(f"There is no file at {path}; check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        reason = getattr(error, "strerror", None) or str(error)
        raise DocumentError(f"{path} cannot be read ({reason}); check the path and its permissions.") from None


def _text_of(data: bytes, name: str, suffix: str) -> str:
    if not data.strip():
        raise DocumentError(f"{name} is empty; give a document with text in it.", "empty")
    if data.startswith(b"%PDF-") or suffix == ".pdf":
        text = _pdf(data, name)
    elif data.startswith(b"PK\x03\x04") or suffix == ".docx":
        text = _docx(data, name)
    elif data.startswith(b"\xd0\xcf\x11\xe0") or data.startswith(b"{\\rtf"):
        raise DocumentError(
            f"{name} is an old Word or RTF file, which cannot be read; save it as docx or txt.", "old_word"
        )
    elif suffix in (".html", ".htm", ".xhtml") or _looks_like_html(data):
        text = _html(data, name)
    else:
        text = decode_bytes(data, name)
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n").replace("\0", "").strip("\n")
    if not any(character.isalnum() for character in text):
        raise DocumentError(f"{name} has no words in it; give a document with text.", "wordless")
    return text + "\n"


# --- HTML --------------------------------------------------------------------------------------------------------

_SILENT = {"script", "style", "noscript", "template", "head", "svg", "math", "iframe", "object", "select", "textarea"}
_BLOCK = {
    "address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "div", "dl", "dt", "fieldset",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html", "li", "main",
    "nav", "ol", "p", "pre", "section", "summary", "table", "tbody", "tfoot", "thead", "tr", "ul",
}
_SPACED = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "ul", "ol", "blockquote", "figure"}


def _looks_like_html(data: bytes) -> bool:
    return re.match(rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html[\s>])", data[:1024], re.IGNORECASE) is not None


# What the walk over the page leaves for `_tidy`: a run of breaks counts as its strongest one.
_LINE, _PARAGRAPH, _BULLET, _SPACE = "\x02", "\x03", "\x04", "\x05"


def _html(data: bytes, name: str) -> str:
    """Visible text. Blocks end lines, list items start with "- ", table cells are joined by " | "."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(decode_bytes(data, name, declared_encoding(data)), "html.parser")
    return _tidy("".join(_visible(soup, preformatted=False)))


def _tidy(text: str) -> str:
    def strongest(run: re.Match[str]) -> str:
        lines = 2 if _PARAGRAPH in run.group() else min(2, run.group().count("\n"))
        return "\n" * max(1, lines)

    text = re.sub(f"{_BULLET}[ \n{_LINE}{_PARAGRAPH}]*", "- ", re.sub(" {2,}", " ", text))
    text = re.sub(f" *[\n{_LINE}{_PARAGRAPH}][ \n{_LINE}{_PARAGRAPH}]*", strongest, text)
    return text.strip().replace(_SPACE, " ")


def _visible(node: Any, preformatted: bool) -> Iterator[str]:
    from bs4.element import NavigableString, PreformattedString, Tag

    for child in node.children:
        if isinstance(child, Tag):
            yield from _tag(child, preformatted)
        elif isinstance(child, NavigableString) and not isinstance(child, PreformattedString):
            if preformatted:
                yield child.expandtabs(4).replace(" ", _SPACE)
            else:
                yield re.sub(r"[ \t\r\n\f]+", " ", child)


def _tag(tag: Any, preformatted: bool) -> Iterator[str]:
    style = str(tag.get("style") or "").replace(" ", "").lower()
    if tag.name in _SILENT or tag.has_attr("hidden") or "display:none" in style:
        return
    if tag.name == "br":
        yield "\n"
        return
    edge = _PARAGRAPH if tag.name in _SPACED else _LINE if tag.name in _BLOCK else ""
    yield edge
    if tag.name == "tr" and not tag.find("table"):  # tables that lay a page out are read as blocks
        cells = ("".join(_visible(cell, preformatted)) for cell in tag.find_all(["td", "th"], recursive=False))
        yield " | ".join(re.sub(f"[ \n{_LINE}{_PARAGRAPH}]+", " ", cell).strip() for cell in cells)
    else:
        if tag.name == "li":
            yield _BULLET
        yield from _visible(tag, preformatted or tag.name == "pre")
    yield edge


# --- PDF ---------------------------------------------------------------------------------------------------------


def _pdf(data: bytes, name: str) -> str:
    import logging

    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it reports each repair; the user can do nothing about them
    encrypted = DocumentError(
        f"{name} is an encrypted PDF; save a copy without a password and give that.", "encrypted"
    )
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise encrypted
        pages = [page.extract_text() for page in reader.pages]
    except DocumentError:
        raise
    except Exception as error:
        # pypdf meets broken files with errors of many kinds (KeyError, RecursionError, struct.error …).
        if "encrypt" in str(error).lower() or "cryptography" in str(error).lower():
            raise encrypted from None
        kind = error if isinstance(error, PyPdfError) else type(error).__name__
        raise DocumentError(
            f"{name} is not a readable PDF ({kind}); it may be damaged, export it again.", "damaged"
        ) from None
    text = "\n".join(unwrap(page) for page in pages)
    if pages and not any(character.isalnum() for character in text):
        raise DocumentError(
            f"{name} has pages but no text, as a scan does; run text recognition (OCR) on it first.", "scanned"
        )
    return text


_CJK = r"\u3000-\u30ff\u3400-\u9fff\uff00-\uffef"
_ENDS = re.compile(r"[.!?:;。！？：」』)\]\"”’]\s*$")
_ITEM = re.compile(r"^\s*([-–•*◦▪・]|\(?\d{1,3}[.)]|\(?[a-zA-Z][.)])\s")


def unwrap(page: str) -> str:
    """Join the hard-wrapped lines of one page into paragraphs; a word cut by a hyphen becomes whole.

    A line is taken as wrapped when it is about as long as the page's usual line and ends no sentence. Short lines
    (headings, last lines of paragraphs, table rows) and list items stay on lines of their own.
    """
    lines = [re.sub(r"[ \t\u00a0]+", " ", line).strip() for line in page.splitlines()]
    widths = sorted(len(line) for line in lines if line)
    if not widths:
        return ""
    usual = median(widths[len(widths) // 2 :])
    out: list[str] = []
    wrapped = False
    for line in lines:
        if wrapped and line and not _ITEM.match(line):
            out[-1] = _join(out[-1], line)
        else:
            out.append(line)
        wrapped = bool(line) and (len(line) >= 0.75 * usual or _hyphenated(line)) and not (
            _ENDS.search(line) and len(line) < 0.9 * usual
        )
    return "\n".join(out)


def _hyphenated(line: str) -> bool:
    return re.search(r"[^\W\d_][-\u00ad\u2010]$", line) is not None


def _join(first: str, second: str) -> str:
    if _hyphenated(first) and second[0].islower():
        return first[:-1] + second
    glue = "" if re.search(f"[{_CJK}]$", first) and re.match(f"[{_CJK}]", second) else " "
    return first + glue + second


# --- Word --------------------------------------------------------------------------------------------------------


def _docx(data: bytes, name: str) -> str:
    import docx

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            is_word = "word/document.xml" in archive.namelist()
    except zipfile.BadZipFile:
        raise DocumentError(
            f"{name} is not a readable docx file; it may be damaged, save it again.", "damaged"
        ) from None
    if not is_word:
        raise DocumentError(f"{name} is an archive, not a Word document; give {KINDS}.", "archive")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lines = list(_blocks(docx.Document(io.BytesIO(data)).iter_inner_content()))
    except Exception as error:  # python-docx passes on whatever zipfile, lxml or a missing part raises
        raise DocumentError(
            f"{name} is not a readable docx file ({type(error).__name__}); it may be damaged, save it again.",
            "damaged",
        ) from None
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _blocks(items: Iterable[Any]) -> Iterator[str]:
    """Lines in the order of the document; tables as "a | b", one row a line."""
    for item in items:
        if hasattr(item, "rows"):
            yield ""
            for row in item.rows:
                # A merged cell comes once a column that it spans.
                cells = list(dict.fromkeys(row.cells))
                yield " | ".join(" ".join(cell.text.split()) for cell in cells)
            yield ""
            continue
        style = (item.style.name or "") if item.style is not None else ""
        properties = item._p.pPr
        listed = style.startswith("List") or (properties is not None and properties.numPr is not None)
        text = item.text.strip()
        if style.startswith(("Heading", "Title")):
            yield from ("", text, "")
        elif listed and text:
            yield f"- {text}"
        else:
            yield from (text, "")
