"""`anchorkv lm-eval …`: lm-eval's own command line, which knows the model "anchorkv" and this package's task files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from anchorkv.errors import ConfigError

SETTINGS: dict[str, Any] = {
    "add_help_option": False,  # --help is lm-eval's too
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
"""How the command is registered: everything behind its name goes to lm-eval."""
_INCLUDE = "--include_path"


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with the model [b]anchorkv[/b]: anchorkv lm-eval run --model anchorkv --tasks anchorkv_qa …"""
    from anchorkv.evaluate.tasks.qa import lm_eval_version

    lm_eval_version()
    from lm_eval.__main__ import cli_evaluate

    import anchorkv.evaluate.harness  # noqa: F401  # registers the model

    sys.argv = ["lm-eval", *with_task_files(context.args)]
    try:
        cli_evaluate()
    except ValueError as error:  # how lm-eval says what is wrong with what it was given
        raise ConfigError(f"lm-eval: {error}") from None


def with_task_files(arguments: Sequence[str]) -> list[str]:
    """`arguments` of lm-eval, its task folder being this package's where they name none."""
    from anchorkv.evaluate.tasks.qa import TASK_FILES

    if not arguments or any(argument.split("=")[0] == _INCLUDE for argument in arguments):
        return list(arguments)
    takes = arguments[0] in ("run", "ls", "validate") or (arguments[0].startswith("-") and len(arguments) > 1)
    return [*arguments, *([_INCLUDE, str(TASK_FILES)] if takes else [])]
