"""The attention of training: chunk by chunk, or in FlexAttention's blocks, it is the dense mask's, gradients too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from policies import POLICIES, TEXT

torch = pytest.importorskip("torch")

from tiny import tiny_model, tiny_tokenizer  # noqa: E402 (needs torch)

from anchorkv.engines.torch import TorchEngine  # noqa: E402
from anchorkv.engines.torch_model import layer_kinds  # noqa: E402
from anchorkv.engines.torch_tokenizer import TorchTokenizer  # noqa: E402
from anchorkv.train.attention import CHUNK, _Sparse, chunks, is_plain, masked  # noqa: E402
from anchorkv.train.plan import PlanningEngine, plan  # noqa: E402
from anchorkv.train.student import join, reading  # noqa: E402
from anchorkv.visibility import Bools  # noqa: E402

SIZES = [1, CHUNK - 1, CHUNK, 3 * CHUNK + 5]


def random_mask(size: int, seed: int) -> Bools:
    """Segments of random length; a query sees its own segment and some random tokens of those before."""
    random = np.random.default_rng(seed)
    segment = np.cumsum(random.random(size) < 0.1)
    kept = random.random(size) < 0.15
    return np.tri(size, dtype=bool) & ((segment[:, None] == segment[None, :]) | kept[None, :])


def packed(*masks: Bools, size: int) -> Bools:
    """Documents beside each other, and padding that sees itself."""
    out, at = np.eye(size, dtype=bool), 0
    for mask in masks:
        out[at : at + len(mask), at : at + len(mask)] = mask
        at += len(mask)
    return out


def attended(query: Any, key: Any, value: Any, masks: list[Bools], scale: float) -> Any:
    dense = torch.from_numpy(np.stack(masks))[:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=dense, scale=scale, enable_gqa=True
    )


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_the_chunks_give_what_the_dense_mask_gives(size: int, groups: int) -> None:
    torch.manual_seed(size)
    kv_heads, dim, scale = 2, 8, 0.3
    masks = [
        random_mask(size, 1),
        packed(random_mask(size // 3, 2), random_mask(size // 2, 3), size=size),
        np.tri(size, dtype=bool),
    ]
    query = torch.randn(3, kv_heads * groups, size, dim, requires_grad=True)
    key, value = (torch.randn(3, kv_heads, size, dim, requires_grad=True) for _ in range(2))
    told = torch.randn(3, kv_heads * groups, size, dim)

    wanted = attended(query, key, value, masks, scale)
    gradients = torch.autograd.grad(wanted, (query, key, value), told)
    found = _Sparse.apply(query.view(3, kv_heads, groups, size, dim), key, value, chunks(masks), scale).view_as(query)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found, (query, key, value), told), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_chunk_meets_only_what_its_queries_see() -> None:
    mask = np.eye(2 * CHUNK, dtype=bool)
    mask[:, 0] = True
    first, second = chunks([mask])
    assert first.seen.tolist() == list(range(CHUNK))
    assert second.seen.tolist() == [0, *range(CHUNK, 2 * CHUNK)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def rows_of(names: list[str]) -> tuple[Any, Any, list[Bools]]:
    """ids and positions [rows, m] and masks of TEXT under policies; each row holds a second document."""
    tokenizer = TorchTokenizer(tiny_tokenizer())
    tokens = tokenizer.encode(TEXT)
    engine = PlanningEngine(tokenizer, TorchEngine(tiny_model(), tokenizer).info)
    readings = []
    for name in names:
        policy = POLICIES[name].replace(recall="off", cell_budget=None)
        parts = [tokens, tokens[30:]]
        readings.append(join([reading(plan(engine, policy, part)) for part in parts], [len(part) for part in parts]))
    width = max(len(found.tokens) for found in readings) + 3
    ids, positions = (torch.zeros(len(names), width, dtype=torch.long) for _ in range(2))
    for row, found in enumerate(readings):
        ids[row, : len(found.tokens)] = torch.from_numpy(found.tokens)
        positions[row, : len(found.tokens)] = torch.from_numpy(found.positions)
    return ids, positions, [packed(found.mask, size=width) for found in readings]


def logits(model: Any, ids: Any, positions: Any, masks: list[Bools], kind: str | None) -> Any:
    with masked(model, masks, is_plain(model, layer_kinds(model.config)), kind) as mask:
        return model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits


def test_a_model_says_the_same_with_chunks(model: Any) -> None:
    ids, positions, masks = rows_of(["sel", "paper-ac", "ep-sel-ac"])
    wanted, found = (logits(model, ids, positions, masks, kind) for kind in ("dense", None))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(input_ids=ids, position_ids=positions, use_cache=False).logits, wanted, atol=1e-2)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_a_model_says_the_same_in_flex_attentions_blocks(model: Any) -> None:
    ids, positions, masks = rows_of(["sel", "paper-ac"])
    with torch.no_grad():
        wanted, found = (logits(model, ids, positions, masks, kind) for kind in ("dense", "flex"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["sparse", "flex"])
def test_the_models_own_attention_comes_back_after_an_error(model: Any, kind: str) -> None:
    def fail() -> None:
        with masked(model, [np.tri(4, dtype=bool)], True, kind):
            assert model.config._attn_implementation != "sdpa"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.config._attn_implementation == "sdpa"


def test_a_model_with_windows_keeps_its_own_attention() -> None:
    model = tiny_model("mistral_sliding")
    assert not is_plain(model, layer_kinds(model.config))
    mask = np.tri(4, dtype=bool)
    with masked(model, [mask], plain=False) as dense:
        assert model.config._attn_implementation == "sdpa"
        assert dense is not None
        assert (dense[0, 0].numpy() == mask).all()
