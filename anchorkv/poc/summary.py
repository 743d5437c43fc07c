"""From the records of a run to its report: areas, verdicts, and all that follows from them; and redaction."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import anchorkv
from anchorkv.errors import DataError, ModelError
from anchorkv.evaluate.environment import environment
from anchorkv.evaluate.run import Models, Record
from anchorkv.evaluate.timing import weights_file
from anchorkv.evaluate.ways import FULL, Way
from anchorkv.poc import features, shapes, suitability
from anchorkv.poc.figures import Found, way_results
from anchorkv.poc.measure import Item
from anchorkv.poc.results import (
    AnchorToken,
    AreaResult,
    Capacity,
    DocumentResult,
    Features,
    Lang,
    ModelFacts,
    PocReport,
    Remark,
    Skipped,
    WayResult,
    WorstCase,
)
from anchorkv.poc.rules import rules
from anchorkv.poc.verdict import verdict
from anchorkv.poc.worst import worst

if TYPE_CHECKING:
    from anchorkv.poc.plan import Plan

HIDDEN = "•"
"""A token of a redacted anchor view."""
HIDDEN_TEXT: dict[Lang, str] = {"en": "[{n} characters, {hash}]", "ja": "［{n}文字、{hash}］"}


def report(
    plan: Plan, items: Sequence[Item], records: Iterable[Record], ways: Sequence[Way], models: Models, *,
    skipped: Sequence[Skipped] = (), left_out: Sequence[Remark] = (), seconds: float = 0.0,
) -> PocReport:
    """All that a run found, redacted where the plan says so. records: of the Store, of any task of measure.jobs.

    Raises DataError when nothing could be measured, saying why.
    """
    found = Found(records)
    ids = found.measured(ways)
    if not ids:
        why = found.failed[0] if found.failed else "the time was too short for a single document"
        raise DataError(f"Nothing was measured: {why}")
    engine = models.of(ways[0]).engine
    known = {item.id: item for item in items if item.id in ids}
    texts = {item: features.features(known[item].source.text, engine.tokenizer) for item in ids}
    predictor = suitability.Predictor()
    by_area: dict[str, list[str]] = {}
    for item in ids:
        by_area.setdefault(known[item].source.area, []).append(item)
    overall = _area("", ids, found, ways, plan, texts, predictor)
    areas = tuple(_area(name, mine, found, ways, plan, texts, predictor) for name, mine in by_area.items())
    chosen = found.documents.get(overall.verdict.policy, {})
    documents = tuple(_document(known[item], found, ways, chosen.get(item)) for item in ids)
    own = any(question.own for item in known.values() for question in item.questions)
    machine, missing = _capacity(plan, overall, ways, models)
    whole = PocReport(
        anchorkv_version=anchorkv.__version__, created=datetime.now().astimezone().isoformat(timespec="seconds"),
        title=plan.title, lang=plan.lang, redacted=False, seconds=seconds, model=_facts(models, ways[0]),
        environment=environment(), policies={way.name: way.policy for way in ways if way.name != FULL},
        recall_modes=tuple(plan.recall_modes), budget_minutes=plan.budget_minutes, seed=plan.seed,
        threads=plan.threads, thresholds=plan.thresholds, overall=overall, areas=areas, documents=documents,
        worst=worst(found.documents[FULL], chosen), capacity=machine,
        rules=rules(overall, areas, documents, plan.thresholds), skipped=tuple(skipped),
        left_out=(*left_out, *found.failed, *missing), own_questions=own,
    )
    return redacted(whole) if plan.redact else whole


def _area(
    name: str, ids: Sequence[str], found: Found, ways: Sequence[Way], plan: Plan, texts: Mapping[str, Features],
    predictor: suitability.Predictor,
) -> AreaResult:
    """name: "" for all areas together."""
    full = [found.documents[FULL][item] for item in ids]
    results = way_results(found, ids, ways)
    questions = sum(len(record["questions"]) for record in full)
    like = features.combined([texts[item] for item in ids])
    return AreaResult(
        name=name, documents=len(ids), questions=questions, tokens=sum(record["tokens"] for record in full),
        ways=results, verdict=verdict(results, plan.thresholds, questions), features=like,
        suitability=predictor.predict(like),
    )


def _document(item: Item, found: Found, ways: Sequence[Way], chosen: Record | None) -> DocumentResult:
    """chosen: the record of the policy that the verdict over all areas is about."""
    source, view = item.source, chosen.get("view", ()) if chosen else ()
    return DocumentResult(
        id=item.id, area=source.area, title=source.title, tokens=found.documents[FULL][item.id]["tokens"],
        sha256=source.sha256, ways=way_results(found, [item.id], ways),
        memory_curve=tuple((read, read, kept) for read, kept in chosen["curve"]) if chosen else (),
        view=tuple(AnchorToken(text=text, kind=kind) for text, kind in view),
    )


def _facts(models: Models, way: Way) -> ModelFacts:
    model = models.of(way)
    info = model.engine.info
    return ModelFacts(
        name=info.name, weights=info.weights, engine=model.engine.name, adapter=model.adapter or None,
        architecture=info.architecture, layers=info.layers, window=info.window, cell_bytes=info.cell_bytes,
        fingerprint=info.fingerprint,
    )


# --- capacity ------------------------------------------------------------------------------------------------------


def _capacity(plan: Plan, overall: AreaResult, ways: Sequence[Way], models: Models) -> tuple[Capacity, list[Remark]]:
    """With what the chosen policy keeps, and why models are missing: a name that nothing has loses no measurement."""
    engine, inputs, chosen = models.of(ways[0]).engine, plan.capacity, overall.verdict
    policy = next((way.policy for way in ways if way.name == chosen.policy and way.name != FULL), None)
    if policy is not None:
        inputs = inputs.of_policy(policy.replace(recall=chosen.recall), engine.info.window)
    names: list[str] = []
    missing: list[Remark] = []
    for name in inputs.models:
        try:
            shapes.find(name)
            names.append(name)
        except ModelError as error:
            missing.append(Remark(text=str(error), key="no_model", values={"model": name, "why": str(error)}))
    weights = _weight_bytes(models, ways[0])
    own = shapes.of_info(engine.info, weights) if weights else None
    return shapes.capacity(
        inputs.model_copy(update={"models": tuple(names)}), own, _reduction_without_recall(overall)
    ), missing


def _reduction_without_recall(overall: AreaResult) -> float | None:
    """The chosen policy's reduction with nothing recalled."""
    def mine(way: WayResult) -> bool:
        return way.policy == overall.verdict.policy and way.policy != FULL

    off = [way for way in overall.ways if mine(way) and way.recall == "off"]
    return off[0].reduction.value if off else None


