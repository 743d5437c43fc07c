"""Files and hub datasets to texts: what training may read, and one sentence for data that cannot be used."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from anchorkv.errors import DataError
from anchorkv.optional import library

KINDS = "jsonl, txt, md or parquet, plain or as .gz, .bz2, .xz or .zst"
LINE = 50_000_000
"""Bytes of the longest line that is read."""
CHAPTER = 1 << 18
"""Characters after which a txt or md file is cut at the next empty line, so that a whole library fits in one file."""

_KINDS = (".jsonl", ".txt", ".md", ".parquet")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_NOT_DATA = ("README", "LICENSE", "LICENCE")
_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Text(NamedTuple):
    """A document, and where it begins: "pg19.train.jsonl.gz:12" (a line of the file; a row of parquet or the hub)."""

    text: str
    where: str


@dataclass(frozen=True)
class Source:
    """One file, one folder or one hub dataset. Raises DataError when a value is out of range."""

    path: Path | None = None
    dataset: str | None = None
    """A hub dataset ("owner/name") in place of `path`."""
    subset: str | None = None
    """The hub dataset's configuration, where it has several."""
    split: str = "train"
    """The hub dataset's split."""
    weight: float = 1.0
    """Share of the tokens drawn, relative to the other sources'."""
    field: str = "text"
    """The column that holds the text (jsonl, parquet, hub)."""
    licence: str = ""
    """Copied to the model card."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and (problem := _problem(field.name, value)):
                raise DataError(f"{problem}.")
        if (self.path is None) == (self.dataset is None):
            raise DataError("A source has either a `path` or a `dataset`; give one of them.")
        if self.path is not None:
            object.__setattr__(self, "path", Path(self.path))  # a string will do, too

    @property
    def name(self) -> str:
        """What messages and tables call it: the file's or folder's own name, or the dataset's."""
        return self.dataset or (self.path.name if self.path else "")


@dataclass(frozen=True)
class Recipe:
    """What to train on: one source or a weighted mixture. Raises DataError when there is none."""

    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("The recipe has no sources; give at least one path or dataset.")

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """A recipe (.yaml), a file, a folder, or a hub dataset ("owner/name"); what is on the disk goes first.

        Raises DataError when there is no such thing, or the recipe is not one, with the file and the line.
        """
        path = Path(name).expanduser()
        if path.suffix.lower() in (".yaml", ".yml"):
            return cls(_read_recipe(path))
        if not os.path.exists(path) and _HUB_NAME.fullmatch(str(name)) and not _kind(path)[0]:
            return cls((Source(dataset=str(name)),))
        source = Source(path=path)
        files(source)
        return cls((source,))


def texts(source: Source) -> Iterator[Text]:
    """The documents of `source`, always in the same order; blank ones are passed over.

    A jsonl line, or a row of a table, is a document; a txt or md file is one, or several when it is long.
    Raises DataError, one sentence that names the file and the line, at the first thing that is not as it should be.
    """
    found = False
    for text in _all_texts(source):
        if not text.text.isspace() and text.text:
            found = True
            yield text
    if not found:
        raise DataError(f"{source.name} has no text in it; give data with text, or leave it out.")


def files(source: Source) -> list[Path]:
    """The data files of a `path` source, sorted; in a folder README and LICENSE files are not data. [] for a dataset.

    Raises DataError when a file is missing, empty or of an unknown kind, or the folder has no data file.
    """
    if source.path is None:
        return []
    path = source.path
    try:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if _is_data(p.relative_to(path)) and p.is_file())
            if not found:
                raise DataError(f"{path} has no data files in it; give {KINDS}.")
        elif not path.exists():
            raise DataError(f"There is no file or folder at {path}; check the path (a hub dataset is owner/name).")
        elif not _kind(path)[0]:
            raise DataError(f"{path} has an ending that is not known; give {KINDS}.")
        else:
            found = [path]
        for file in found:
            if file.stat().st_size == 0:
                raise DataError(f"{file} is empty; put text in it, or leave it out.")
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise DataError(f"{path} cannot be read ({_reason(error)}); check the path and its permissions.") from None
    return found


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and _kind(path)[0] != "" and path.name.split(".")[0].upper() not in _NOT_DATA


