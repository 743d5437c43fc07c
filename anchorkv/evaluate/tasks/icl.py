"""How accuracy and cost grow with the number of demonstrations, the full cache beside anchors.

Each number of demonstrations begins with those of the smaller ones. The defaults are two benchmarks that a small model
answers well above chance, so that there is something to lose, and whose demonstrations are short (32 and 43 tokens on
average with the built-in model's tokenizer; BoolQ's have 150), so that 64 of them fit its window: ARC-easy asks for
facts, PIQA for everyday sense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anchorkv.evaluate.tasks.qa import QA
from anchorkv.evaluate.ways import FULL


@dataclass(frozen=True)
class ICL(QA):
    """`tasks/qa.py` over the number of demonstrations; its rows are the same."""

    name: ClassVar[str] = "icl"
    policies: ClassVar[tuple[str, ...]] = (FULL, "default", "default:reduction=24")
    columns: ClassVar[tuple[tuple[str, str, object], ...]] = (
        ("benchmark", "benchmark", ""), ("demonstrations", "shots", ""), ("policy", "policy", ""),
        ("accuracy", "accuracy", ".1%"), ("to full", "difference", "+.1%"),
        ("their tokens", "demonstration_tokens", ""), ("cells kept", "demonstration_cells", ""),
        ("s to read them", "demonstration_seconds", ".2f"), ("s a question", "seconds_per_question", ".3f"),
        ("tokens before it", "prompt_tokens", ",.0f"),
    )

    shots: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    benchmarks: tuple[str, ...] = ("arc_easy", "piqa")
    reread_questions: int = 0
