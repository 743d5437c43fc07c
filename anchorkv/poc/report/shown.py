"""What the templates ask for by name: figures, verdicts in words, and everything else that is more than a field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from markupsafe import Markup, escape

from anchorkv.poc.features import SHARES
from anchorkv.poc.report import selection
from anchorkv.poc.report.numbers import exact
from anchorkv.poc.report.place import Place
from anchorkv.poc.report.words import Words

FEATURES = {"segment_tokens": "plain", **dict.fromkeys(SHARES, "share")}
_WATCHED = {"tokens": "count", "watch.loss_gap": "decimal", "watch.agreement": "share"}
_EVIDENCE = {
    "like_failing_areas": "share", "short_text": "count", "loss_gap_grew": "decimal", "agreement_fell": "share",
    "needs_recall": "share", "milder_passes": "fewer",
    **{f"fails_{kpi}": kind for kpi, kind in selection.KPI_KINDS.items()},
}
_SELECTION: tuple[Callable[..., Any], ...] = (
    selection.show, selection.less, selection.compared, selection.because, selection.slower, selection.way_of,
    selection.name_of,
)
_SIGNS = {">": "above", ">=": "above", "<": "below", "<=": "below"}
_VERDICTS = ("adopt", "adopt_with_recall", "do_not_use", "not_enough_data")
_LANGUAGE = re.compile("[a-z]{2,3}")


class Shown:
    """Of one report, in one language. Every public name is the templates' by that name."""

    sections = ("plots", "areas", "suitability", "worst", "views", "risks", "rollout", "capacity", "method", "glossary")
    features = tuple(FEATURES.items())
    thresholds = (
        ("memory_reduction", "fewer"), ("speed_ratio", "ratio"), ("quality_share", "share"),
        ("perplexity_ratio", "ratio"), ("agreement", "share"), ("min_questions", "count"),
    )
    terms = (
        "token", "kv_cache", "full_cache", "anchor", "recall", "policy", "prefill", "decode", "perplexity",
        "context_recovered", "agreement", "standard_error", "session",
    )
    exact, runs, chosen = staticmethod(exact), staticmethod(selection.runs), staticmethod(selection.chosen)

    def __init__(self, report: Place, w: Words) -> None:
        self._report, self._w = report, w
        self._languages = {area.name.raw: area.features.language.raw for area in report.areas}
        self._show = partial(selection.show, w)

    def names(self) -> dict[str, Any]:
        """All of them, those of `selection` in the report's language among them."""
        public = (name for name in dir(self) if not name.startswith("_") and name != "names")
        return {**{name: getattr(self, name) for name in public},
                **{function.__name__: partial(function, self._w) for function in _SELECTION}}

    # --- the first page ----------------------------------------------------------------------------------------------

    @property
    def main_reasons(self) -> list[Place]:
        reasons = {reason.kpi.raw: reason for reason in self._report.overall.verdict.reasons if not reason.part.raw}
        return [reasons[kpi] for kpi in selection.MAIN_KPIS if kpi in reasons]

    @property
    def compared_kpis(self) -> list[str]:
        """The KPIs behind any area's verdict, each once: a way with recall has no perplexity of its own."""
        areas = [*self._report.areas, self._report.overall]
        behind = {r.kpi.raw for area in areas for r in area.verdict.reasons if not r.part.raw}
        return [kpi for kpi in selection.KPI_KINDS if kpi in behind]

    @property
    def counted(self) -> Markup:
        """How many areas got which verdict."""
        kinds = [area.verdict.kind.raw for area in self._report.areas]
        return self._w.join([
            self._w("first.count", verdict=self._w(f"verdict.{kind}"), n=kinds.count(kind))
            for kind in _VERDICTS if kind in kinds
        ])

    @property
    def saving(self) -> Place | None:
        """The model that was measured, which is the first row."""
        return next(iter(self._report.capacity.rows), None)

    @property
    def created(self) -> Markup:
        text = self._report.created.raw
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            return escape(text)
        month = self._w(f"month.{at.month}")
        said = self._w("format.date", year=at.year, month=month, day=at.day, time=at.strftime("%H:%M"))
        return Markup('<time datetime="{}">{}</time>').format(text, said)

    # --- languages ---------------------------------------------------------------------------------------------------

    def language_of(self, area: Place) -> str:
        """The language of an area's texts as an HTML attribute; empty: unknown. area: it, or its name."""
        name = area if isinstance(area.raw, str) else area.name
        found = self._languages.get(name.raw, "")
        return found if _LANGUAGE.fullmatch(found) else ""

    def language(self, code: Place) -> Markup:
        key = f"language.{code}"
        return self._w(key) if key in self._w else escape(code)

    # --- suitability and worst cases ---------------------------------------------------------------------------------

    def measured_without_recall(self, area: Place) -> Place | None:
        """What the prediction is about: the default policy, with nothing brought back."""
        policies = list(self._report.policies.raw)
        policy = "default" if "default" in policies else policies[0] if policies else ""
        return selection.found(area, policy, "off")

    def drivers(self, area: Place) -> Markup:
        """The features that count most, each with what it multiplies the expected ratio by where that is known."""
        suitability, said = area.suitability, []
        for at, driver in enumerate(suitability.drivers.raw):
            key = f"feature.{driver}"
            name = self._w(key) if key in self._w else driver
            if at < len(suitability.effects):
                effect = suitability.effects[at]
                side = "against" if effect.raw > 1 else "speaks_for"
                name = self._w(f"suitability.{side}", name=name, effect=self._show(effect, "ratio"))
            said.append(name)
        return self._w.join(said) if said else self._w("suitability.usual")

    def answer(self, text: Place, right: bool | None, language: str) -> Markup:
        """An answer with whether it is right."""
        said = text if text.raw else self._w("worst.empty")
        given = Markup('<span class="given" lang="{}">{}</span>').format(language if text.raw else self._w.lang, said)
        if right is None:
            return given
        outcome = "right" if right else "wrong"
        return given + Markup(' <span class="{}">{}</span>').format(outcome, self._w(f"worst.{outcome}"))

    # --- risks, rules, rollout ---------------------------------------------------------------------------------------

    @property
    def risks(self) -> list[str]:
        """Those that every report names, and those of this one."""
        report = self._report
        here = {
            "cloze": not report.own_questions,
            "few": any(area.verdict.kind == "not_enough_data" for area in report.areas),
            "unlike": any(area.suitability.outside for area in report.areas), "left_out": bool(report.left_out),
        }
        return ["loss", "recall", "sample", "model", "positions", *(name for name, holds in here.items() if holds)]

    def condition(self, when: Place) -> Markup:
        """A rule's condition in words."""
        name, sign, value = when.raw.split(" ", 2)
        feature = name.removeprefix("features.")
        if name == "area":
            return self._w("when.area", area=json.loads(value))
        if sign in _SIGNS and feature in FEATURES:
            said = self._exact(value, FEATURES[feature])
            return self._w(f"when.{_SIGNS[sign]}.feature", feature=self._w(f"feature.{feature}"), value=said)
        if sign in _SIGNS and name in _WATCHED:
            return self._w(f"when.{_SIGNS[sign]}.{name}", value=self._exact(value, _WATCHED[name]))
        return escape(when)

    def _exact(self, value: str, kind: str) -> str:
        return self._w.number(float(value), kind, exact(float(value), kind))

    def evidence_kind(self, rule: Place) -> str:
        return _EVIDENCE.get(rule.because.raw, "decimal")

    def watched(self, planned: Place) -> Markup:
        """The cells of a table with what a running service watches; of the full cache there is nothing to watch."""
        if planned.policy == "full":
            return Markup('<td class="n">–</td>') * 3
        watch, show = planned.watch, self._show
        gap, gap_limit = show(watch.loss_gap, "decimal"), show(watch.loss_gap_limit, "decimal")
        agreement, floor = show(watch.agreement, "share"), show(watch.agreement_floor, "share")
        cells = (
            self._w("watch.expected_most", expected=gap, limit=gap_limit),
            self._w("watch.expected_least", expected=agreement, limit=floor), show(watch.reduction, "fewer"),
        )
        return Markup("").join(Markup('<td class="n">{}</td>').format(cell) for cell in cells)

    # --- capacity and environment ------------------------------------------------------------------------------------

    def both(self, full: Place, anchored: Place, kind: str, row: Place | None = None) -> Markup:
        """Full → anchored. row: its machines tell whether there is such a figure at all."""
        currency = self._report.capacity.inputs.raw.get("currency", "")
        sides = [
            self._w("saving.none") if row is not None and not row[f"machines_{side}"].raw
            else self._show(place, kind, currency=currency)
            for side, place in (("full", full), ("anchored", anchored))
        ]
        arrow = Markup('{}<span class="arrow" aria-hidden="true">→</span><span class="hidden"> {} </span>{}')
        return arrow.format(sides[0], self._w("saving.to"), sides[1])

    @property
    def facts(self) -> list[tuple[Any, Any]]:
        """The environment's names, in words where there are any, and values."""
        return list(self._facts(self._report.environment))

    def _facts(self, found: Place) -> Iterator[tuple[Any, Any]]:
        for key in found.raw:
            value, name = found[key], f"environment.{key}"
            if isinstance(value.raw, Mapping):
                yield from self._facts(value)
            elif value.raw is not None and key != "date":
                said = self._w(name) if name in self._w else key
                yield said, self._show(value, "bytes") if key == "memory" else value