def _kind(path: Path) -> tuple[str, str]:
    """(".jsonl", ".gz") of "a.jsonl.gz"; "" for what is not known."""
    name = path.name.lower()
    compression = next((ending for ending in _COMPRESSED if name.endswith(ending)), "")
    name = name.removesuffix(compression)
    return next((ending for ending in _KINDS if name.endswith(ending)), ""), compression


def _all_texts(source: Source) -> Iterator[Text]:
    if source.path is None:
        yield from _hub(source)
        return
    folder = source.path.parent
    for path in files(source):
        name = path.relative_to(folder).as_posix()
        match _kind(path)[0]:
            case ".jsonl":
                yield from _jsonl(path, name, source.field)
            case ".parquet":
                yield from _parquet(path, name, source.field)
            case _:
                yield from _plain(path, name)


# --- files ---------------------------------------------------------------------------------------------------------


def _jsonl(path: Path, name: str, field: str) -> Iterator[Text]:
    for where, line in _lines(path, name):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where} is not JSON ({_reason(error)}); every line of a jsonl file is one whole JSON object."
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{where} is not a JSON object but a {type(row).__name__}; write " + '{"text": "…"}.')
        yield Text(_field(row, field, where), where)


def _plain(path: Path, name: str) -> Iterator[Text]:
    parts: list[str] = []
    start, size = "", 0
    for where, line in _lines(path, name):
        if "\0" in line:
            raise DataError(f"{where} is not text but binary data; give {KINDS}.")
        start = start if parts else where
        parts.append(line.replace("\r\n", "\n").replace("\r", "\n"))
        size += len(line)
        if size >= 2 * CHAPTER or (size >= CHAPTER and line.isspace()):
            yield Text("".join(parts), start)
            parts, size = [], 0
    if parts:
        yield Text("".join(parts), start)


