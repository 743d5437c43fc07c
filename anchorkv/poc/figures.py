"""From a run's records to figures with their standard errors: one WayResult a policy and recall mode.

A way is compared with the full cache on the documents and questions that both have, pair by pair. Ratios of sums have
the bootstrap's standard error; means of n = 1 have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from anchorkv.config import RecallMode
from anchorkv.engines.base import Ints
from anchorkv.evaluate.losses import context_recovered
from anchorkv.evaluate.run import Record
from anchorkv.evaluate.statistics import Estimate, Numbers, bootstrap, mean
from anchorkv.evaluate.tasks.perplexity import perplexity, ratio
from anchorkv.evaluate.timing import rate, ratio_of_medians
from anchorkv.evaluate.ways import FULL, Way
from anchorkv.poc.answers import agrees
from anchorkv.poc.results import Answering, Cells, Figure, Remark, Speed, WayResult
from anchorkv.poc.speed import DECODE, FIRST_TOKEN, PREFILL

NONE = Figure()
Pairs = Sequence[tuple[Record, Record]]
"""Records of the same documents: (of the way, of the full cache)."""


# --- the records of a run ------------------------------------------------------------------------------------------


@dataclass
class Found:
    """A run's records that are no failures, by way and document, and what is to be said of the failures."""

    records: Iterable[Record]
    documents: dict[str, dict[str, Record]] = field(default_factory=dict)
    grounds: dict[str, dict[str, Record]] = field(default_factory=dict)
    speeds: dict[str, dict[str, Record]] = field(default_factory=dict)
    failed: list[Remark] = field(default_factory=list)

    def __post_init__(self) -> None:
        tasks = {"document": self.documents, "ground": self.grounds, "speed": self.speeds}
        for record in self.records:
            if "error" in record:
                item, task, way, why = (str(record[name]) for name in ("item", "task", "way", "error"))
                self.failed.append(Remark(
                    text=f"{item} ({task}, {way}): {why}", key=f"failed_{task}",
                    values={"path": item, "way": way, "why": why},
                ))
            else:
                tasks[record["task"]].setdefault(record["way"], {})[record["item"]] = record

    def measured(self, ways: Sequence[Way]) -> list[str]:
        """Documents that the full cache has read, and some policy where there are any."""
        policies = [self.documents.get(way.name, {}) for way in ways if way.name != FULL]
        full = self.documents.get(FULL, {})
        return [item for item in full if not policies or any(item in mine for mine in policies)]


def way_results(found: Found, ids: Sequence[str], ways: Sequence[Way]) -> tuple[WayResult, ...]:
    """Of these documents: the full cache, then every policy that read some of them, in each of its recall modes."""
    full = found.documents[FULL]
    results = []
    for way in ways:
        mine = found.documents.get(way.name, {})
        shared = [item for item in ids if item in mine and item in full]
        pairs = [(mine[item], full[item]) for item in shared]
        asked: list[list[RecallMode]] = [list(q["answers"]) for record, _ in pairs for q in record["questions"]]
        modes: list[RecallMode] = asked[0] if asked else ["off"]
        none = [found.grounds.get(way.ground.name, {}).get(item) for item in shared]
        speeds = _speeds(found, way, ids, ways)
        if pairs:  # what a text costs to read does not depend on recall
            text = _text_figures(pairs, none, way.name == FULL)
            results += [_way_result(way.name, mode, pairs, text, speeds) for mode in modes]
    return tuple(results)


def _speeds(found: Found, way: Way, ids: Sequence[str], ways: Sequence[Way]) -> list[Record]:
    """The full cache's times are those of any policy that took turns with it: the first one's."""
    names = [way.name] if way.name != FULL else [other.name for other in ways if other.name in found.speeds][:1]
    return [found.speeds[name][item] for name in names if name in found.speeds for item in ids
            if item in found.speeds[name]]


def _text_figures(pairs: Pairs, none: Sequence[Record | None], full: bool) -> dict[str, Figure]:
    ours, theirs = (_joined(record["blocks"] for record in side) for side in zip(*pairs, strict=True))
    return {
        "perplexity": _drawn(perplexity, ours), "perplexity_ratio": _drawn(ratio, ours, theirs),
        "context_recovered": Figure(value=1.0, n=len(pairs)) if full else _recovered(none, pairs),
    }


def _way_result(
    name: str, mode: RecallMode, pairs: Pairs, text: dict[str, Figure], speeds: Sequence[Record]
) -> WayResult:
    cells = [_cells(record, mode) for record, _ in pairs]
    size = pairs[0][0]["cell_bytes"]
    ends, peaks = ([cell[at] for cell in cells] for at in (0, 1))
    end_bytes, peak_bytes = ([held * size for held in side] for side in (ends, peaks))
    return WayResult(
        policy=name, recall=mode,
        cells=Cells(
            end_cells=_mean(ends), peak_cells=_mean(peaks), end_bytes=_mean(end_bytes), peak_bytes=_mean(peak_bytes)
        ),
        reduction=_of_sums([record["full_cells"] for record, _ in pairs], ends),
        speed=_speed(speeds, mode, name == FULL), **text, answering=_answering(pairs, mode),
    )


