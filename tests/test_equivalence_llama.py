"""Incremental anchored inference equals one masked forward over the whole text: the llama.cpp engine.

The reference is a float64 forward written for the tests (tiny_gguf), masked by a brute-force reading of the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from numpy.typing import NDArray
from policies import POLICIES, TEXT, chunks, random_head

from anchorkv.config import preset
from anchorkv.decode import step_together
from anchorkv.engines.llama import LlamaEngine
from anchorkv.errors import ModelError
from anchorkv.ledger import Ledger, State
from anchorkv.session import Session
from anchorkv.visibility import dense_mask


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    engine = LlamaEngine.load(tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf"), threads=1, cells=256)
    yield engine
    engine.close()


def expected(ledger: Ledger) -> NDArray[np.float64]:
    return tiny_gguf.reference(tiny_gguf.weights(), ledger.tokens, dense_mask(ledger.layout()))


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


def test_a_head_on_cells_chooses_alike_however_the_text_arrives(engine: LlamaEngine, tmp_path: Path) -> None:
    policy = random_head(tiny_gguf.LAYERS * (tiny_gguf.KV_HEADS * tiny_gguf.HEAD + 1) + 4, tmp_path / "h.safetensors")
    tokens, kept = engine.tokenizer.encode(TEXT), []
    for how in ("whole", "chunks", "token"):
        with Session(engine, policy) as session:
            for part in chunks(len(tokens), how):
                session.read(tokens[part])
            assert session.logits is not None
            assert tiny_gguf.kl(expected(session.ledger)[-1:], session.logits[None]).max() <= 1e-3
            kept.append(session.memory.positions().tolist())
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("kind", [{}, {"flash_attention": True}])
def test_cells_are_read_alike_in_every_form(tmp_path_factory: pytest.TempPathFactory, kind: dict[str, Any]) -> None:
    path = tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "t.gguf")
    engine, plain = LlamaEngine.load(path, threads=1, **kind), LlamaEngine.load(path, threads=1)
    found = []
    for each in (engine, plain):
        memory = each.open()
        memory.decode(each.tokenizer.encode(TEXT)[:60], 0)
        memory.drop(np.arange(10, 20))
        memory.decode([70, 71], 60)
        found.append(memory.read_cells(np.array([3, 4, 30, 31, 61])))
        with pytest.raises(ModelError, match="not held"):
            memory.read_cells(np.array([9, 10]))
        each.close()
    np.testing.assert_allclose(found[0].values, found[1].values, atol=0.05)
    np.testing.assert_allclose(found[0].key_norms, found[1].key_norms, rtol=0.02)


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
    path = tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "t.gguf")
    engine = LlamaEngine.load(path, threads=1, cells=256, batch=64)
    tokens = engine.tokenizer.encode(TEXT * 3)
    with Session(engine, preset("full")) as session, session.fork() as twin:
        session.read(tokens)
        twin.read(tokens)
        assert engine.cells > 256
        assert session.logits is not None
        assert tiny_gguf.kl(expected(session.ledger)[-1:], session.logits[None]).max() <= 1e-3
    engine.close()


@pytest.mark.parametrize("name", POLICIES)
def test_sessions_in_one_batch_equal_each_alone(engine: LlamaEngine, name: str) -> None:
    tokens = engine.tokenizer.encode(TEXT)
    starts = [30, 55, 12]
    sessions = [Session(engine, POLICIES[name]) for _ in starts]
    for session, start in zip(sessions, starts, strict=True):
        session.read(tokens[:start])
    for step in range(40):
        step_together(sessions, [tokens[start + step] for start in starts])
    for session in sessions:
        assert session.logits is not None
        assert tiny_gguf.kl(expected(session.ledger)[-1:], session.logits[None]).max() <= 1e-2
        assert session.memory.positions().tolist() == np.flatnonzero(session.ledger.held()).tolist()
        session.close()
