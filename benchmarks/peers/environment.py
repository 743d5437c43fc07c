"""An environment of the peers' own: they need other versions of the same libraries than anchorkv does."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
STAMP = "requirements.sha256"
"""Written last, so that a folder without it is half-built."""


class PeerFailed(Exception):
    """The other methods' environment could not be built; says why."""


def environment(folder: Path, say: Callable[[str], None]) -> Path:
    """The Python of a virtual environment at `folder` that holds requirements.txt; built there unless it is.

    say: called with every line of progress. Building takes some minutes. A half-built environment, or one of other
    requirements, is built anew. Raises PeerFailed with pip's last lines, or when `folder` holds something else.
    """
    # Not resolved: the link that a virtual environment has for its Python is what makes it one.
    folder = folder.expanduser().absolute()
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / STAMP
    if python.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == wanted:
        return python
    _clear(folder)
    say(f"building the other methods' environment in {folder}")
    _step([sys.executable, "-m", "venv", str(folder)], say, "The other methods' environment cannot be made")
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-r", str(REQUIREMENTS)]
    _step(install, say, "The other methods cannot be installed")
    stamp.write_text(wanted + "\n", encoding="utf-8")
    return python


def _clear(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file()):
        raise PeerFailed(f"{folder} is no Python environment and will not be overwritten; name another folder.")
    shutil.rmtree(folder)


def _step(command: Sequence[str], say: Callable[[str], None], failure: str) -> None:
    code, last = run(command, say)
    if code != 0:
        raise PeerFailed("\n".join([f"{failure} (exit code {code}):", *last]))


def run(command: Sequence[str], say: Callable[[str], None]) -> tuple[int, list[str]]:
    """(exit code, its last lines), standard error among them."""
    last: deque[str] = deque(maxlen=8)
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
        ) as process:
            for line in process.stdout or ():
                if line.strip():
                    last.append(line.rstrip())
                    say(line.rstrip())
    except OSError as error:
        return 1, [f"{command[0]}: {error.strerror}"]
    return process.returncode, list(last)
