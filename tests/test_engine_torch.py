"""The PyTorch engine against plain forwards of the same model: one matrix over architectures and ways of reading."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BloomConfig, MambaConfig, T5Config

from anchorkv.engines.base import SURPRISE, Bools, Ints, ShowsAttention
from anchorkv.engines.torch import TorchEngine
from anchorkv.engines.torch_memory import TorchMemory
from anchorkv.engines.torch_model import fingerprint
from anchorkv.engines.torch_tokenizer import TorchTokenizer
from anchorkv.errors import CapacityError, ConfigError, ModelError, SavedStateError
from anchorkv.visibility import NEVER, Layout, Recalled, dense_mask, visible_from
from tests.tiny import ARCHITECTURES, SPECIAL, VOCABULARY, save_tiny, tiny_model, tiny_tokenizer

torch.set_num_threads(1)  # the tensors are too small to share out
N, TOLERANCE = 96, 1e-4
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@functools.cache
def engine(architecture: str = "llama") -> TorchEngine:
    return TorchEngine(tiny_model(architecture), TorchTokenizer(tiny_tokenizer()))


def text(seed: int = 0, n: int = N) -> list[int]:
    return np.random.default_rng(seed).integers(len(SPECIAL), VOCABULARY, n).tolist()


def layout(seed: int = 0, window: int = 0, n: int = N, blind: bool = False) -> Layout:
    """Random segments of 3 to 12 tokens; the last token of each is an anchor, and so are a few others."""
    rng = np.random.default_rng(seed)
    segment = np.repeat(np.arange(n), rng.integers(3, 13, n))[:n]
    end = np.append(np.diff(segment) > 0, False)
    return Layout(
        segment=segment, anchor=end | (rng.random(n) < 0.1), always=np.arange(n) < 2, blind=end & blind,
        evicted=np.full(n, NEVER), window=window,
    )


def plain(architecture: str, tokens: list[int], mask: Bools) -> torch.Tensor:
    """Logits [n, vocabulary] of the model's own forward without a cache, under the mask [n, n]."""
    model, n = engine(architecture).model, len(tokens)
    far = np.arange(n)[:, None] - np.arange(n)[None, :] >= 24
    full, sliding = (torch.from_numpy(m)[None, None] for m in (mask, mask & ~far))
    kinds = set(engine(architecture).kinds)
    masks = {"full_attention": full, "sliding_attention": sliding}
    attention_mask: Any = masks if len(kinds) > 1 else masks[kinds.pop()]
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([tokens]), attention_mask=attention_mask, position_ids=torch.arange(n)[None],
            use_cache=False,
        )
    return out.logits[0]


def close(got: Any, wanted: Any) -> bool:
    return bool(np.abs(np.asarray(got) - np.asarray(wanted)).max() <= TOLERANCE)


def read(memory: TorchMemory, tokens: list[int], rule: Layout, cuts: list[int]) -> dict[int, np.ndarray]:
    """Read tokens cut at `cuts`, freeing after each part what nobody will see; logits after each part's last token."""
    logits = {}
    for first, last in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        queries = np.arange(first, last)
        mask = dense_mask(rule, queries, np.concatenate([memory.positions(), queries]))
        logits[last - 1] = memory.decode(tokens[first:last], first, mask=mask).logits
        if last < len(tokens):
            held = memory.positions()
            memory.drop(held[~visible_from(rule, int(rule.segment[last]), held)])
    return logits


@every_architecture
def test_one_masked_decode_is_the_models_own_masked_forward(architecture: str) -> None:
    tokens, mask = text(), dense_mask(layout())
    wanted = plain(architecture, tokens, mask)
    memory = engine(architecture).open()
    assert close(memory.decode(tokens, 0, mask=mask).logits, wanted[-1])


@every_architecture
@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("step", [1, 7, 40])
def test_reading_in_parts_and_freeing_is_one_masked_forward(architecture: str, window: int, step: int) -> None:
    tokens, rule = text(1), layout(1, window, blind=True)
    wanted = plain(architecture, tokens, dense_mask(rule))
    memory = engine(architecture).open()
    for position, logits in read(memory, tokens, rule, list(range(step, N, step))).items():
        assert close(logits, wanted[position])
    assert len(memory.positions()) < N


@every_architecture
def test_without_a_mask_everything_held_is_seen(architecture: str) -> None:
    tokens = text(2)
    wanted = plain(architecture, tokens, np.tri(N, dtype=bool))
    memory = engine(architecture).open()
    assert close(memory.decode(tokens[:70], 0).logits, wanted[69])
    assert close(memory.decode(tokens[70:95], 70).logits, wanted[94])
    assert close(memory.decode(tokens[95:], 95).logits, wanted[95])


