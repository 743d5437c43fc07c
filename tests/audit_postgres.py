"""A PostgreSQL of one's own for tests: made in a temporary folder, reached by a socket in it, stopped at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest


def binaries() -> Path:
    """Where initdb and postgres lie. Skips the test where there are none, and fails it on CI, which must have them."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders:
        reason = "PostgreSQL is not installed (apt-get install postgresql)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folders[-1]


class Postgres:
    """One cluster. `start` and `stop` may be called again and again, `freeze` makes it hang until `thaw`."""

    def __init__(self) -> None:
        self.bin = binaries()
        self.folder = Path(tempfile.mkdtemp(prefix="anchorkv-postgres-"))
        self.user = "postgres" if os.geteuid() == 0 else None
        if self.user:  # the server refuses to run as root
            shutil.chown(self.folder, self.user)
        self.data = self.folder / "data"
        self._run("initdb", "-D", self.data, "-A", "trust", "-U", "audit", "-E", "UTF8", "--no-sync", "--locale=C")
        self.url = f"postgresql://audit@/postgres?host={self.folder}"

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c shared_buffers=16MB -c max_connections=40"
        self._run("pg_ctl", "start", "-w", "-D", self.data, "-l", self.folder / "log", "-o", options)

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-w", "-D", self.data, "-m", "immediate")

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def sql(self, statement: str) -> str:
        return self._run("psql", "-h", self.folder, "-U", "audit", "-Atc", statement, "postgres")

    def schema(self, name: str) -> str:
        """The URL of a new, empty schema; a database of its own would be three hundred files each time."""
        self.sql(f"CREATE SCHEMA {name}")
        return f"{self.url}&options=-csearch_path%3D{name}"

    def remove(self) -> None:
        if (self.data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _signal(self, what: signal.Signals) -> None:
        first = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))
        for process in [first, *first.children(recursive=True)]:
            process.send_signal(what)

    def _run(self, program: str, *arguments: object) -> str:
        command = [str(self.bin / program), *map(str, arguments)]
        if self.user:
            command = ["runuser", "-u", self.user, "--", *command]
        # pg_ctl's server keeps the pipes open, so they must not be waited for: a file takes what it says.
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, cwd="/", timeout=60, check=False)
            said.seek(0)
            text = said.read().decode(errors="replace")
        if done.returncode:
            raise RuntimeError(f"{program} failed: {text}")
        return text.strip()
