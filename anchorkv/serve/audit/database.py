"""Connections to the audit database: SQLite or PostgreSQL, one deadline, one kind of error."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from anchorkv.serve.audit.errors import AuditError, AuditUnavailable

_KINDS = {"sqlite": "sqlite", "postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg"}


def database_url(where: str | Path) -> URL:
    """The URL of a SQLite file's path, or of a URL as it stands. Raises AuditError for what is neither."""
    if "://" not in str(where):
        url = URL.create("sqlite", database=str(Path(where).expanduser()))
    else:
        try:
            url = make_url(str(where))
        except (ArgumentError, ValueError):
            raise AuditError("The audit database's URL cannot be read; write postgresql://user@host/name.") from None
        backend = url.get_backend_name()
        if backend not in _KINDS:
            raise AuditError(f"The audit trail is kept in SQLite or PostgreSQL, not in {backend}.")
        url = url.set(drivername=_KINDS[backend])
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise AuditError("The audit trail must be kept in a file; name its path.")
    return url


class Database:
    """Read and write transactions, each of them within `timeout` seconds or AuditUnavailable."""

    def __init__(self, url: URL, timeout: float) -> None:
        self.url, self.timeout = url, timeout
        self.sqlite = url.get_backend_name() == "sqlite"
        self._engine = _sqlite(url, timeout) if self.sqlite else _postgresql(url, timeout)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database."""
        options = {} if self.sqlite else {"isolation_level": "REPEATABLE READ"}
        with self._transaction(**options) as connection:
            yield connection

    @contextmanager
    def writing(self, slow: bool = False) -> Iterator[Connection]:
        """A transaction that is committed at the end. slow: takes as long as it takes, for work on many rows."""
        with self._transaction(writes=True) as connection:
            if slow and not self.sqlite:
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            yield connection

    @contextmanager
    def _transaction(self, **options: Any) -> Iterator[Connection]:
        try:
            with self._engine.connect().execution_options(**options) as connection, connection.begin():
                yield connection
        except (DBAPIError, PoolTimeout) as error:
            raise AuditUnavailable(f"The audit database {self} cannot be used ({_reason(error)}).") from error

    @contextmanager
    def deadline(self, connection: Connection) -> Iterator[None]:
        """Cut the connection when the block takes longer than the server's own timeout would allow: a server that
        hangs keeps no timeout."""
        if self.sqlite:
            yield
            return
        guard = _Guard(connection.connection.dbapi_connection, self.timeout + 0.5)
        try:
            yield
        finally:
            guard.end()

    def checkpoint(self) -> None:
        """SQLite: move everything out of the write-ahead log, which else still holds what was overwritten."""
        with self._engine.connect() as connection:
            connection.connection.driver_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[union-attr]

    def close(self) -> None:
        self._engine.dispose()

    def __str__(self) -> str:
        return str(self.url.database) if self.sqlite else self.url.render_as_string(hide_password=True)


class _Guard:
    """Shuts a connection's socket down after `seconds`, unless `end` comes first."""

    def __init__(self, connection: Any, seconds: float) -> None:
        self._connection, self._lock, self._ended = connection, threading.Lock(), False
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def _cut(self) -> None:
        with self._lock:
            if not self._ended and not self._connection.closed:
                with socket.socket(fileno=os.dup(self._connection.fileno())) as handle:
                    handle.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        with self._lock:
            self._ended = True
        self._timer.cancel()


def _reason(error: Exception) -> str:
    """The driver's first line, on one line."""
    cause = getattr(error, "orig", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")


def _sqlite(url: URL, timeout: float) -> Engine:
    engine = create_engine(url, connect_args={"timeout": timeout})

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's own BEGIN below, or a write might begin as a read
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk before it is acknowledged
        connection.execute("PRAGMA secure_delete = ON")  # what retention takes away is overwritten

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(url: URL, timeout: float) -> Engine:
    engine = create_engine(
        url, connect_args={"connect_timeout": max(2, ceil(timeout))}, pool_size=4, max_overflow=4, pool_timeout=timeout
    )
    limit = max(1, round(timeout * 1000))

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET statement_timeout = {limit}")
            cursor.execute(f"SET lock_timeout = {limit}")
            # A database that is set to acknowledge before it has written would lose records in a crash.
            cursor.execute(
                "SELECT set_config('synchronous_commit', 'on', false) "
                "WHERE current_setting('synchronous_commit') = 'off'"
            )
        connection.commit()

    return engine
