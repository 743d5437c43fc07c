"""The checkpoints of the paper (AnLLM, arXiv 2402.07616): which preset each was trained for. See docs/paper-models.md.

Nothing in their files says "AnLLM": an EP model is known by its name alone, an AC model's folder by its `<AC>` too.
"""

from __future__ import annotations

import re
from pathlib import Path

from anchorkv.engines.anchor_token import AC
from anchorkv.engines.base import Engine, Tokenizer
from anchorkv.errors import ModelError

_PRESETS = {"AC": "paper-ac", "EP": "anllm-ep"}
_NAME = re.compile(r"AnLLM-(AC|EP)-\d+B(?![A-Za-z0-9])", re.IGNORECASE)


def paper_preset(source: Path, engine: Engine) -> str | None:
    """The preset for the model that was loaded from `source` (hub id, folder or GGUF file), None when it is no AnLLM.

    Raises ModelError when it is named after an AC checkpoint but its tokenizer has no `<AC>`.
    """
    if engine.info.architecture != "llama":
        return None
    found = _NAME.match(_name(source))
    kind = found[1].upper() if found else ""
    if kind == "AC" and not has_ac(engine.tokenizer):
        raise ModelError(
            f"The tokenizer of {source} has no {AC} token, which AnLLM-AC models need (is added_tokens.json missing?); "
            "complete it or name a policy."
        )
    # A GGUF file with an <AC> is more likely one of our own, whose policy is in its metadata or up to the user.
    if not kind and source.suffix.lower() != ".gguf" and has_ac(engine.tokenizer):
        kind = "AC"
    return _PRESETS.get(kind)


def has_ac(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has an `<AC>` of its own, not a stand-in."""
    ids = tokenizer.encode(AC, special=True)
    return len(ids) == 1 and ids == [tokenizer.anchor_id()]


def _name(source: Path) -> str:
    """The last component; in the hub's cache (models--owner--name/snapshots/revision) the repository's name."""
    path = source.absolute()
    return path.parents[1].name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name
