"""Saved sessions: a round trip changes nothing; a wrong, truncated or altered file is refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anchorkv.config import AnchorConfig
from anchorkv.document import Document
from anchorkv.engines.llama import LlamaEngine
from anchorkv.errors import SavedStateError
from anchorkv.savefile import open_session, save_session
from anchorkv.session import Session

TEXT = "The mill stood by the river. It had two wheels; one was broken. Anna Weber bought it in 1911 for 9 crowns. " * 3
POLICIES = [
    AnchorConfig(reduction=4, scorer="frequency", max_segment=24),
    AnchorConfig(reduction=4, scorer="surprise", max_segment=24),
    AnchorConfig(anchors=("EP", "AC"), recent_window=0, max_segment=24, recall="on"),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    engine = LlamaEngine.load(tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf"), threads=1, cells=256)
    yield engine
    engine.close()


@pytest.mark.parametrize("policy", POLICIES, ids=["sel", "surprise", "ep-ac"])
def test_a_session_goes_on_in_another_engine_as_if_never_saved(
    engine: LlamaEngine, policy: AnchorConfig, tmp_path: Path
) -> None:
    path = tmp_path / "s.anchors"
    tokens = engine.tokenizer.encode(TEXT)
    with Session(engine, policy) as session:
        session.read(tokens[:200])
        session.recall(session.ledger.dropped_segments()[0], "test")
        save_session(session, path, extra={"title": "mill"})
        other_engine = LlamaEngine.load(tiny_gguf.write(tmp_path / "same.gguf"), threads=1, cells=256)
        other, extra = open_session(other_engine, path)
        assert extra == {"title": "mill"}
        session.read(tokens[200:])
        other.read(tokens[200:])
        np.testing.assert_allclose(other.logits, session.logits, atol=1e-3)
        assert other.ledger.column("state").tolist() == session.ledger.column("state").tolist()
        assert other.memory.positions().tolist() == session.memory.positions().tolist()
        other.close()
        other_engine.close()


def test_a_document_answers_the_same_after_opening(engine: LlamaEngine, tmp_path: Path) -> None:
    path = tmp_path / "doc.anchors"
    with Document.read(engine, POLICIES[0], TEXT, title="mill") as document:
        before = document.ask("Who bought it?", max_tokens=8).text
        document.save(path)
    with Document.open(engine, path) as again:
        assert again.title == "mill"
        assert again.ask("Who bought it?", max_tokens=8).text == before


@pytest.fixture(scope="module")
def saved(engine: LlamaEngine, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "x.anchors"
    with Session(engine, POLICIES[0]) as session:
        session.read(engine.tokenizer.encode(TEXT))
        save_session(session, path)
    return path.read_bytes()


def test_another_models_file_is_refused(saved: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(saved)
    other = LlamaEngine.load(tiny_gguf.write(tmp_path / "other.gguf", seed=1), threads=1, cells=256)
    with pytest.raises(SavedStateError, match="open it with the model that read it"):
        open_session(other, tmp_path / "x")
    other.close()


def test_a_missing_file_is_refused(engine: LlamaEngine, tmp_path: Path) -> None:
    with pytest.raises(SavedStateError, match="no saved document"):
        open_session(engine, tmp_path / "nothing")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_the_file_is_refused(
    engine: LlamaEngine, saved: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["cut", "flip", "noise"]))
    at = data.draw(st.integers(0, len(saved) - 1))
    changed = {
        "cut": saved[:at],
        "flip": saved[:at] + bytes([saved[at] ^ data.draw(st.integers(1, 255))]) + saved[at + 1 :],
        "noise": data.draw(st.binary(max_size=64)) if kind == "noise" else b"",
    }[kind]
    path = tmp_path / "damaged"
    path.write_bytes(changed)
    with pytest.raises(SavedStateError):
        open_session(engine, path)
    with Session(engine, POLICIES[0]) as session:  # the engine is as usable as before
        session.read(engine.tokenizer.encode("Still here."))
