"""The questions on which the chosen policy differs most from the full cache: what was lost, what recall brought."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from anchorkv.evaluate.run import Record
from anchorkv.evaluate.ways import FULL
from anchorkv.poc.measure import LOST
from anchorkv.poc.results import WorstCase
from anchorkv.poc.verdict import MILDEST

MOST = 8
MOST_OF_AREA = 3
SHOWN = 700
"""Characters of a passage or of what was recalled."""
CUT = " […] "


def worst(full: Mapping[str, Record], chosen: Mapping[str, Record], most: int = MOST) -> tuple[WorstCase, ...]:
    """full, chosen: {document: record} of the full cache and of the chosen policy, of the same documents.

    First come right answers that became wrong in the mildest recall mode, then what costs most: the loss of the right
    answer beside the full cache's. No area has more than its share, and what was never worse is no case.
    """
    cases = sorted(_cases(full, chosen), key=lambda case: case[:2], reverse=True)
    taken: list[WorstCase] = []
    for _, _, case in cases:
        if sum(other.area == case.area for other in taken) < MOST_OF_AREA and len(taken) < most:
            taken.append(case)
    return tuple(taken)


def _cases(full: Mapping[str, Record], chosen: Mapping[str, Record]) -> Iterable[tuple[bool, float, WorstCase]]:
    for document, mine in chosen.items():
        theirs = full.get(document)
        if theirs is None:
            continue
        for asked, answered in zip(theirs["questions"], mine["questions"], strict=True):
            yardstick, answers = asked["answers"]["off"], answered["answers"]
            mildest = answers[min(answers, key=MILDEST.index)]
            lost = yardstick["correct"] and not mildest["correct"]
            dearer = mildest["answer_loss"] - yardstick["answer_loss"]
            if lost or dearer > 0:
                yield lost, dearer, _case(document, mine["area"], asked, answered)


def _case(document: str, area: str, asked: Mapping[str, Any], answered: Mapping[str, Any]) -> WorstCase:
    answers = answered["answers"]
    recalled = next((answers[mode]["recalled"] for mode in reversed(MILDEST) if mode in answers), "")
    return WorstCase(
        area=area, document=document, question=answered["question"], expected=answered["accepted"][0],
        full_answer=asked["answers"]["off"]["answer"],
        answers={mode: given["answer"] for mode, given in answers.items()},
        correct={FULL: asked["answers"]["off"]["correct"], **{mode: a["correct"] for mode, a in answers.items()}},
        lost=_around(answered["passage"], answered["accepted"][0]),
        kept=_around(answered["kept"], "") if answered["kept"].strip(f"{LOST} \n") else "",
        recalled=_around(recalled, answered["passage"] or answered["accepted"][0]),
    )


def _around(text: str, wanted: str) -> str:
    """At most SHOWN characters of `text`, those about `wanted` where it stands in there."""
    text = text.strip()
    if len(text) <= SHOWN:
        return text
    at = max(0, text.find(wanted[:40])) if wanted else 0
    first = max(0, min(at - SHOWN // 4, len(text) - SHOWN))
    part = text[first : first + SHOWN]
    return (CUT.lstrip() if first else "") + part + (CUT.rstrip() if first + SHOWN < len(text) else "")