# --- figures -------------------------------------------------------------------------------------------------------


def figure(estimate: Estimate) -> Figure:
    """None where an estimate is unknown."""
    value, stderr = ((float(x) if math.isfinite(x) else None) for x in (estimate.value, estimate.stderr))
    return Figure(value=value, stderr=stderr, n=estimate.n)


def _mean(values: Sequence[float]) -> Figure:
    return figure(mean(values))


def _drawn(of: Callable[..., float], *sides: Numbers) -> Figure:
    """`of` the sides' blocks [n, 2], the same ones drawn on all sides."""
    n = len(sides[0])
    if not n:
        return NONE
    return figure(Estimate(of(*sides), bootstrap(lambda at: of(*(side[at] for side in sides)), n), n))


def _of_sums(above: Sequence[float], below: Sequence[float]) -> Figure:
    """sum(above) / sum(below), pair by pair; unknown where the lower sum is 0."""
    top, bottom = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)

    def share(at: Ints) -> float:
        return float(top[at].sum() / bottom[at].sum()) if bottom[at].any() else math.nan

    if not bottom.any():
        return Figure(n=len(bottom))
    return figure(Estimate(share(np.arange(len(top))), bootstrap(share, len(top)), len(top)))


def _joined(parts: Iterable[Numbers]) -> Numbers:
    return np.concatenate([np.asarray(part, dtype=np.float64).reshape(-1, 2) for part in parts])


def _cells(record: Record, mode: RecallMode) -> tuple[float, int]:
    """Cells held at the end, what recall brings back for a question counted, and at the peak."""
    answers = [question["answers"][mode] for question in record["questions"] if mode in question["answers"]]
    end = float(np.mean([answer["kept_cells"] for answer in answers])) if answers else float(record["kept_cells"])
    return end, max([record["peak_cells"], *(answer["peak_cells"] for answer in answers)])


def _recovered(none: Sequence[Record | None], pairs: Pairs) -> Figure:
    """Of the documents whose ground was read too."""
    known = [(ground, *pair) for ground, pair in zip(none, pairs, strict=True) if ground is not None]
    if not known:
        return NONE
    grounds, ours, full = (_joined(record["blocks"] for record in side) for side in zip(*known, strict=True))

    def of(lower: Numbers, mine: Numbers, theirs: Numbers) -> float:
        return context_recovered(perplexity(lower), perplexity(mine), perplexity(theirs))

    return _drawn(of, grounds, ours, full)


def _answering(pairs: Pairs, mode: RecallMode) -> Answering:
    both = [
        (given["question"], given["answers"][mode], asked["answers"]["off"])
        for mine, full in pairs for given, asked in zip(mine["questions"], full["questions"], strict=True)
    ]
    mine = [ours for _, ours, _ in both]
    right, full_right = ([float(answers[at]["correct"]) for answers in both] for at in (1, 2))
    return Answering(
        correct=_mean(right), share_of_full=_of_sums(right, full_right),
        agreement=_mean([float(agrees(ours["answer"], full["answer"], question)) for question, ours, full in both]),
        answer_loss=_mean([answer["answer_loss"] for answer in mine]),
        recalled_cells=_mean([answer["recalled_cells"] for answer in mine]),
    )


def _speed(records: Sequence[Record], mode: RecallMode, full: bool) -> Speed:
    """Turns of all records together; the full cache's ratio to itself is 1."""
    if not records:
        return Speed(prefill=NONE, decode=NONE, first_token=NONE, prefill_ratio=NONE, decode_ratio=NONE,
                     first_token_ratio=NONE)
    found: dict[str, Figure] = {}
    for part in (PREFILL, DECODE, FIRST_TOKEN):
        side = FULL if full else "way" if part == PREFILL else mode
        parts = [record["samples"][part] for record in records]
        ours, theirs, at = ([turn for one in parts for turn in one.get(name, ())] for name in (side, FULL, "at"))
        speed = rate(ours, at or None)
        if part == FIRST_TOKEN:  # seconds, not something a second; its relative error is the same
            speed = Estimate(1 / speed.value, speed.stderr / speed.value**2, speed.n)
        found[part] = figure(speed)
        gain = Estimate(1.0, math.nan, len(ours)) if full else ratio_of_medians(theirs, ours, at or None)
        found[f"{part}_ratio"] = figure(gain)
    return Speed(**found, length=round(float(np.mean([record["length"] for record in records]))))
