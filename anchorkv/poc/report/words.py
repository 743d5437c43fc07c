"""The report's words, one file a language (words/en.yaml, words/ja.yaml), and how each writes its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import yaml
from markupsafe import Markup, escape

from anchorkv.poc.report.numbers import KINDS

LANGS = ("en", "ja")


class Words:
    """A language's words. `w("section.name", count=3)` is the text under that key with `{count}` filled in.

    The text is escaped, and so is every value that is no Markup. Raises KeyError for a key that is not there.
    """

    def __init__(self, lang: str) -> None:
        source = files(__package__).joinpath("words", f"{lang}.yaml").read_text(encoding="utf-8")
        self.lang = lang
        self.texts = dict(_flat(yaml.safe_load(source)))

    def __call__(self, key: str, /, **values: Any) -> Markup:
        text = escape(self.texts[key])
        return text.format(**values) if values else text

    def __contains__(self, key: str) -> bool:
        return key in self.texts

    def under(self, section: str) -> dict[str, str]:
        """All texts of a section, by the rest of their keys: what a script is given as JSON."""
        start = f"{section}."
        return {key.removeprefix(start): text for key, text in self.texts.items() if key.startswith(start)}

    def join(self, parts: list[Any]) -> Markup:
        """A list within a sentence."""
        return escape(self.texts["format.comma"]).join(parts)

    def number(self, value: float | None, kind: str, finer: int = 0, currency: str = "") -> str:
        """`value` as a reader of this language expects it. kind: a key of `numbers.KINDS`; finer: further decimals."""
        if value is None:
            return self.texts["format.unknown"]
        unit, amount = KINDS[kind](value, finer)
        sign = self.texts.get(f"currency.{currency}", f"{currency}\N{NO-BREAK SPACE}")
        return self.texts[f"unit.{unit}"].format(n=amount, currency=sign)


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
