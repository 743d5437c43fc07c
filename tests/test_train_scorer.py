"""The scorer's target and its fit: what far queries look at, and a head that finds it."""

from __future__ import annotations

import numpy as np
import pytest
from policies import TEXT

torch = pytest.importorskip("torch")

from tiny import tiny_model, tiny_tokenizer  # noqa: E402 (needs torch)

from anchorkv.config import AnchorConfig  # noqa: E402
from anchorkv.engines.torch import TorchEngine  # noqa: E402
from anchorkv.engines.torch_tokenizer import TorchTokenizer  # noqa: E402
from anchorkv.errors import ConfigError, ModelError  # noqa: E402
from anchorkv.train import scorer as module  # noqa: E402
from anchorkv.train.scorer import Sample, fit, sample  # noqa: E402
from anchorkv.train.usefulness import watch_text  # noqa: E402


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(tiny_model("llama"), TorchTokenizer(tiny_tokenizer()))


def test_usefulness_is_the_attention_of_far_queries(engine: TorchEngine) -> None:
    """Against transformers' own attentions."""
    tokens = engine.tokenizer.encode(TEXT)[:80]
    far = np.arange(80)[:, None] - np.arange(80)[None, :] > 20
    found, cells = watch_text(engine, tokens, far)
    model = engine.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(input_ids=torch.tensor([tokens]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    total, at = np.zeros(80), 0
    for attention, layer in zip(attentions, model.model.layers, strict=True):
        most = (attention[0] * torch.from_numpy(far)).amax(dim=1)  # [heads, n]
        values = torch.from_numpy(cells.values[:, at : at + 16]).view(80, 2, 8).repeat_interleave(2, dim=1)
        at += 16
        weight = layer.self_attn.o_proj.weight.detach().view(-1, 4, 8)
        written = torch.einsum("nhd,ohd->hno", values, weight).norm(dim=-1)
        total += (most * written).sum(dim=0).numpy()
    np.testing.assert_allclose(found[:59], np.log(total[:59]), atol=1e-3)
    assert (found[59:] == found[59:].min()).all()  # nobody is far enough behind these


def test_the_watch_leaves_the_model_as_it_was(engine: TorchEngine) -> None:
    tokens = engine.tokenizer.encode(TEXT)[:40]
    before = engine.open().decode(tokens, 0).logits
    watch_text(engine, tokens, np.tri(40, dtype=bool))
    np.testing.assert_array_equal(engine.open().decode(tokens, 0).logits, before)


def test_sliding_windows_are_refused() -> None:
    sliding = TorchEngine(tiny_model("mistral_sliding"), TorchTokenizer(tiny_tokenizer()))
    with pytest.raises(ModelError, match="full attention"):
        watch_text(sliding, [1, 2, 3], np.tri(3, dtype=bool))


def test_a_sample_leaves_out_what_nobody_could_look_at(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES", 50)
    tokens = engine.tokenizer.encode(TEXT)
    found = sample(engine, AnchorConfig(max_segment=24, scorer="frequency"), tokens)
    assert 0 < len(found.target) < len(tokens) - 50
    assert found.features.shape == (len(found.target), 2 * (2 * 8 + 1) + 4)
    assert float(found.target.mean()) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("hidden", [0, 16])
def test_a_head_finds_what_can_be_found(hidden: int) -> None:
    random = np.random.default_rng(0)
    truth = random.standard_normal(20)
    samples = []
    for _ in range(20):
        features = random.standard_normal((400, 20)).astype(np.float16)
        target = (features @ truth + 0.1 * random.standard_normal(400)).astype(np.float32)
        samples.append(Sample(features, target - target.mean()))
    found = fit(samples, hidden=hidden, epochs=30, rate=0.01)
    assert found.correlation > 0.9
    assert found.captured > 0.7
    scores = found.scorer.score_features(samples[-1].features.astype(np.float32))
    assert np.corrcoef(scores, samples[-1].target)[0, 1] > 0.9


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 10"):
        fit([Sample(np.zeros((5, 3), dtype=np.float16), np.zeros(5, dtype=np.float32))] * 3)
