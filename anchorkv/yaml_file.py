"""YAML files that people write: read, and where they are wrong the line is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anchorkv.errors import ConfigError
from anchorkv.optional import library


def load_yaml(path: Path, what: str) -> Any:
    """The content of `path`; what: its kind, for whoever lacks the library.

    Raises ConfigError with file and line for what is no YAML; OSError and UnicodeDecodeError as reading does, for the
    caller knows what to advise; DataError where pyyaml is not installed.
    """
    yaml = library("yaml", what)
    text = path.read_text(encoding="utf-8")
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or type(error).__name__
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where} is not YAML ({problem}); mend it there.") from None
