"""The sentences of a text, by the project's own segmenter, fed character by character."""

from __future__ import annotations

import re

from anchorkv.config import AnchorConfig
from anchorkv.segment import split

JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
"""A character of Japanese text, punctuation left out."""
_SENTENCES = AnchorConfig(min_segment=1, max_segment=1200, anchors=())
AROUND = 1500
"""Characters before a place that are read to find its sentence."""


def sentences(text: str) -> list[str]:
    """All of `text`, cut where its sentences and free-standing lines end."""
    cut = split(map(ord, text), _SENTENCES, lambda character: chr(character).encode("utf-8", "replace"))
    return ["".join(map(chr, part)) for part in cut]


def sentence_at(text: str, start: int, end: int) -> str:
    """The sentences of `text` that hold [start, end), without space around them."""
    first = max(0, start - AROUND)
    first = max(first - AROUND, text.rfind("\n", 0, first) + 1)  # a line's beginning tells what the line is
    at, found = first, ""
    for sentence in sentences(text[first : end + AROUND]):
        if at < end and at + len(sentence) > start:
            found += sentence
        at += len(sentence)
        if at >= end:
            break
    return found.strip()
