"""Rows of a data file: what evaluation reads, and one sentence that names the line where a row is bad."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorkv.errors import DataError

Row = dict[str, Any]


@dataclass
class Rows:
    """The rows of one jsonl file (plain or .gz) that have all wanted fields, each of its type.

    fields: name -> type, or a tuple of types. skip_bad: pass over bad rows and count them in `bad`, instead of
    stopping at the first.
    """

    path: Path
    fields: dict[str, type | tuple[type, ...]]
    skip_bad: bool = False
    check: Callable[[Row], str] = lambda row: ""
    """What is wrong with a row that has all its fields, "" for nothing."""
    bad: list[str] = field(default_factory=list)
    """What was wrong with the rows passed over, "file:line: …"."""

    def __iter__(self) -> Iterator[Row]:
        """Raises DataError when the file is missing, damaged or holds no good row, and at the first bad row."""
        found = False
        for number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            row, problem = self._parse(line)
            if problem:
                where = f"{self.path.name}:{number}: {problem}"
                if not self.skip_bad:
                    raise DataError(f"{where}; mend the row, or go on without bad rows (--skip-bad-rows).")
                self.bad.append(where)
                continue
            found = True
            yield row
        if not found:
            raise DataError(f"{self.path} has no usable row; give a jsonl file with {', '.join(self.fields)}.")

    def _lines(self) -> Iterator[str]:
        if not self.path.is_file():
            raise DataError(f"There is no data file {self.path}; name the folder that holds it with --data.")
        try:
            opener: Any = gzip.open if self.path.suffix == ".gz" else open
            with opener(self.path, "rt", encoding="utf-8") as file:
                yield from file
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise DataError(f"{self.path} is damaged ({type(error).__name__}); give another copy of it.") from None

    def _parse(self, line: str) -> tuple[Row, str]:
        """The row, and what is wrong with it ("" for nothing)."""
        try:
            row = json.loads(line)
        except ValueError:
            return {}, "the row is no JSON"
        if not isinstance(row, dict):
            return {}, "the row is no JSON object"
        for name, kind in self.fields.items():
            if name not in row:
                return {}, f"the row has no field '{name}'"
            if not isinstance(row[name], kind) or (kind is int and isinstance(row[name], bool)):
                names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                return {}, f"the field '{name}' is {type(row[name]).__name__}, not {names}"
            if row[name] == "" or row[name] == []:
                return {}, f"the field '{name}' is empty"
        return row, self.check(row)


def find(data: Path, name: str) -> Path:
    """`name` (a path inside the data folder, ".jsonl") there, plain or as .gz. Raises DataError when it is missing."""
    for path in (data / f"{name}.gz", data / name):
        if path.is_file():
            return path
    raise DataError(f"There is no {name} (or {name}.gz) in {data}; name another folder with --data.")
