"""A place in report.json: its value and the way to it, so that whatever a page shows can be traced back and checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup, escape


class Place:
    """`Place(report.model_dump(mode="json"))`, then fields and items as in JSON: `place.areas[0].name`.

    raw: the value there. where: the way there, a JSON pointer (RFC 6901). Put into a page it is its text, escaped.
    """

    def __init__(self, raw: Any, where: str = "") -> None:
        self.raw = raw
        self.where = where

    def __getattr__(self, name: str) -> Place:
        try:
            return self[name]
        except (KeyError, TypeError):
            raise AttributeError(f"{self.where or 'the report'} has no field {name!r}") from None

    def __getitem__(self, key: str | int) -> Place:
        return Place(self.raw[key], f"{self.where}/{str(key).replace('~', '~0').replace('/', '~1')}")

    def __iter__(self) -> Iterator[Place]:
        """Of a list its items, of an object its values."""
        keys = self.raw if isinstance(self.raw, dict) else range(len(self.raw))
        return (self[key] for key in keys)

    def __len__(self) -> int:
        return len(self.raw)

    def __bool__(self) -> bool:
        return bool(self.raw)

    def __eq__(self, other: object) -> bool:
        return bool(self.raw == (other.raw if isinstance(other, Place) else other))

    def __hash__(self) -> int:
        return hash(self.where)

    def __str__(self) -> str:
        return str(self.raw)

    def __html__(self) -> Markup:
        return escape(self.raw)

    @property
    def number(self) -> Place:
        """The number itself where this is a figure with a standard error."""
        return self["value"] if isinstance(self.raw, dict) else self


def at(raw: Any, pointer: str) -> Any:
    """The value that a JSON pointer names. Raises KeyError or IndexError where there is none."""
    for key in pointer.split("/")[1:]:
        raw = raw[int(key)] if isinstance(raw, list) else raw[key.replace("~1", "/").replace("~0", "~")]
    return raw