def _lines(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """(where, line with its end) of a UTF-8 file."""
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(LINE + 1):
                number += 1
                where = f"{name}:{number}"
                if len(line) > LINE:
                    raise DataError(
                        f"{where} is one line of more than {LINE // 1_000_000} MB; split it into shorter lines."
                    )
                try:
                    yield where, (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8")
                except UnicodeDecodeError:
                    raise DataError(f"{where} is not UTF-8 text; save the file as UTF-8, or leave it out.") from None
    except _DAMAGED as error:
        raise _damaged(f"{name}:{number + 1}", error) from None


def _open(path: Path) -> io.BufferedIOBase:
    match _kind(path)[1]:
        case ".gz":
            return gzip.open(path, "rb")
        case ".bz2":
            return bz2.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":
            return io.BufferedReader(_Chunks(_zst(path)), 1 << 16)
        case _:
            return path.open("rb")


def _zst(path: Path) -> Iterator[bytes]:
    # zstandard's own reader takes a file that is cut off for one that ends there; its decoders say which it is.
    zstandard = library("zstandard", ".zst files")
    decoder: Any = None
    with path.open("rb") as file:
        while chunk := file.read(1 << 14):
            while chunk:
                decoder = decoder or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield decoder.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from None
                chunk, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
    if decoder is not None:
        raise EOFError("the last frame has no end")


class _Chunks(io.RawIOBase):
    """An iterator of bytes, as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _parquet(path: Path, name: str, field: str) -> Iterator[Text]:
    parquet = library("pyarrow.parquet", "parquet files")
    row = 0
    try:
        # A parquet file is read from its end, which a compressed stream cannot do.
        whole: Path | io.BytesIO = path
        if _kind(path)[1]:
            with _open(path) as file:
                whole = io.BytesIO(file.read())
        with parquet.ParquetFile(whole) as table:
            columns = table.schema_arrow.names
            if field not in columns:
                raise _no_field(name, field, columns)
            for batch in table.iter_batches(batch_size=64, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    where = f"{name}:{row}"
                    yield Text(_field({field: value}, field, where), where)
    except (*_DAMAGED, ValueError, library("pyarrow", "parquet files").ArrowException) as error:
        raise _damaged(f"{name}:{row + 1}", error) from None


# --- the hub -------------------------------------------------------------------------------------------------------


def _hub(source: Source) -> Iterator[Text]:
    datasets = library("datasets", "hub datasets")
    number = 0
    try:
        rows = iter(datasets.load_dataset(source.dataset, source.subset, split=source.split, streaming=True))
    except Exception as error:  # whatever the network, the hub and a dozen file formats have to say
        raise DataError(
            f"The dataset {source.dataset} (split {source.split}) cannot be opened ({_reason(error)}); "
            "check its name, its split and the network."
        ) from None
    while True:
        number += 1
        where = f"{source.dataset}:{number}"
        try:
            row = next(rows, None)
        except Exception as error:
            raise DataError(f"{where} cannot be read ({_reason(error)}); check the network and start again.") from None
        if row is None:
            return
        yield Text(_field(row, source.field, where), where)


# --- recipes -------------------------------------------------------------------------------------------------------


def _read_recipe(path: Path) -> tuple[Source, ...]:
    yaml = library("yaml", "recipes")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"There is no recipe at {path}; check the path.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"The recipe {path} cannot be read ({_reason(error)}); save it as UTF-8 text.") from None
    try:
        root, content = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = min(mark.line, text.count("\n", 0, len(text) - 1)) + 1 if mark else 1  # it may stand after the end
        reason = getattr(error, "problem", None) or _reason(error)
        raise DataError(f"{path}:{line} is not YAML ({reason}); see the example in the documentation.") from None
    entries = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}:{_line(root, 'sources')} has no sources; a recipe is a list of them under `sources:`.")
    for key in content:
        if key != "sources":
            raise DataError(f"{path}:{_line(root, key)}: the key '{key}' is not known; a recipe has `sources` alone.")
    return tuple(_read_source(entry, path, root, number) for number, entry in enumerate(entries))


def _read_source(entry: object, path: Path, root: Any, number: int) -> Source:
    known = [field.name for field in fields(Source)]
    where = f"{path}:{_line(root, 'sources', number)}"
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a source is written as `- path: …` or `- dataset: …`, not as {entry!r}.")
    for key, value in entry.items():
        line = f"{path}:{_line(root, 'sources', number, key)}"
        if key not in known:
            raise DataError(f"{line}: the key '{key}' is not known; a source has {', '.join(known)}.")
        if problem := _problem(key, value):
            raise DataError(f"{line}: {problem}.")
    if "path" in entry:
        entry = {**entry, "path": path.parent / Path(entry["path"]).expanduser()}
    try:
        source = Source(**entry)
        files(source)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return source


def _line(node: Any, *steps: object) -> int:
    """The line (from 1) of the innermost YAML node found along `steps`, keys and indices."""
    line = node.start_mark.line if node is not None else 0
    for step in steps:
        if getattr(node, "id", "") == "sequence" and isinstance(step, int):
            node = node.value[step]
            line = node.start_mark.line
        elif getattr(node, "id", "") == "mapping":
            pair = next((pair for pair in node.value if pair[0].value == str(step)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line, pair[1]
    return int(line) + 1


def _problem(key: str, value: object) -> str | None:
    """What is wrong with a source's `key`, or None."""
    if key == "weight":
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        return None if good else f"weight must be a number above 0 (got {value!r})"
    good = isinstance(value, str | Path if key == "path" else str) and bool(str(value).strip())
    return None if good else f"{key} must be text (got {value!r}); put it in quotes"


# --- words ---------------------------------------------------------------------------------------------------------


def _field(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise _no_field(where, field, list(row))
    text = row[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: the field '{field}' is not text but {type(text).__name__}; give another `field`.")
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and a tokenizer cannot read
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _no_field(where: str, field: str, known: list[str]) -> DataError:
    names = ", ".join(f"'{_short(str(name), 40)}'" for name in known[:8]) or "none"
    return DataError(f"{where} has no field '{field}'; its fields are {names}: name one as `field` in a recipe.")


def _damaged(where: str, error: BaseException) -> DataError:
    return DataError(f"{where} cannot be read ({_reason(error)}); the file is damaged or cut off, so copy it again.")


def _reason(error: BaseException) -> str:
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return _short(lines[0].rstrip("."), 200) if lines else type(error).__name__


def _short(text: str, size: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= size else text[:size] + "…"
