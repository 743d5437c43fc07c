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
        except _Unfit as error:
            skipped.append(_skip(_name(path), error))
            continue
        source = _source(path, own, text)
        if source.sha256 in found:
            first = found[source.sha256].path
            skipped.append(_skip(source.path, _Unfit(f"has the same text as {first}", "same_text", path=first)))
            continue
        found[source.sha256] = source
    if not found:
        why = f" ({len(skipped)} skipped, the first: {skipped[0].path} {skipped[0].reason})" if skipped else ""
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
        skipped.append(_skip(_name(below) or ".", _unopened(error)))
        return
    for entry in entries:
        path = below / entry.name
        if folder / path in left or entry.name.lower() in NOT_DOCUMENTS:
            continue
        unfit = _unwanted(entry)
        if unfit:
            skipped.append(_skip(_name(path), unfit))
        elif entry.is_dir(follow_symlinks=False):
            yield from _files(folder, path, left, skipped)
        else:
            yield path


class _Unfit(DocumentError):
    """What is wrong with a file, without its name; `key` and `values` as in results.Remark."""

    def __init__(self, reason: str, key: str, **values: str) -> None:
        super().__init__(reason)
        self.key, self.values = key, values


def _skip(path: str, unfit: _Unfit) -> Skipped:
    return Skipped(path=path, reason=str(unfit), key=unfit.key, values=unfit.values)


def _unopened(error: OSError) -> _Unfit:
    return _Unfit(f"cannot be opened ({error.strerror})", "unopened", why=error.strerror or type(error).__name__)


def _unwanted(entry: os.DirEntry[str]) -> _Unfit | None:
    """Why an entry is not even opened; None for a file or folder to read."""
    if entry.name.startswith((".", "~$")):
        return _Unfit("is hidden", "hidden")
    try:
        if entry.is_dir(follow_symlinks=False):
            return None
        mode = entry.stat().st_mode
    except OSError as error:  # a link to nothing, or to itself
        return _unopened(error)
    if stat.S_ISDIR(mode):
        return _Unfit("is a link to a folder, which is not followed", "linked")
    return None if stat.S_ISREG(mode) else _Unfit("is no regular file", "irregular")


def _text(path: Path, max_bytes: int) -> str:
    """Raises _Unfit."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _Unfit(
            f"cannot be read ({error.strerror})", "unread", why=error.strerror or type(error).__name__
        ) from None
    if not size:
        raise _Unfit("is empty", "empty")
    if size > max_bytes:
        has, most = f"{size / 2**20:,.1f}", f"{max_bytes / 2**20:,.1f}"
        raise _Unfit(f"is too large ({has} MiB; the limit is {most})", "too_large", size=has, most=most)
    try:
        return extract(path)
    except DocumentError as error:
        why = str(error).removeprefix(f"{path} ").partition(";")[0].rstrip(".").replace(str(path), path.name)
        raise _Unfit(why, error.key) from None
    except MemoryError:
        raise _Unfit("needs more memory than there is", "memory") from None


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
