"""A command of the program as a user types it: what it prints, and how it refuses."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from anchorkv.cli.app import app

_runner = CliRunner()


class Command:
    """`start`: its words; `environment`: what every call of it has."""

    def __init__(self, *start: str, **environment: str) -> None:
        self._start, self._environment = start, environment

    def __call__(self, *arguments: object, code: int = 0, **environment: str) -> Any:
        result = _runner.invoke(
            app, [*self._start, *map(str, arguments)], env={**self._environment, **environment},
        )
        assert result.exit_code == code, f"{result.output}{result.exception!r}"
        return result

    def refused(self, *arguments: object) -> str:
        """The one sentence on standard error of a command that exits with code 2."""
        result = self(*arguments, code=2)
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        return str(result.stderr)
