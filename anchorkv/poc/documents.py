"""A folder of documents as business areas: each sub-folder is one, and what cannot be read is listed, never left out in
silence."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from anchorkv.engines.base import Tokenizer
from anchorkv.errors import DocumentError
from anchorkv.extract import KINDS, extract
from anchorkv.poc.results import Skipped

MAX_BYTES = 32 * 2**20
"""Of one file; a larger one is hardly a document."""
LONGEST = 16
"""Characters of a token in the mean, at most: more of a huge text than this need not be looked at."""
NOT_DOCUMENTS = frozenset({"thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Source:
    """One document. id: "area/path inside it", unique and the same on every machine; path: inside the folder."""

    id: str
    area: str
    title: str
    path: str
    text: str
    sha256: str
    """Of the whole text, also where only its beginning is read."""


def collect(
    folder: Path, *, max_bytes: int = MAX_BYTES, leave: Collection[Path] = ()
) -> tuple[list[Source], list[Skipped]]:
    """Every readable document below `folder`, by path, and what was skipped and why.

    A sub-folder is an area, with all that lies in it; files directly in `folder` form the area that is named as it.
    leave: files and folders that are no documents, such as the questions. Raises DocumentError for a folder that is
    missing, or has nothing to read in it.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DocumentError(f"{folder} {what}; name a folder with a sub-folder for each area.")
    skipped: list[Skipped] = []
    left = {Path(os.path.realpath(path.expanduser())) for path in leave}
    folder = Path(os.path.realpath(folder))
    paths = list(_files(folder, Path(), left, skipped))
    own = _own_area(folder, {path.parts[0] for path in paths if len(path.parts) > 1})
    found: dict[str, Source] = {}
    for path in paths:
        try:
            text = _text(folder / path, max_bytes)
        except DocumentError as error:
            skipped.append(Skipped(path=_name(path), reason=str(error)))
            continue
        source = _source(path, own, text)
        if source.sha256 in found:
            skipped.append(Skipped(path=source.path, reason=f"has the same text as {found[source.sha256].path}"))
            continue
        found[source.sha256] = source
    if not found:
        first = skipped[0] if skipped else None
        why = f" ({len(skipped)} skipped, the first: {first.path} {first.reason})" if first else ""
        raise DocumentError(f"{folder} has no document that can be read{why}; put {KINDS} files into it.")
    return list(found.values()), skipped


def cut(source: Source, tokenizer: Tokenizer, most: int) -> Source:
    """The beginning of `source` that takes at most `most` tokens, up to the end of a line or word; itself where all of
    it does."""
    head = source.text[: LONGEST * most]
    tokens = tokenizer.encode(head)
    if len(tokens) <= most and len(head) == len(source.text):
        return source
    text = tokenizer.decode(tokens[:most]).rstrip("\ufffd")
    if not source.text.startswith(text):  # a tokenizer that normalises: what it takes is as long at least
        text = source.text[: len(text)]
    ends = [text.rfind(mark) + 1 for mark in ("\n", "。", ". ", " ")]
    whole = next((end for end in ends if end > 0.8 * len(text)), len(text))
    return replace(source, text=text[:whole])


# --- files ---------------------------------------------------------------------------------------------------------


def _files(folder: Path, below: Path, left: Collection[Path], skipped: list[Skipped]) -> Iterator[Path]:
    """Paths of the regular files in `folder / below`, relative to `folder`, sorted. Linked folders are not followed:
    they may lead out of the folder or round in a circle."""
    try:
        entries = sorted(os.scandir(folder / below), key=lambda entry: entry.name)
    except OSError as error:
        skipped.append(Skipped(path=_name(below) or ".", reason=f"cannot be opened ({error.strerror})"))
        return
    for entry in entries:
        path = below / entry.name
        if folder / path in left or entry.name.lower() in NOT_DOCUMENTS:
            continue
        reason = _unwanted(entry)
        if reason:
            skipped.append(Skipped(path=_name(path), reason=reason))
        elif entry.is_dir(follow_symlinks=False):
            yield from _files(folder, path, left, skipped)
        else:
            yield path


def _unwanted(entry: os.DirEntry[str]) -> str:
    """Why an entry is not even opened; "" for a file or folder to read."""
    if entry.name.startswith((".", "~$")):
        return "is hidden"
    try:
        if entry.is_dir(follow_symlinks=False):
            return ""
        mode = entry.stat().st_mode
    except OSError as error:  # a link to nothing, or to itself
        return f"cannot be opened ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "is a link to a folder, which is not followed"
    return "" if stat.S_ISREG(mode) else "is no regular file"


def _text(path: Path, max_bytes: int) -> str:
    """Raises DocumentError whose message is what is wrong with the file, without its name."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DocumentError(f"cannot be read ({error.strerror})") from None
    if not size:
        raise DocumentError("is empty")
    if size > max_bytes:
        raise DocumentError(f"is too large ({size / 2**20:,.1f} MiB; the limit is {max_bytes / 2**20:,.1f})")
    try:
        return extract(path)
    except DocumentError as error:
        why = str(error).removeprefix(f"{path} ").partition(";")[0]
        raise DocumentError(why.rstrip(".").replace(str(path), path.name)) from None
    except MemoryError:
        raise DocumentError("needs more memory than there is") from None


def _own_area(folder: Path, others: Collection[str]) -> str:
    """The area of the files directly in `folder`: its name, unless a sub-folder has that too."""
    name = _name(Path(folder.name)) or "documents"
    return name if name not in map(_name, map(Path, others)) else f"{name} (files)"


def _source(path: Path, own: str, text: str) -> Source:
    name = _name(path)
    area = _name(Path(path.parts[0])) if len(path.parts) > 1 else own
    return Source(
        id=name if len(path.parts) > 1 else f"{own}/{name}", area=area, title=path.stem.replace("_", " "), path=name,
        text=text, sha256=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
    )


def _name(path: Path) -> str:
    """With "/" on every system. Bytes that are no UTF-8 are written as such, so that two names never become one."""
    name = path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "" if name == "." else name
