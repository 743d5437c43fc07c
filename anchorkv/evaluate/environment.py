"""What a result was measured with: versions, the machine, the weights. Without these a figure says little."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import anchorkv
from anchorkv.evaluate.run import Models
from anchorkv.evaluate.ways import Way

PACKAGES = ("llama-cpp-python", "numpy", "torch", "transformers", "lm_eval")


def environment() -> dict[str, Any]:
    """Versions of what is installed, processor, cores, memory in bytes (None where unknown), system, and the date."""
    return {
        "versions": {
            "anchorkv": anchorkv.__version__, "python": platform.python_version(),
            **{name: found for name in PACKAGES if (found := _version(name))},
        },
        "hardware": {
            "processor": _processor(), "cores": os.cpu_count(), "usable_cores": _usable_cores(), "memory": _memory(),
            "system": platform.platform(),
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def models_of(models: Models, ways: Iterable[Way]) -> list[dict[str, Any]]:
    """The models that these ways ran on, each with its fingerprint, its weights and the names of its ways."""
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        model = models.of(way)
        info = model.engine.info
        entry = found.setdefault(info.fingerprint, {
            "name": info.name, "fingerprint": info.fingerprint, "weights": info.weights, "adapter": model.adapter,
            "engine": model.engine.name, "architecture": info.architecture, "window": info.window,
            "cell_bytes": info.cell_bytes, "ways": [],
        })
        entry["ways"].append(way.name)
    return list(found.values())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _usable_cores() -> int | None:
    """Cores that this process may use: fewer than there are in many containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on every system
        return None


def _processor() -> str:
    """The name that the processor is sold by, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            return asked.stdout.strip()
    return platform.processor() or platform.machine()
