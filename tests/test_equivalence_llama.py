"""Incremental anchored inference equals one masked forward over the whole text: the llama.cpp engine.

The reference is a float64 forward written for the tests (tiny_gguf), masked by a brute-force reading of the rule.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tiny_gguf
from numpy.typing import NDArray

from anchorkv.config import AnchorConfig, preset
from anchorkv.engines.llama import LlamaEngine
from anchorkv.ledger import Ledger, State
from anchorkv.session import Session
from anchorkv.visibility import dense_mask

POLICIES = {
    "paper-ep": preset("paper-ep"),
    "paper-ac": preset("paper-ac"),
    "ac-3-sinks": AnchorConfig(anchors=("AC",), ac_tokens=3, sinks=3, recent_window=0, min_segment=4, recall="off"),
    "ac-2-see": AnchorConfig(anchors=("AC",), ac_tokens=2, anchors_see_anchors=True, recent_window=2, max_segment=24),
    "ep-see-recent": AnchorConfig(anchors=("EP",), anchors_see_anchors=True, sinks=2, recent_window=1, max_segment=20),
    "sel": AnchorConfig(reduction=4, recent_window=1, max_segment=24, scorer="frequency"),
    "sel-nothing-recent": AnchorConfig(reduction=4, recent_window=0, sinks=0, max_segment=24, scorer="frequency"),
    "sel-surprise": AnchorConfig(reduction=4, recent_window=1, max_segment=24, scorer="surprise"),
    "ep-and-sel": AnchorConfig(anchors=("EP", "SEL"), reduction=6, recent_window=1, max_segment=24, scorer="frequency"),
    "ep-sel-ac": AnchorConfig(anchors=("EP", "SEL", "AC"), reduction=5, recent_window=0, scorer="frequency"),
    "budget": AnchorConfig(reduction=3, recent_window=1, max_segment=16, min_segment=4, cell_budget=48, scorer="frequency"),
    "sepllm": preset("sepllm"),
    "fixed": AnchorConfig(anchors=("EP",), segments="fixed", max_segment=16, recent_window=1),
    "full": preset("full"),
}
TEXT = (
    "It was late. The ship, grey and slow, came in at 3.14 knots! Dr. Brown stood there; nobody spoke.\n\n"
    "# Orders\n- one rope\n- two lamps\n「もう遅い。」と言った。 The end? Not yet: they waited, and waited, and then it rained. "
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    engine = LlamaEngine.load(tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf"), threads=1, cells=256)
    yield engine
    engine.close()


def expected(ledger: Ledger) -> NDArray[np.float64]:
    return tiny_gguf.reference(tiny_gguf.weights(), ledger.tokens, dense_mask(ledger.layout()))


def chunks(count: int, how: str) -> list[slice]:
    random = np.random.default_rng(count)
    cuts = {
        "whole": [], "token": list(range(1, count)),
        "chunks": sorted(set(random.integers(1, count, size=9).tolist())),
    }[how]
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]


@pytest.mark.parametrize("how", ["whole", "chunks", "token"])
@pytest.mark.parametrize("name", POLICIES)
def test_incremental_equals_one_masked_forward(engine: LlamaEngine, name: str, how: str) -> None:
    tokens = engine.tokenizer.encode(TEXT)
    pinned = [40 <= i < 46 for i in range(len(tokens))]
    seen: dict[int, NDArray[np.float32]] = {}
    with Session(engine, POLICIES[name]) as session:
        for part in chunks(len(tokens), how):
            session.read(tokens[part], pinned[part])
            assert session.logits is not None
            seen[len(session.ledger) - 1] = session.logits
            held = session.memory.positions()
            assert held.tolist() == np.flatnonzero(session.ledger.held()).tolist()
            assert session.memory.nbytes() == len(held) * engine.info.cell_bytes
        rows = expected(session.ledger)
    divergence = tiny_gguf.kl(rows[list(seen)], np.stack(list(seen.values())))
    assert divergence.mean() <= 1e-3
    assert divergence.max() <= 1e-2


@pytest.mark.parametrize("name", POLICIES)
def test_chunking_never_changes_what_is_kept(engine: LlamaEngine, name: str) -> None:
    tokens = engine.tokenizer.encode(TEXT)
    states = []
    for how in ("whole", "chunks", "token"):
        with Session(engine, POLICIES[name]) as session:
            for part in chunks(len(tokens), how):
                session.read(tokens[part])
            states.append((session.ledger.column("state").tolist(), session.ledger.column("segment").tolist()))
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("name", ["paper-ep", "paper-ac", "sel-nothing-recent", "ac-3-sinks"])
def test_recall_with_w_0_equals_never_having_dropped(engine: LlamaEngine, name: str) -> None:
    tokens = engine.tokenizer.encode(TEXT)
    with Session(engine, POLICIES[name]) as session:
        session.read(tokens)
        for segment in session.ledger.dropped_segments()[:3]:
            assert session.recall(segment, "test")
        assert (session.ledger.column("state") == State.RECALLED).any()
        session.read(engine.tokenizer.encode(" And then?"))
        assert session.logits is not None
        found = tiny_gguf.kl(expected(session.ledger)[-1:], session.logits[None])
        assert found.max() <= 1e-3
        for segment in list(session.recalled):
            session.release(segment)
        session.read(engine.tokenizer.encode(" Go"))
        assert session.memory.positions().tolist() == np.flatnonzero(session.ledger.held()).tolist()
        assert tiny_gguf.kl(expected(session.ledger)[-1:], session.logits[None]).max() <= 1e-3


def test_forks_do_not_touch_each_other(engine: LlamaEngine) -> None:
    tokens = engine.tokenizer.encode(TEXT)
    with Session(engine, POLICIES["sel"]) as session:
        session.read(tokens[:120])
        with session.fork() as left, session.fork() as right:
            left.read(tokens[120:170])
            right.read(tokens[60:90])
            session.read(tokens[120:170])
            np.testing.assert_allclose(left.logits, session.logits, atol=1e-3)
            assert right.logits is not None
            assert tiny_gguf.kl(expected(right.ledger)[-1:], right.logits[None]).max() <= 1e-3


def test_the_context_grows_and_keeps_its_cells(tmp_path_factory: pytest.TempPathFactory) -> None:
    engine = LlamaEngine.load(tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "t.gguf"), threads=1, cells=256, batch=64)
    tokens = engine.tokenizer.encode(TEXT * 3)
    with Session(engine, preset("full")) as session, session.fork() as twin:
        session.read(tokens)
        twin.read(tokens)
        assert engine.cells > 256
        assert session.logits is not None
        assert tiny_gguf.kl(expected(session.ledger)[-1:], session.logits[None]).max() <= 1e-3
    engine.close()
