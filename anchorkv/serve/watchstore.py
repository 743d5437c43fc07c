"""What the watch remembers over a restart: a small SQLite file with a bounded number of rows."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from anchorkv.errors import SavedStateError

log = logging.getLogger("anchorkv.serve")
KEPT = 2000
"""Newest checks and alarms that are kept, of each kind of entry."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS state (kind TEXT, name TEXT, value TEXT NOT NULL, PRIMARY KEY (kind, name));
CREATE TABLE IF NOT EXISTS entry (number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, value TEXT NOT NULL);
"""


class WatchStore:
    """`state` holds named values, which are replaced; `entry` a list of the newest. Thread-safe."""

    def __init__(self, path: str | Path | None = None) -> None:
        """None: in memory. A damaged file is set aside, for estimates can be made again.

        Raises SavedStateError when the file cannot be used at all.
        """
        self._path = None if path is None else Path(path)
        self._lock = threading.Lock()
        try:
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            self._db = self._opened()
        except (OSError, sqlite3.Error) as error:
            raise SavedStateError(f"The watch's file {path} cannot be used ({error}); check the data folder.") from None

    def _opened(self) -> sqlite3.Connection:
        try:
            return _open(self._path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) or self._path is None:
                raise
            log.error("the watch's file %s is damaged and was set aside; it begins anew: %s", self._path, error)
            for end in ("-wal", "-shm"):
                self._path.with_name(self._path.name + end).unlink(missing_ok=True)
            self._path.replace(self._path.with_name(self._path.name + ".damaged"))
            return _open(self._path)

    def save(
        self, kind: str, values: Mapping[str, Any], gone: Iterable[str] = (), entries: Iterable[tuple[str, Any]] = ()
    ) -> None:
        """Replace named values, forget those `gone`, and append `entries` (kind, value): all of it or nothing.

        Raises SavedStateError when it cannot be written, a full disk for one.
        """
        with self._lock:
            try:
                with self._db:
                    self._db.executemany(
                        "INSERT INTO state VALUES (?, ?, ?) "
                        "ON CONFLICT (kind, name) DO UPDATE SET value = excluded.value",
                        [(kind, name, json.dumps(value)) for name, value in values.items()],
                    )
                    self._db.executemany("DELETE FROM state WHERE kind = ? AND name = ?", [(kind, n) for n in gone])
                    for entry, value in entries:
                        self._db.execute("INSERT INTO entry (kind, value) VALUES (?, ?)", (entry, json.dumps(value)))
                        self._db.execute(
                            "DELETE FROM entry WHERE kind = ? AND number <= (SELECT number FROM entry WHERE kind = ? "
                            "ORDER BY number DESC LIMIT 1 OFFSET ?)", (entry, entry, KEPT),
                        )
            except sqlite3.Error as error:
                raise SavedStateError(f"The watch's figures cannot be saved now ({error}).") from None

    def load(self, kind: str) -> dict[str, Any]:
        """The named values of a kind, in the order in which they were first saved."""
        with self._lock:
            rows = self._db.execute("SELECT name, value FROM state WHERE kind = ? ORDER BY rowid", (kind,)).fetchall()
        return {name: json.loads(value) for name, value in rows}

    def newest(self, kind: str, count: int) -> list[Any]:
        """Entries, the newest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT value FROM entry WHERE kind = ? ORDER BY number DESC LIMIT ?", (kind, count)
            ).fetchall()
        return [json.loads(value) for (value,) in rows]

    def close(self) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.close()


def _open(path: Path | None) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:" if path is None else str(path), check_same_thread=False, timeout=5.0)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(_SCHEMA)
        db.execute("SELECT count(*) FROM state").fetchone()
    except sqlite3.Error:
        db.close()
        raise
    return db
