"""Incremental anchored inference equals one masked forward over the whole text: the PyTorch engine, every policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from policies import POLICIES, TEXT, chunks

torch = pytest.importorskip("torch")

from tiny import tiny_model, tiny_tokenizer  # noqa: E402 (needs torch)

from anchorkv.decode import step_together  # noqa: E402
from anchorkv.engines.torch import TorchEngine  # noqa: E402
from anchorkv.engines.torch_tokenizer import TorchTokenizer  # noqa: E402
from anchorkv.savefile import open_session, save_session  # noqa: E402
from anchorkv.session import Session  # noqa: E402
from anchorkv.visibility import dense_mask  # noqa: E402

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(tiny_model("llama"), TorchTokenizer(tiny_tokenizer()))


def expected(engine: TorchEngine, session: Session) -> Any:
    """Logits [n, vocabulary] of transformers' own forward under the rule as a dense 4-D mask."""
    mask = torch.from_numpy(dense_mask(session.ledger.layout()))[None, None]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    ids = torch.from_numpy(session.ledger.tokens.copy())[None]
    with torch.inference_mode():
        positions = torch.arange(ids.shape[1])[None]
        return engine.model(ids, attention_mask=additive, position_ids=positions).logits[0].numpy()


@pytest.mark.parametrize("how", ["whole", "chunks", "token"])
@pytest.mark.parametrize("name", POLICIES)
def test_incremental_equals_one_masked_forward(engine: TorchEngine, name: str, how: str) -> None:
    tokens = engine.tokenizer.encode(TEXT)
    pinned = [20 <= i < 24 for i in range(len(tokens))]
    seen: dict[int, Any] = {}
    with Session(engine, POLICIES[name]) as session:
        for part in chunks(len(tokens), how):
            session.read(tokens[part], pinned[part])
            seen[len(session.ledger) - 1] = session.logits
            held = session.memory.positions()
            assert held.tolist() == np.flatnonzero(session.ledger.held()).tolist()
            assert session.memory.nbytes() == len(held) * engine.info.cell_bytes
        rows = expected(engine, session)
    for position, logits in seen.items():
        np.testing.assert_allclose(logits, rows[position], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["paper-ep", "paper-ac", "sel-nothing-recent", "ac-3-sinks"])
def test_recall_with_w_0_equals_never_having_dropped(engine: TorchEngine, name: str) -> None:
    tokens = engine.tokenizer.encode(TEXT)
    with Session(engine, POLICIES[name]) as session:
        session.read(tokens)
        for segment in session.ledger.dropped_segments()[:3]:
            assert session.recall(segment, "test")
        session.read(engine.tokenizer.encode(" And then?"))
        np.testing.assert_allclose(session.logits, expected(engine, session)[-1], atol=TOLERANCE)
        for segment in list(session.recalled):
            session.release(segment)
        session.read(engine.tokenizer.encode(" Go"))
        np.testing.assert_allclose(session.logits, expected(engine, session)[-1], atol=TOLERANCE)


@pytest.mark.parametrize("name", POLICIES)
def test_ragged_sessions_in_one_batch_equal_each_alone(engine: TorchEngine, name: str) -> None:
    tokens = engine.tokenizer.encode(TEXT)
    starts = [30, 55, 12]
    sessions = [Session(engine, POLICIES[name]) for _ in starts]
    for session, start in zip(sessions, starts, strict=True):
        session.read(tokens[:start])
    for step in range(40):
        step_together(sessions, [tokens[start + step] for start in starts])
    for session in sessions:
        np.testing.assert_allclose(session.logits, expected(engine, session)[-1], atol=TOLERANCE)
        assert session.memory.positions().tolist() == np.flatnonzero(session.ledger.held()).tolist()
        session.close()


def test_fork_save_and_open_go_on_alike(engine: TorchEngine, tmp_path: Any) -> None:
    tokens = engine.tokenizer.encode(TEXT)
    with Session(engine, POLICIES["sel-surprise"]) as session:
        session.read(tokens[:70])
        with session.fork() as fork:
            save_session(session, tmp_path / "s")
            opened, _ = open_session(TorchEngine(tiny_model("llama"), TorchTokenizer(tiny_tokenizer())), tmp_path / "s")
            for each in (session, fork, opened):
                each.read(tokens[70:])
            np.testing.assert_allclose(fork.logits, session.logits, atol=TOLERANCE)
            np.testing.assert_allclose(opened.logits, session.logits, atol=TOLERANCE)
            np.testing.assert_allclose(session.logits, expected(engine, session)[-1], atol=TOLERANCE)
