"""The built-in model on both engines: the guarantees of docs/design.md on real weights and real text. Slow."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_gguf import kl

import anchorkv
from anchorkv.engines.llama import LlamaEngine
from anchorkv.models import builtin
from anchorkv.session import Session

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "english.txt"
F16 = 1


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as an f16 GGUF."""
    import llama_cpp

    path = tmp_path_factory.mktemp("f16") / "model.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = F16, True
    assert llama_cpp.llama_model_quantize(str(builtin()).encode(), str(path).encode(), ctypes.byref(params)) == 0
    return path


@pytest.mark.parametrize("name", ["default", "paper-ep", "paper-ac", "sepllm"])
def test_llama_on_f16_equals_pytorch_in_fp32(f16: Path, name: str) -> None:
    pytest.importorskip("torch")
    from anchorkv.engines.torch import TorchEngine

    llama, torch = LlamaEngine.load(f16), TorchEngine.load(str(f16), dtype="fp32")
    text = EXAMPLE.read_text(encoding="utf-8")
    tokens = llama.tokenizer.encode(text)
    assert tokens == torch.tokenizer.encode(text)
    tokens = tokens[:320]
    policy = anchorkv.preset(name)
    if "AC" in policy.anchors:
        assert llama.tokenizer.anchor_id() == torch.tokenizer.anchor_id()
    found: dict[str, list[NDArray[np.float32]]] = {"llama": [], "torch": []}
    for engine in (llama, torch):
        with Session(engine, policy) as session:
            for token in tokens:
                session.read([token])
                assert session.logits is not None
                found[engine.name].append(session.logits)
    llama.close()
    vocabulary = min(len(found["llama"][0]), len(found["torch"][0]))
    divergence = kl(
        np.stack(found["torch"])[:, :vocabulary].astype(np.float64), np.stack(found["llama"])[:, :vocabulary]
    )
    assert divergence.mean() <= 1e-3


def test_cells_say_the_same_on_both_engines(f16: Path) -> None:
    pytest.importorskip("torch")
    from anchorkv.engines.torch import TorchEngine

    found = []
    for engine in (LlamaEngine.load(f16), TorchEngine.load(str(f16), dtype="fp32")):
        memory = engine.open()
        memory.decode(engine.tokenizer.encode(EXAMPLE.read_text(encoding="utf-8"))[:60], 0)
        found.append(memory.read_cells(np.arange(10, 60)))
        engine.close()
    for name in ("values", "key_norms"):
        ours, theirs = (getattr(cells, name) for cells in found)
        assert np.abs(ours - theirs).mean() <= 0.01 * np.abs(theirs).mean()


def test_the_readme_example(tmp_path: Path) -> None:
    with anchorkv.load() as model:
        document = model.read(EXAMPLE)
        assert document.accounting().reduction >= 10
        answer = document.ask("The era of what is over?", max_tokens=24)
        assert "government" in answer.text.lower()
        assert "".join(document.stream("Where is Lucius Wright a teacher?", max_tokens=24))
        document.save(tmp_path / "address.anchors")
        again = model.open(tmp_path / "address.anchors")
        assert again.ledger.counts() == document.ledger.counts()
        assert again.ask("The era of what is over?", max_tokens=24).text == answer.text


def test_32_000_tokens_pass_through_a_context_of_2_000_cells() -> None:
    with anchorkv.load() as model:
        text = EXAMPLE.read_text(encoding="utf-8")
        tokens = (model.engine.tokenizer.encode(text) * 5)[:32_000]
        with Session(model.engine, anchorkv.preset("default")) as session:
            session.read(tokens)
            assert session.accounting().peak_cells <= 768 + 64
            assert model.engine.cells <= 2048  # type: ignore[attr-defined]
            assert any("cell budget" in change.reason for change in session.ledger.changes)
