"""The pages' words, one file a language: words/en.yaml, words/ja.yaml. The same keys in each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.resources import files

import yaml

LANGS = ("en", "ja")


@cache
def words(lang: str) -> dict[str, str]:
    """Key -> text, in which `{name}` stands for a value. lang: one of LANGS."""
    source = files(__package__).joinpath("words", f"{lang}.yaml").read_text(encoding="utf-8")
    found: dict[str, str] = yaml.safe_load(source)
    return found


def chosen(*wishes: str | None) -> str:
    """The first of `wishes` (a language, or an Accept-Language header) that names one of LANGS, else English."""
    for wish in wishes:
        for lang in _liked(wish or ""):
            if lang in LANGS:
                return lang
    return LANGS[0]


def _liked(header: str) -> Iterator[str]:
    """Languages of an Accept-Language header (RFC 9110, 12.5.4), the most liked first."""
    liked = []
    for place, part in enumerate(header[:1000].split(",")):
        tag, _, parameter = part.partition(";")
        name, _, weight = parameter.strip().partition("=")
        try:
            value = float(weight) if name == "q" else 1.0
        except ValueError:
            value = 0.0
        if value > 0:
            liked.append((-value, place, tag.strip().lower().partition("-")[0]))
    return (tag for _, _, tag in sorted(liked))
