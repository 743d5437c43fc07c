"""The bundled sample documents: real, freely licensed texts of six business areas, with questions on them.

What each text is, where it is from and its licence: README.md beside this file.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def folder() -> Path:
    """The folder of the documents: one sub-folder an area, UTF-8 text files in it, and nothing else."""
    return _here() / "documents"


def questions() -> Path:
    """The questions on them: JSON lines of question, answers (accepted ones, the first as it stands in the text) and
    document ("area/file.txt")."""
    return _here() / "questions.jsonl"


def _here() -> Path:
    # A wheel is installed as files, so this is a path; a zip is not supported.
    return Path(str(files(__name__)))
