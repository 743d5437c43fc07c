"""Libraries that only some commands need: imported when they are, and named when they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from anchorkv.errors import DataError

_PACKAGES = {"yaml": "pyyaml"}
"""Where the package is not called as the module is."""


def library(name: str, what: str) -> Any:
    """The optional module `name`, which reads `what`. Raises DataError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = _PACKAGES.get(name, name.split(".", maxsplit=1)[0])
        raise DataError(f"Reading {what} needs {package}, which is not installed: pip install {package}.") from None
