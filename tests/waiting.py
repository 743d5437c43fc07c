"""Waiting for what happens in another thread or process."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def listening(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address of an `anchorkv serve` that writes to `log`, once it has said all that it says at its start."""
    for _ in range(600):
        told = log.read_text()
        if "Listening on " in told and "Audit records" in told:
            return told.split("Listening on ")[1].split("\n")[0].removesuffix("/v1")
        assert process.poll() is None, told
        time.sleep(0.1)
    raise AssertionError(log.read_text())
