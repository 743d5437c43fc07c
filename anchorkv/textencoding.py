"""Bytes to text: the encodings that English and Japanese documents come in, and a clear word when it is no text."""

from __future__ import annotations

import codecs
import re

from charset_normalizer import from_bytes

from anchorkv.errors import DocumentError

_BOMS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)
_CANDIDATES = ["cp932", "euc_jp", "cp1252", "latin_1"]
_NOT_TEXT = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_DECLARED = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_\-:]+)""", re.IGNORECASE)


def decode_bytes(data: bytes, name: str, declared: str | None = None) -> str:
    """`data` as text: by its byte order mark, as `declared`, as UTF-8, or as the likeliest legacy encoding.

    Raises DocumentError when it is binary, or UTF-8 (or UTF-16) that is damaged.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return _strict(data, encoding, name)
    if b"\x1b$B" in data or b"\x1b$@" in data:  # the escapes into JIS X 0208; the rest of ISO-2022-JP is plain ASCII
        return _strict(data, "iso2022_jp", name)
    if declared is not None:
        try:
            return _readable(data.decode(declared), name)
        except UnicodeDecodeError:
            pass  # pages often declare what they are not
    try:
        return _readable(data.decode("utf-8"), name)
    except UnicodeDecodeError as error:
        _refuse_damaged(data, name, error)
    if b"\0" in data:
        raise _binary(name)
    best = from_bytes(data, cp_isolation=_CANDIDATES).best()
    if best is None:
        raise _binary(name)
    return _readable(str(best), name)


def declared_encoding(data: bytes) -> str | None:
    """The encoding that an HTML or XML file names at its beginning, if Python knows it."""
    found = _DECLARED.search(data[:2048])
    if not found:
        return None
    try:
        name = codecs.lookup(found.group(1).decode("ascii")).name
    except LookupError:
        return None
    # Browsers read these names as Microsoft's supersets of them, and so do authors.
    return {"shift_jis": "cp932", "iso8859-1": "cp1252"}.get(name, name)


def _strict(data: bytes, encoding: str, name: str) -> str:
    try:
        return _readable(data.decode(encoding), name)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not valid {encoding} at byte {error.start}; it may be cut off, save it again as UTF-8.",
            "damaged",
        ) from None


def _readable(text: str, name: str) -> str:
    """Text has hardly any control characters; what has many is a binary file that happens to decode."""
    controls = len(_NOT_TEXT.findall(text))
    if controls > 0.01 * len(text) or (controls and len(text) < 100):
        raise _binary(name)
    return text


def _refuse_damaged(data: bytes, name: str, error: UnicodeDecodeError) -> None:
    """A file that is UTF-8 but for a few bytes must not be read as another encoding: all of it would be garbled."""
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    good = sum(ord(character) > 127 for character in text) - bad
    if good >= 10 * bad:
        raise DocumentError(
            f"{name} is UTF-8 with damaged bytes, the first at byte {error.start}; save it again as UTF-8.", "damaged"
        )


def _binary(name: str) -> DocumentError:
    return DocumentError(f"{name} is not text but binary data; give txt, md, html, pdf or docx.", "binary")
