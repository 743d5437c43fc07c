"""What of a report is shown where: the way that a verdict is about, its name, and the verdict in one plain sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from anchorkv.poc.report.numbers import exact
from anchorkv.poc.report.place import Place
from anchorkv.poc.report.words import Words

KPI_KINDS = {"memory": "fewer", "speed": "ratio", "quality": "share", "perplexity": "ratio", "agreement": "share"}
"""What kind of number each KPI is (`numbers.KINDS`)."""
MAIN_KPIS = ("memory", "speed", "quality")


def show(w: Words, place: Place, kind: str, finer: int = 0, currency: str = "") -> Markup:
    """A number of the report, for a page: where it stands and its exact value go with it, and a test compares them."""
    number = place.number
    return Markup('<data value="{}" data-path="{}" data-kind="{}">{}</data>').format(
        "" if number.raw is None else repr(number.raw), number.where, kind, w.number(number.raw, kind, finer, currency)
    )


def less(w: Words, greater: Place, smaller: Place, kind: str, currency: str = "") -> Markup:
    """The difference of two numbers of the report."""
    value = greater.raw - smaller.raw
    return Markup('<data value="{}" data-path="{}" data-minus="{}" data-kind="{}">{}</data>').format(
        repr(value), greater.where, smaller.where, kind, w.number(value, kind, currency=currency)
    )


def chosen(area: Place) -> Place:
    """The way that the area's verdict is about."""
    verdict = area.verdict
    return found(area, verdict.policy.raw, verdict.recall.raw) or area.ways[0]


def found(area: Place, policy: str, recall: str) -> Place | None:
    ways = (way for way in area.ways if (way.policy.raw, way.recall.raw) == (policy, recall))
    return next(ways, None)


def way_of(w: Words, way: Place) -> Markup:
    """What a way is called."""
    if way.policy.raw == "full":
        return w("way.full")
    return w("way.anchored", policy=way.policy.raw, recall=w(f"recall.{way.recall}"))


def name_of(w: Words, area: Place) -> Markup:
    """The area's name, or what all areas together are called."""
    return w("overall") if area.where == "/overall" else escape(area.name)


def compared(w: Words, reason: Place) -> tuple[Markup, Markup]:
    """A reason's value and limit: the limit as it was set, the value with enough decimals to tell it from the limit."""
    kind, value, limit = KPI_KINDS[reason.kpi.raw], reason.value.raw, reason.limit.raw
    finer = 0
    while value not in {None, limit} and w.number(value, kind, finer) == w.number(limit, kind, finer) and finer < 3:
        finer += 1
    return show(w, reason.value, kind, finer), show(w, reason.limit, kind, exact(limit, kind))


def because(w: Words, area: Place) -> Markup:
    """Why the verdict is what it is, in one sentence without jargon."""
    verdict = area.verdict
    kind = verdict.kind.raw
    wanted = {"adopt": True, "adopt_with_recall": True, "do_not_use": False, "not_enough_data": None}[kind]
    reasons = [reason for reason in verdict.reasons if reason.passed.raw is wanted and not reason.part.raw]
    if wanted:
        reasons = [reason for reason in reasons if reason.kpi.raw in MAIN_KPIS]
    values = {
        "reasons": w.join([_phrase(w, reason) for reason in reasons]), "questions": show(w, area.questions, "count"),
    }
    if not reasons:
        return w("because.nothing")
    unknown = [reason for reason in verdict.reasons if reason.passed.raw is None]
    if wanted and unknown:
        return w("because.partly", open=w.join([_phrase(w, reason) for reason in unknown]), **values)
    without = found(area, verdict.policy.raw, "off")
    if kind == "adopt_with_recall" and without and without.answering.share_of_full.number.raw is not None:
        return w("because.with_and_without", share=show(w, without.answering.share_of_full, "share"), **values)
    return w(f"because.{kind}", **values)


def slower(w: Words, area: Place) -> Markup:
    """Parts of speed besides writing that are slower than wanted, in one sentence: told, and not part of the verdict.
    Empty where there is none."""
    parts = [reason for reason in area.verdict.reasons if reason.part.raw]
    said = [w(f"kpi.speed_{reason.part}.failed", value=compared(w, reason)[0]) for reason in parts]
    return w("because.slower", parts=w.join(said)) if said else Markup("")


def _phrase(w: Words, reason: Place) -> Markup:
    value, limit = compared(w, reason)
    outcome = {True: "passed", False: "failed", None: "unknown"}[reason.passed.raw]
    return w(f"kpi.{reason.kpi}.{outcome}", value=value, limit=limit)


# --- a document's anchors --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind."""

    kind: str
    text: str


def runs(view: Sequence[Place]) -> list[Run]:
    """The tokens of an anchor view, those of one kind together."""
    runs: list[Run] = []
    for token in view:
        if runs and runs[-1].kind == token.kind.raw:
            runs[-1] = Run(token.kind.raw, runs[-1].text + token.text.raw)
        else:
            runs.append(Run(token.kind.raw, token.text.raw))
    return runs
