"""The model card of a trained adapter: what it is, what it was made of, what was measured, and what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from anchorkv.models import builtin
from anchorkv.train.curves import Row
from anchorkv.train.sources import Recipe
from anchorkv.train.trainer import Settings

CARD = "README.md"
BUILTIN_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
FIGURES = (
    ("perplexity, full cache", "perplexity_full", "{:.2f}"),
    ("perplexity, anchored", "perplexity_anchored", "{:.2f}"),
    ("perplexity, no memory", "perplexity_no_memory", "{:.2f}"),
    ("ratio, anchored / full cache", "ratio", "{:.3f}"),
    ("**context recovered**", "context_recovered", "{:.1%}"),
    ("times fewer cells at a document's end", "reduction", "{:.1f}"),
)
_WORSE = 1.005
"""The full cache's perplexity may rise this much before the card calls it a loss."""


def card(settings: Settings, rows: Sequence[Row], documents: str, tokens: int, planned: int) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    rows: the log, by step. documents: what validation reads, to begin a sentence with. tokens: trained, of `planned`.
    """
    recipe, base = Recipe.load(settings.data), base_name(settings.model)
    validations = [row for row in rows if "perplexity_anchored" in row]
    first, last = (validations[0], validations[-1]) if validations else (None, None)
    environment = Environment(
        loader=PackageLoader("anchorkv", "train"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(
        header=_header(settings, recipe, base), name=f"{base.rpartition('/')[2]}, anchored", base=base,
        builtin=settings.model == str(builtin()), settings=settings, policy=settings.policy,
        start=Path(settings.start).name if settings.start else "", sources=recipe.sources,
        weights=sum(source.weight for source in recipe.sources), documents=documents, tokens=tokens, planned=planned,
        first=first, last=last, first_name=_when(first), figures=FIGURES, number=number, cell=cell,
        recovered=last["context_recovered"] if last else None,
        not_better=first is not last and _above(first, last, "context_recovered", 1),
        worse_whole=_above(last, first, "perplexity_full", _WORSE),
    )


def base_name(model: str) -> str:
    """The model as a card may name it: a hub id, or a local file's or folder's own name without its place."""
    path = Path(model).expanduser()
    if model == str(builtin()):
        return BUILTIN_BASE
    if path.exists():
        return path.resolve().name
    return "/".join(model.split("/")[:2])  # a GGUF file on the hub is owner/repository/file


def number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def cell(text: str) -> str:
    """`text` as it may stand in a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _header(settings: Settings, recipe: Recipe, base: str) -> str:
    """YAML, whose values may be written as JSON."""
    datasets = sorted({source.dataset for source in recipe.sources if source.dataset})
    fields: dict[str, Any] = {
        "base_model": base, "base_model_relation": "adapter" if settings.rank else "finetune",
        "library_name": "peft" if settings.rank else "transformers", "pipeline_tag": "text-generation",
        "license": "other", "license_name": "those-of-the-base-model-and-the-data",
        "tags": ["anchorkv", "kv-cache", "kv-cache-compression", *(["lora"] if settings.rank else [])],
        **({"datasets": datasets} if datasets else {}),
    }
    return "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items())


def _when(row: Row | None) -> str:
    return f"after {row['tokens']:,} tokens" if row and row["tokens"] else "at the start"


def _above(one: Row | None, other: Row | None, name: str, times: float) -> bool:
    """Whether the figure `name` of `one` is at least `times` that of `other`."""
    if one is None or other is None or one[name] is None or other[name] is None:
        return False
    return bool(one[name] >= times * other[name])
