"""A bounded file of records that wait for the database: JSON lines, each on the disk before it is acknowledged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from anchorkv.serve.audit.errors import AuditError, AuditUnavailable
from anchorkv.serve.audit.record import Sealed, canonical, digest


class Spool:
    """One process's own file, in the order of appending. Not thread-safe: `AuditTrail` takes turns.

    A checksum a line finds what a crash or a disk broke. It does not stop who can write here from changing a record
    before it has reached the chain: keep the folder to the server's own user.
    """

    def __init__(self, path: str | Path, max_bytes: int = 64 * 2**20) -> None:
        """Opens what an earlier process left. A last line that a crash cut off was never acknowledged and is put aside.

        Raises AuditError when another process uses this file, AuditUnavailable when it cannot be written.
        """
        self.path, self.max_bytes = Path(path), max_bytes
        self.damaged_path = self.path.with_name(self.path.name + ".damaged")
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise AuditError(f"Another process uses the spool {self.path}; give each process its own.") from None
        except OSError as error:
            raise self._unavailable(error) from None
        try:
            self._file = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
            _sync_folder(self.path.parent)
            self._done = 0  # bytes at the beginning that the database has
            self.count = self._repair()
        except OSError as error:
            self._lock.release()
            raise self._unavailable(error) from None

    def append(self, record: Sealed) -> None:
        """Raises AuditUnavailable when the spool or the disk is full; the file is then as it was."""
        body = canonical(record.as_dict())
        line = f"{digest(body)} {body}\n".encode()
        size = os.fstat(self._file).st_size
        if size + len(line) > self.max_bytes:
            raise AuditUnavailable(
                f"The audit database is away and the spool {self.path} is full ({self.count:,} records wait)."
            )
        try:
            _write(self._file, line)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise self._unavailable(error) from None
        self.count += 1

    def waiting(self, most: int) -> tuple[list[Sealed], int]:
        """The oldest records, from at most `most` lines, and what to give to `done` once they are stored."""
        found, at = [], self._done
        for line, end in islice(self._lines(self._done), most):
            at = end
            if (record := _parse(line)) is not None:
                found.append(record)
        return found, at

    def done(self, at: int) -> None:
        """The database has what `waiting` gave; damaged lines among it are put aside now, and once. The file is emptied
        when all is there; until then a crash makes some come twice, which the store does not mind."""
        for line, end in self._lines(self._done):
            if end > at:
                break
            if _parse(line) is None:
                self.put_aside(line)
            self._done = end
            self.count -= 1
        if self._done >= os.fstat(self._file).st_size:
            os.ftruncate(self._file, 0)
            os.fsync(self._file)
            self._done = self.count = 0

    def close(self) -> None:
        """Twice does no harm."""
        if self._file >= 0:  # a number that is closed twice may be another's file by then
            os.close(self._file)
            self._file = -1
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _repair(self) -> int:
        """Cut a torn last line off; returns the number of lines."""
        count = end = 0
        for line, after in self._lines(0):
            if not line.endswith(b"\n"):
                self.put_aside(line)
                break
            count, end = count + 1, after
        os.ftruncate(self._file, end)
        os.fsync(self._file)
        return count

    def _lines(self, start: int) -> Iterator[tuple[bytes, int]]:
        with self.path.open("rb") as file:
            file.seek(start)
            for line in file:
                start += len(line)
                yield line, start

    def put_aside(self, line: bytes) -> None:
        """Keep what cannot be stored in a file of its own, for a person to look at."""
        with self.damaged_path.open("ab") as file:
            file.write(line if line.endswith(b"\n") else line + b"\n")

    def _unavailable(self, error: OSError) -> AuditUnavailable:
        return AuditUnavailable(f"The audit spool {self.path} cannot be written ({error.strerror}).")


def _parse(line: bytes) -> Sealed | None:
    """None for a damaged line."""
    checksum, _, body = line.decode("ascii", "replace").rstrip("\n").partition(" ")
    if digest(body) != checksum:
        return None
    try:
        return Sealed(**json.loads(body))
    except (ValueError, TypeError):
        return None


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _sync_folder(folder: Path) -> None:
    """So that a new file's name survives a power cut. Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
