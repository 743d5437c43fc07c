"""A small run of a proof of concept on the engine without a model: plan, documents, questions and their records."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fake_engine import FakeEngine

from anchorkv.config import AnchorConfig
from anchorkv.evaluate.run import Models, Record
from anchorkv.models import Model
from anchorkv.poc.measure import Item, items, jobs, measured, ways_of
from anchorkv.poc.results import Thresholds

POLICY = AnchorConfig(reduction=6, min_segment=16, max_segment=48, scorer="frequency", recall_cells=96)
SECRET = "The valve of Lisbon opens at 4711 bar."


class FakeModels(Models):
    """The fake engine, whatever the way."""

    def __init__(self, engine: FakeEngine | None = None) -> None:
        super().__init__("fake")
        self.fake = engine or FakeEngine()

    def of(self, way: Any) -> Model:
        return Model(self.fake, way.policy)


def source(area: str, number: int, sentences: int = 12) -> Any:
    lines = [f"The pump of deck {number + n} ran for {n + 3} hours, and nobody asked why." for n in range(sentences)]
    lines.insert(2, SECRET)
    return SimpleNamespace(
        id=f"{area}/{number}.txt", area=area, title=f"{area} {number}", path=f"{number}.txt", text=" ".join(lines),
        sha256=f"{number:064x}",
    )


def question(of: Any, own: bool = False, **changes: Any) -> Any:
    fields = {
        "document": of.id, "text": "At what pressure does the valve of Lisbon open?", "answers": ("4711 bar", "4711"),
        "passage": SECRET, "own": own, "lead": "It opens at ",
    }
    return SimpleNamespace(**{**fields, **changes})


def plan(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "title": "A test", "lang": "en", "questions_per_document": 2, "recall_modes": ("off", "auto", "on"),
        "max_tokens_document": None, "thresholds": Thresholds(), "budget_minutes": None, "seed": 0, "threads": 1,
        "redact": False,
    }
    return SimpleNamespace(**{**fields, **changes})


def run(models: Models, given: Any, chosen: list[Item], policies: dict[str, AnchorConfig]) -> list[Record]:
    """Everything but the speeds, which have tests of their own."""
    todo = jobs(chosen, ways_of(policies))
    return [measured(models, job, given) for job in todo if job.task != "speed"]


def small_items(given: Any, areas: str = "manuals minutes", documents: int = 2) -> list[Item]:
    sources = [source(area, 10 * n) for area in areas.split() for n in range(documents)]
    return items(sources, [question(of) for of in sources], given)
