"""The command line: `anchorkv run`, `chat`, `inspect` and `models`; one module a command."""

from anchorkv.cli.app import app, main

__all__ = ["app", "main"]