@every_architecture
def test_visible_positions_are_all_that_is_seen(architecture: str) -> None:
    tokens = text(3)
    mask = np.tri(N, dtype=bool)
    mask[60:, :60] = False
    mask[60:, [3, 41, 59]] = True
    memory = engine(architecture).open()
    memory.decode(tokens[:60], 0, logits=False)
    got = memory.decode(tokens[60:], 60, visible=np.array([3, 41, 59])).logits
    assert close(got, plain(architecture, tokens, mask)[-1])
    assert close(memory.positions(), np.arange(N))


@every_architecture
def test_forks_do_not_change_each_other(architecture: str) -> None:
    tokens, other = text(4), text(5)
    memory = engine(architecture).open()
    memory.decode(tokens[:50], 0)
    twin = memory.fork()
    twin.drop(np.arange(10))  # moves rows in place, so the buffers must be its own
    twin.decode(other[50:], 50)
    assert close(memory.decode(tokens[50:], 50).logits, plain(architecture, tokens, np.tri(N, dtype=bool))[-1])
    assert len(memory.positions()) == N
    assert len(twin.positions()) == N - 10


@every_architecture
def test_state_and_restore(architecture: str) -> None:
    tokens = text(6)
    memory = engine(architecture).open()
    memory.decode(tokens[:50], 0)
    memory.drop(np.arange(5, 20))
    copy = engine(architecture).restore({name: array.copy() for name, array in memory.state().items()})
    assert close(copy.positions(), memory.positions())
    assert copy.nbytes() == memory.nbytes()
    needs = frozenset({SURPRISE})
    wanted, got = memory.decode(tokens[50:], 50, needs=needs), copy.decode(tokens[50:], 50, needs=needs)
    assert close(got.logits, wanted.logits)
    assert close(got.surprise, wanted.surprise)


@every_architecture
def test_recall_restores_the_very_cells(architecture: str) -> None:
    """w = 0: a segment's cells depend on itself and the anchors before it, and those are still there."""
    tokens, rule = text(7), layout(7)
    memory = engine(architecture).open()
    whole = engine(architecture).open()
    whole.decode(tokens, 0, mask=dense_mask(rule))
    read(memory, tokens, rule, [int(i) for i in np.flatnonzero(np.diff(rule.segment)) + 1])
    held = memory.positions()
    memory.drop(held[~visible_from(rule, int(rule.segment[-1]) + 1, held)])
    before = memory.positions()
    for segment in (2, 5):
        span = np.flatnonzero(rule.segment == segment)
        earlier = memory.positions()[memory.positions() < span[0]]
        seen = earlier[rule.anchor[earlier] | rule.always[earlier]]
        memory.decode([tokens[i] for i in span], int(span[0]), visible=seen, logits=False)
        assert set(span.tolist()) <= set(memory.positions().tolist())
    held = memory.positions()
    assert (np.diff(held) > 0).all()
    for mine, theirs in zip(memory.cells.layers, whole.cells.layers, strict=True):
        for got, wanted in zip(mine.held(), theirs.held(), strict=True):
            assert close(got, wanted[:, :, held])
    more = text(8, 5)
    longer = Layout(
        segment=np.append(rule.segment, np.full(5, rule.segment[-1] + 1)), anchor=np.append(rule.anchor, [False] * 5),
        always=np.append(rule.always, [False] * 5), blind=np.append(rule.blind, [False] * 5),
        evicted=np.append(rule.evicted, np.full(5, NEVER)), window=0,
        recalls=[Recalled(2, N, int(NEVER)), Recalled(5, N, int(NEVER))],
    )
    assert len(held) > len(before)
    assert close(memory.decode(more, N).logits, plain(architecture, tokens + more, dense_mask(longer))[-1])


def _cells_of(memory: TorchMemory, positions: Ints) -> torch.Tensor:
    rows = np.flatnonzero(np.isin(memory.positions(), positions))
    return torch.stack([t[:, :, rows] for layer in memory.cells.layers for t in layer.held()])


def test_a_held_position_keeps_its_old_cell_but_is_seen_anew() -> None:
    tokens = text(9)
    memory, fresh = engine().open(), engine().open()
    memory.decode(tokens[:40], 0)
    fresh.decode(tokens[20:30], 20)
    memory.drop(np.setdiff1d(np.arange(40), [25, 39]))
    old = _cells_of(memory, np.array([25]))
    memory.decode(tokens[20:30], 20, visible=np.empty(0, dtype=np.int64))
    assert memory.positions().tolist() == [*range(20, 30), 39]
    assert torch.equal(_cells_of(memory, np.array([25])), old)
    assert close(_cells_of(memory, np.arange(26, 30)), _cells_of(fresh, np.arange(26, 30)))


