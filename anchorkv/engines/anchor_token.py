"""Which token is <AC> on a model that was not trained with one: the same on every engine."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

AC = "<AC>"
"""What the paper's models call it (AnLLM, arXiv 2402.07616, section 3.2)."""
_SPARE = re.compile(r"reserved|unused|extra|spare|placeholder|repo_?name|file_?name|file_sep|gh_stars", re.IGNORECASE)
"""Names of control tokens that ordinary text and chat never use."""


def stand_in(control: Mapping[str, int], used: Collection[int]) -> int | None:
    """The lowest spare id among `control` tokens (text to id) that has no other use; None where there is none."""
    spare = [token for text, token in control.items() if token not in used and _SPARE.search(text)]
    return min(spare, default=None)
