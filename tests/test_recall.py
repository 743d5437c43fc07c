"""Which segments come back: the ranker, the budget, and when `auto` leaves it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tiny_gguf

from anchorkv.config import AnchorConfig
from anchorkv.engines.llama import LlamaEngine
from anchorkv.recall import BM25, RecallPlan, terms
from anchorkv.session import Session

TEXT = (
    "Fish swim in the cold lake.\n\nAnna Weber bought the mill in 1911.\n\nSnow fell on the hills all day long.\n\n"
    "The bridge was painted green twice.\n\nNobody remembers the old song now.\n\nThen the evening came at last.\n\n"
)
POLICY = AnchorConfig(reduction=20, max_segment=64, min_segment=20, sinks=0, recent_window=1, scorer="frequency")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    path = tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    engine = LlamaEngine.load(path, threads=1, cells=256)
    yield engine
    engine.close()


def read(engine: LlamaEngine, **changes: object) -> Session:
    session = Session(engine, POLICY.replace(**changes))
    session.read(engine.tokenizer.encode(TEXT))
    return session


def test_words_of_both_languages() -> None:
    assert terms("What did the Mills do?") == ["mill"]
    assert terms("水車を買った") == ["水車", "車を", "を買", "買っ", "った"]


def test_bm25_finds_the_passage() -> None:
    passages = TEXT.split("\n\n")
    scores = BM25().scores(passages, "Who bought the mill?")
    assert int(scores.argmax()) == 1
    assert not BM25().scores(passages, "the of and").any()


def test_the_best_segment_comes_back_within_the_budget(engine: LlamaEngine) -> None:
    with read(engine, recall="on", recall_cells=60) as session:
        plan = RecallPlan(session)
        new = plan.update("Who bought the mill?")
        assert "Anna Weber" in " ".join(plan.text_of(segment) for segment in new)
        assert sum(session.recalled.values()) <= 60
        assert session.memory.positions().tolist() == np.flatnonzero(session.ledger.held()).tolist()


def test_a_better_segment_takes_the_place_of_another(engine: LlamaEngine) -> None:
    with read(engine, recall="on", recall_cells=40) as session:
        plan = RecallPlan(session)
        first = plan.update("Who bought the mill?")
        second = plan.update("Which bridge was painted green?")
        assert first != second
        assert set(session.recalled) == set(second)
        reasons = [change.reason for change in session.ledger.reasons(first[0])]
        assert reasons[-1] == "another segment answers better"


def test_auto_leaves_alone_what_no_segment_speaks_for(engine: LlamaEngine) -> None:
    with read(engine, recall="auto") as session:
        assert RecallPlan(session).update("How does quantum gravity unify unrelated distant lake theories?") == []
        assert RecallPlan(session).update("Who bought the mill?")


def test_off_is_off(engine: LlamaEngine) -> None:
    with read(engine, recall="off") as session:
        assert RecallPlan(session).update("Who bought the mill?") == []