def _weight_bytes(models: Models, way: Way) -> int:
    """0 where the engine does not tell."""
    engine = models.of(way).engine
    if engine.name == "llama":
        return weights_file(models, way).stat().st_size
    return int(engine.model.get_memory_footprint()) if engine.name == "torch" else 0  # type: ignore[attr-defined]


# --- redaction -----------------------------------------------------------------------------------------------------


def redacted(report: PocReport) -> PocReport:
    """The report without any text of the documents: lengths and hashes stand for it.

    The hashes tell equal texts from different ones within one report. They are salted, and the salt is thrown away: an
    answer of a few digits could be guessed from a plain one.
    """
    salt = secrets.token_bytes(16)

    def hidden(text: str) -> str:
        digest = hashlib.sha256(salt + text.encode("utf-8", "surrogatepass")).hexdigest()
        return HIDDEN_TEXT[report.lang].format(n=len(text), hash=digest[:8]) if text else ""

    def case(of: WorstCase) -> WorstCase:
        texts = {name: hidden(getattr(of, name)) for name in ("question", "expected", "full_answer", "lost", "kept",
                                                              "recalled")}
        return of.model_copy(update={**texts, "answers": {mode: hidden(text) for mode, text in of.answers.items()}})

    def document(of: DocumentResult) -> DocumentResult:
        view = tuple(AnchorToken(text=HIDDEN, kind=token.kind) for token in of.view)
        return of.model_copy(update={"title": of.id, "view": view})

    return report.model_copy(update={
        "redacted": True, "worst": tuple(map(case, report.worst)), "documents": tuple(map(document, report.documents)),
    })