@every_architecture
def test_decoding_together_is_decoding_alone(architecture: str) -> None:
    own = engine(architecture)
    lengths = [11, 90, 37]
    together, alone = [], []
    for r, n in enumerate(lengths):
        for group in (together, alone):
            memory = own.open()
            memory.decode(text(20 + r)[:n], 0)
            memory.drop(np.arange(2, n // 2))
            group.append(memory)
    for step in range(40):  # long enough for the shortest rows to grow, and drops to move cells, inside the batch
        tokens = [int(t) for t in np.random.default_rng(step).integers(4, VOCABULARY, len(together))]
        outputs = own.decode_together(
            [(m, token, n + step) for m, token, n in zip(together, tokens, lengths, strict=True)]
        )
        for r, (memory, token, n) in enumerate(zip(alone, tokens, lengths, strict=True)):
            assert close(outputs[r].logits, memory.decode([token], n + step).logits)
            if step % 9 == r:
                for either in (memory, together[r]):
                    either.drop(np.arange(n - 3, n + step - 2))
        if step == 20:  # one leaves: a new batch
            for group in (together, alone):
                group.pop(0).close()
            lengths.pop(0)
    for mine, theirs in zip(together, alone, strict=True):
        assert close(mine.positions(), theirs.positions())
        assert mine.nbytes() == theirs.nbytes()


def test_decoding_together_copies_once_and_leaves_forks_alone() -> None:
    first, second = engine().open(), engine().open()
    for memory in (first, second):
        memory.decode(text(30)[:40], 0)
    engine().decode_together([(first, 7, 40), (second, 8, 40)])
    batch = engine()._rows
    fork = first.fork()
    engine().decode_together([(first, 9, 41), (second, 10, 41)])
    assert engine()._rows is batch
    assert len(fork.positions()) == 41
    assert close(fork.decode([9], 41).logits, first.decode([11], 42).logits) is False
    with pytest.raises(ValueError, match="one token"):
        engine().decode_together([(first, 1, 43), (first, 1, 43)])


@every_architecture
def test_surprise_does_not_depend_on_the_cuts(architecture: str) -> None:
    tokens = text(10)
    logits = plain(architecture, tokens, np.tri(N, dtype=bool))
    wanted = -torch.log_softmax(logits[:-1], -1)[torch.arange(N - 1), torch.tensor(tokens[1:])]
    for cuts in ([], [1, 2, 50], [64]):
        memory, got = engine(architecture).open(), []
        for first, last in zip([0, *cuts], [*cuts, N], strict=True):
            out = memory.decode(tokens[first:last], first, needs=frozenset({SURPRISE}), logits=False)
            got.append(out.surprise)
        surprise = np.concatenate(got)
        assert surprise[0] == pytest.approx(math.log(VOCABULARY))
        assert close(surprise[1:], wanted)


def test_a_recall_does_not_disturb_the_next_surprise() -> None:
    tokens, needs = text(11), frozenset({SURPRISE})
    memory, other = engine().open(), engine().open()
    for each in (memory, other):
        each.decode(tokens[:30], 0, needs=needs)
    memory.drop(np.arange(5, 10))
    memory.decode(tokens[5:10], 5, visible=np.arange(5), needs=needs)
    got, wanted = (each.decode(tokens[30:], 30, needs=needs).surprise for each in (memory, other))
    assert close(got, wanted)


@every_architecture
def test_cells_are_read_as_they_are_held(architecture: str) -> None:
    memory = engine(architecture).open()
    memory.decode(text(12)[:20], 0)
    memory.drop(np.arange(5, 9))
    cells = memory.read_cells(np.array([3, 4, 9, 15]))
    (keys, values), rows = memory.cells.layers[1].held(), [3, 4, 5, 11]
    wide = values[0].transpose(0, 1).flatten(1)[rows]
    assert close(cells.values[:, -wide.shape[1] :], wide)
    assert close(cells.key_norms[:, 1], keys[0, :, rows].norm(dim=(0, 2)))
    with pytest.raises(ModelError, match="not held"):
        memory.read_cells(np.array([4, 5]))


@pytest.mark.parametrize("architecture", ["mistral_sliding", "gemma3"])
def test_a_sliding_window_counts_positions_not_cells(architecture: str) -> None:
    """Cells dropped in between must not let the window reach further back."""
    tokens = text(13)
    mask = np.tri(N, dtype=bool)
    mask[60:, 10:50] = False
    memory = engine(architecture).open()
    memory.decode(tokens[:60], 0)
    memory.drop(np.arange(10, 50))
    wanted = plain(architecture, tokens, mask)
    for i in range(60, N):
        assert close(memory.decode([tokens[i]], i).logits, wanted[i])


def test_bytes_are_those_of_the_tensors() -> None:
    memory = engine().open()
    assert memory.nbytes() == 0
    memory.decode(text()[:30], 0)
    assert memory.nbytes() == 30 * engine().info.cell_bytes == 30 * 2 * 2 * 2 * 8 * 4
    memory.drop(np.array([3, 4, 1000]))
    assert memory.nbytes() == 28 * engine().info.cell_bytes
    assert memory.capacity_bytes() > memory.nbytes()
    memory.trim()
    assert memory.capacity_bytes() == memory.nbytes()
    memory.close()
    assert memory.nbytes() == memory.capacity_bytes() == 0


def test_no_memory_left_leaves_the_cells_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = engine().open()
    memory.decode(text()[:10], 0)

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(type(engine().model.model.layers[1]), "forward", full)
        with pytest.raises(CapacityError, match="no memory left"):
            memory.decode([5], 10)
    assert memory.positions().tolist() == list(range(10))
    assert len(memory.decode([5], 10).logits) == VOCABULARY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_state(dtype: torch.dtype) -> None:
    own = TorchEngine(tiny_model().to(dtype), engine().tokenizer)
    memory = own.open()
    memory.decode(text()[:20], 0)
    copy = own.restore(memory.state())
    assert np.array_equal(copy.decode([9], 20).logits, memory.decode([9], 20).logits)
    with pytest.raises(SavedStateError, match="fp32"):
        engine().restore(memory.state())


def test_a_state_that_does_not_fit_is_refused() -> None:
    memory = engine().open()
    memory.decode(text()[:20], 0)
    state = memory.state()
    for broken, what in (
        ({**state, "positions": state["positions"][::-1]}, "ascending"),
        ({**state, "keys.1": state["keys.1"][:, :3]}, "shape"),
        ({name: array for name, array in state.items() if name != "values.0"}, "missing"),
    ):
        with pytest.raises(SavedStateError, match=what):
            engine().restore(broken)


def test_a_mask_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        engine().open().decode([1, 2], 0, mask=np.ones((2, 3), dtype=bool))


def test_the_fingerprint_follows_the_weights() -> None:
    assert fingerprint(tiny_model()) == fingerprint(tiny_model())
    changed = tiny_model()
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1
    assert len({fingerprint(tiny_model()), fingerprint(tiny_model(seed=1)), fingerprint(changed)}) == 3


# --- loading -------------------------------------------------------------------------------------------------------


def test_load_a_folder(tmp_path: Path) -> None:
    loaded = TorchEngine.load(save_tiny(tmp_path / "tiny"), device="cpu", dtype="fp32")
    assert (loaded.info.name, loaded.info.weights, loaded.info.layers) == ("tiny", "fp32", 2)
    assert close(loaded.open().decode(text(), 0).logits, engine().open().decode(text(), 0).logits)
    tokenizer = loaded.tokenizer
    said = "Naïve café — 日本 🙂\n\n  12"
    assert b"".join(map(tokenizer.piece, tokenizer.encode(said))).decode() == said
    assert tokenizer.decode(tokenizer.encode(said)) == said
    assert tokenizer.encode("<|im_end|>", special=True) == [2]
    assert 2 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.piece(2) == tokenizer.piece(10**6) == b""
    assert tokenizer.eos_ids == {0, 2}
    assert tokenizer.anchor_id() == SPECIAL.index("<|reserved_0|>")
    assert tokenizer.start_ids() == []
    chat = tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_load_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = save_tiny(tmp_path / "tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        tuned = peft.get_peft_model(tiny_model(), lora)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = TorchEngine.load(folder, device="cpu", dtype="fp32", adapter=tmp_path / "adapter")
    with torch.no_grad():
        wanted = tuned(input_ids=torch.tensor([text()])).logits[0, -1]
    assert close(loaded.open().decode(text(), 0).logits, wanted)
    assert loaded.info.fingerprint != engine().info.fingerprint
    with pytest.raises(ModelError, match="adapter_config"):
        TorchEngine.load(folder, adapter=folder)


def _broken(folder: Path, how: str) -> Path:
    save_tiny(folder)
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif how == "no weights":
        weights.unlink()
    elif how == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "bad config":
        (folder / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "cannot be loaded"), ("no weights", "cannot be loaded"), ("no tokenizer", "no tokenizer"),
        ("no config", "no config.json"), ("bad config", "cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_one_sentence(tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        TorchEngine.load(_broken(tmp_path / "tiny", how), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [T5Config(), BertConfig(architectures=["BertForMaskedLM"])])
def test_what_is_no_decoder_is_refused(tmp_path: Path, config: Any) -> None:
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="decoder"):
        TorchEngine.load(tmp_path)


# --- where the attention goes ----------------------------------------------------------------------------------------


def weights(architecture: str, tokens: list[int]) -> np.ndarray:
    """The library's own attention [layers, heads, n, n] of a plain causal forward."""
    model = tiny_model(architecture)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=torch.tensor([tokens]), output_attentions=True, use_cache=False)
    return np.stack([layer[0].numpy() for layer in out.attentions])


@every_architecture
@pytest.mark.parametrize("read", [0, 1, 60])
def test_on_the_full_cache_attention_is_what_transformers_says(architecture: str, read: int) -> None:
    tokens, rows = text(20), 9
    memory = engine(architecture).open()
    if read:
        memory.decode(tokens[:read], 0, logits=False)
    mask = np.tri(N, dtype=bool)[read:]
    got = engine(architecture).attention(memory, tokens[read:], read, mask, rows)
    assert got.shape == (N,)
    assert got.sum() == pytest.approx(1, abs=1e-5)
    wanted = weights(architecture, tokens)[:, :, -rows:].mean(axis=(0, 1, 2))
    assert np.abs(got - wanted).max() < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_attention_goes_to_what_the_rule_shows_and_changes_nothing(architecture: str) -> None:
    loaded, tokens, rule = engine(architecture), text(21), layout(21)
    assert isinstance(loaded, ShowsAttention)
    memory = loaded.open()
    read(memory, tokens[:70], rule, [30])
    memory.drop(memory.positions()[~visible_from(rule, int(rule.segment[70]), memory.positions())])
    twin, before = memory.fork(), memory.state()
    queries = np.arange(70, N)
    mask = dense_mask(rule, queries, np.concatenate([memory.positions(), queries]))
    implementation = loaded.config._attn_implementation
    got = loaded.attention(memory, tokens[70:], 70, mask, len(queries))
    assert got.sum() == pytest.approx(1, abs=1e-5)
    assert (got >= 0).all()
    assert (got[~mask.any(axis=0)] == 0).all()
    assert loaded.config._attn_implementation == implementation
    assert all(np.array_equal(before[name], value) for name, value in memory.state().items())
    ways = [one.decode(tokens[70:], 70, mask=mask).logits for one in (memory, twin)]
    assert np.array_equal(*ways)


def test_attention_is_the_same_however_many_queries_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(rows: int) -> Any:
        return engine().attention(engine().open(), text(22), 0, np.tri(N, dtype=bool), rows)

    whole = [shares(rows) for rows in (1, 20, N)]
    monkeypatch.setattr("anchorkv.engines.torch_attention.BLOCK", 7)
    assert all(close(shares(rows), wanted) for rows, wanted in zip((1, 20, N), whole, strict=True))


def test_a_model_that_does_not_tell_its_attention_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = engine()
    monkeypatch.setattr(loaded.model, "set_attn_implementation", lambda name: None)
    with pytest.raises(ModelError, match="does not tell where its attention goes"):
        loaded.attention(loaded.open(), text(23), 0, np.tri(N, dtype=bool), 1)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2),
        BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2),
    ],
)
def test_models_that_cannot_be_anchored_are_refused(config: Any) -> None:
    with pytest.raises(ModelError, match="anchor"):
        TorchEngine(AutoModelForCausalLM.from_config(config), engine().tokenizer)


def test_what_cannot_be_found_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no model at"):
        TorchEngine.load(tmp_path / "nothing")
    gguf = tmp_path / "short.gguf"
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ModelError, match="truncated or damaged"):
        TorchEngine.load(gguf)
    gguf.write_bytes(b"text")
    with pytest.raises(ModelError, match="not a GGUF"):
        TorchEngine.load(gguf)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="local folder or a GGUF file"):
        TorchEngine.load("nobody/nothing")
    with pytest.raises(ConfigError, match="dtype"):
        TorchEngine.load(tmp_path, dtype="int3")
    with pytest.raises(ConfigError, match="device"):
        TorchEngine.load(tmp_path, device="abacus")
