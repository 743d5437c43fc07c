"""Merging an adapter into a GGUF file: the weights it gives, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_gguf
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from policies import TEXT, random_head
from safetensors.numpy import save_file
from tiny_gguf import HEAD, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, VOCABULARY, kl
from typer.testing import CliRunner

import anchorkv
import anchorkv.cli.export
from anchorkv import AnchorConfig, preset
from anchorkv.cli import app
from anchorkv.engines.llama import LlamaEngine
from anchorkv.errors import ConfigError, ModelError
from anchorkv.export import BOUNDS, Agreement, MergedError, Settings, compare, merge, read_settings, settings_of
from anchorkv.ggufheader import read_header
from anchorkv.models import builtin

Array = NDArray[np.float32]
SHAPES = {
    "self_attn.q_proj": ("attn_q", HEADS * HEAD, HIDDEN), "self_attn.k_proj": ("attn_k", KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": ("attn_v", KV_HEADS * HEAD, HIDDEN), "self_attn.o_proj": ("attn_output", HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": ("ffn_gate", INNER, HIDDEN), "mlp.up_proj": ("ffn_up", INNER, HIDDEN),
    "mlp.down_proj": ("ffn_down", HIDDEN, INNER),
}
RANK, ALPHA = 4, 6.0
TOKENS = np.frombuffer(b"The pump on deck two was replaced on Monday; it ran nine hours.", np.uint8).astype(np.int64)
Adapters = Callable[..., Path]


# --- what is merged into what --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("base") / "tiny.gguf")


def lora(rows: int, columns: int, seed: int, rank: int = RANK) -> tuple[Array, Array]:
    """A [rank, columns] and B [rows, rank], large enough to change what the model says."""
    random = np.random.default_rng(seed)
    a = random.standard_normal((rank, columns)).astype(np.float32) / np.float32(np.sqrt(columns))
    return a, random.standard_normal((rows, rank)).astype(np.float32) * np.float32(0.3)


def every_module() -> dict[str, tuple[str, int, int]]:
    return {
        f"model.layers.{layer}.{module}": (f"blk.{layer}.{name}.weight", rows, columns)
        for layer in range(LAYERS) for module, (name, rows, columns) in SHAPES.items()
    }


def arrays_of(modules: dict[str, tuple[str, int, int]], rank: int = RANK) -> dict[str, Array]:
    arrays = {}
    for seed, (module, (_, rows, columns)) in enumerate(modules.items()):
        a, b = lora(rows, columns, seed, rank)
        arrays |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    return arrays


@pytest.fixture
def adapter(tmp_path: Path) -> Adapters:
    """Writes a PEFT folder: `arrays`, by default LoRA of every module, and a configuration with `changes`."""

    def write(arrays: dict[str, Any] | None = None, name: str = "adapter", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": False, "rank_pattern": {},
                  "alpha_pattern": {}, "modules_to_save": None, "use_dora": False, "init_lora_weights": True}
        (folder / "adapter_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        given = arrays_of(every_module()) if arrays is None else arrays
        save_file({key: np.ascontiguousarray(value) for key, value in given.items()},
                  folder / "adapter_model.safetensors")
        return folder

    return write


def permuted(rows: Array, heads: int) -> Array:
    """llama.cpp's order of the rows of q and k, row by row: half i of a head's pair j goes to 2 j + i."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for half in range(2):
            for pair in range(size // 2):
                out[head * size + 2 * pair + half] = rows[head * size + half * size // 2 + pair]
    return out


def in_file_order(module: str, delta: Array) -> Array:
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(module.rpartition(".")[2])
    return permuted(delta, heads) if heads else delta


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def numbers(path: Path) -> dict[str, Array]:
    return {name: dequantize(tensor.data, tensor.tensor_type) for name, tensor in tensors(path).items()}


def logits(path: Path) -> Array:
    """llama.cpp's, [n, vocabulary]."""
    engine = LlamaEngine.load(path, weights="as-is", threads=1)
    memory = engine.open()
    rows = np.stack([memory.decode([int(token)], at).logits for at, token in enumerate(TOKENS)])
    engine.close()
    return rows


def expected(scale: float = ALPHA / RANK) -> dict[str, Array]:
    weights = tiny_gguf.weights()
    for seed, (module, (name, rows, columns)) in enumerate(every_module().items()):
        a, b = lora(rows, columns, seed)
        weights[name] = weights[name] + in_file_order(module, np.float32(scale) * b @ a)
    return weights


def test_every_matrix_gets_its_product(base: Path, adapter: Adapters, tmp_path: Path) -> None:
    merge(base, adapter(), tmp_path / "out.gguf", "F32")
    found = numbers(tmp_path / "out.gguf")
    for name, wanted in expected().items():
        assert np.abs(found[name] - wanted).max() <= 1e-6, name


def test_llama_cpp_computes_what_the_merged_weights_say(base: Path, adapter: Adapters, tmp_path: Path) -> None:
    merge(base, adapter(), tmp_path / "out.gguf", "F32")
    causal = np.tri(len(TOKENS), dtype=bool)
    found = logits(tmp_path / "out.gguf")
    assert kl(tiny_gguf.reference(expected(), TOKENS, causal), found).max() < 1e-4
    assert kl(tiny_gguf.reference(tiny_gguf.weights(), TOKENS, causal), found).mean() > 1e-2


def test_scale_follows_the_configuration(base: Path, adapter: Adapters, tmp_path: Path) -> None:
    modules = {f"model.layers.{layer}.mlp.up_proj": (f"blk.{layer}.ffn_up.weight", INNER, HIDDEN) for layer in (0, 1)}
    arrays = arrays_of(modules)
    a, b = lora(INNER, HIDDEN, 9, rank=8)
    arrays["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"] = a
    arrays["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"] = b
    patterns = {"rank_pattern": {r"layers\.1\..*up_proj": 8}, "alpha_pattern": {"1.mlp.up_proj": 5}}
    folder = adapter(arrays, use_rslora=True, **patterns)
    merge(base, folder, tmp_path / "out.gguf", "F32")
    found, before = numbers(tmp_path / "out.gguf"), tiny_gguf.weights()
    a0, b0 = lora(INNER, HIDDEN, 0)
    for layer, wanted in enumerate((ALPHA / RANK**0.5 * b0 @ a0, 5 / 8**0.5 * b @ a)):
        name = f"blk.{layer}.ffn_up.weight"
        assert np.abs(found[name] - before[name] - wanted).max() < 2e-6


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision_adapters_are_read(base: Path, adapter: Adapters, tmp_path: Path, kind: str) -> None:
    modules = {"model.layers.0.mlp.up_proj": ("", INNER, HIDDEN)}
    arrays = arrays_of(modules)
    folder = adapter(arrays)
    if kind == "f16":
        adapter({key: value.astype(np.float16) for key, value in arrays.items()})
    else:  # numpy has no bf16, so the file is written by hand
        header, data = {}, b""
        for key, value in arrays.items():
            half = (value.view(np.uint32) >> 16).astype("<u2").tobytes()
            header[key] = {"dtype": "BF16", "shape": value.shape, "data_offsets": [len(data), len(data) + len(half)]}
            data += half
        text = json.dumps(header).encode()
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    merge(base, folder, tmp_path / "out.gguf", "F32")
    a, b = lora(INNER, HIDDEN, 0)
    found = numbers(tmp_path / "out.gguf")["blk.0.ffn_up.weight"] - tiny_gguf.weights()["blk.0.ffn_up.weight"]
    assert np.abs(found - ALPHA / RANK * b @ a).max() < 2e-2
    assert np.abs(found).max() > 0.1


def test_embedding_and_output(base: Path, adapter: Adapters, tmp_path: Path) -> None:
    a, b = lora(HIDDEN, VOCABULARY, 1)
    c, d = lora(VOCABULARY, HIDDEN, 2)
    whole = tiny_gguf.weights(seed=5)["token_embd.weight"]
    merge(base, adapter({
        "base_model.model.model.embed_tokens.lora_embedding_A": a,
        "base_model.model.model.embed_tokens.lora_embedding_B": b,
        "base_model.model.model.embed_tokens.base_layer.weight": whole,  # PEFT saves it along
        "base_model.model.lm_head.lora_A.weight": c, "base_model.model.lm_head.lora_B.weight": d,
    }), tmp_path / "out.gguf", "F32")
    found = numbers(tmp_path / "out.gguf")
    assert np.abs(found["token_embd.weight"] - whole - ALPHA / RANK * (b @ a).T).max() < 3e-6
    assert np.abs(found["output.weight"] - tiny_gguf.weights()["output.weight"] - ALPHA / RANK * d @ c).max() < 1e-6


@pytest.mark.parametrize("indices", [[262, 3], {"embed_tokens": [262, 3]}])
def test_trained_tokens_replace_rows(base: Path, adapter: Adapters, tmp_path: Path, indices: Any) -> None:
    rows = np.random.default_rng(0).standard_normal((2, HIDDEN)).astype(np.float32)
    folder = adapter(
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": rows},
        trainable_token_indices=indices,
    )
    merge(base, folder, tmp_path / "out.gguf", "F32")
    found, wanted = numbers(tmp_path / "out.gguf"), tiny_gguf.weights()
    wanted["token_embd.weight"][[262, 3]] = rows
    for name, weight in wanted.items():
        assert (found[name] == weight).all()


@pytest.fixture
def tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base whose embedding is its output too."""
    whole = tiny_gguf.weights
    with monkeypatch.context() as patch:
        patch.setattr(tiny_gguf, "weights",
                      lambda seed: {key: value for key, value in whole(seed).items() if key != "output.weight"})
        return tiny_gguf.write(tmp_path / "tied.gguf")


def test_lora_on_one_side_parts_tied_embeddings(tied: Path, adapter: Adapters, tmp_path: Path) -> None:
    before = tiny_gguf.weights()["token_embd.weight"]
    a, b = lora(HIDDEN, VOCABULARY, 1)
    merge(tied, adapter({
        "base_model.model.model.embed_tokens.lora_embedding_A": a,
        "base_model.model.model.embed_tokens.lora_embedding_B": b,
    }), tmp_path / "in.gguf", "F32")
    found = numbers(tmp_path / "in.gguf")
    assert np.abs(found["token_embd.weight"] - before - ALPHA / RANK * (b @ a).T).max() < 3e-6
    assert (found["output.weight"] == before).all()
    merge(tied, adapter({
        "base_model.model.lm_head.lora_A.weight": b.T, "base_model.model.lm_head.lora_B.weight": a.T,
    }), tmp_path / "out.gguf", "F32")
    found = numbers(tmp_path / "out.gguf")
    assert (found["token_embd.weight"] == before).all()
    assert np.abs(found["output.weight"] - before - ALPHA / RANK * (b @ a).T).max() < 3e-6
    weights = tiny_gguf.weights() | {"output.weight": found["output.weight"]}
    causal = np.tri(len(TOKENS), dtype=bool)
    assert kl(tiny_gguf.reference(weights, TOKENS, causal), logits(tmp_path / "out.gguf")).max() < 1e-4


def test_trained_tokens_stay_shared_by_tied_embeddings(tied: Path, adapter: Adapters, tmp_path: Path) -> None:
    rows = np.ones((1, HIDDEN), np.float32)
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    merge(tied, adapter({key: rows}, trainable_token_indices=[260]), tmp_path / "out.gguf", "F32")
    found = numbers(tmp_path / "out.gguf")
    assert "output.weight" not in found
    assert (found["token_embd.weight"][260] == 1).all()


# --- how it is stored ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOUNDS)
def test_every_kind_is_the_librarys_own_quantisation(base: Path, adapter: Adapters, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out.gguf"
    merge(base, adapter(), out, kind)
    found, wanted = tensors(out), expected()
    for name, tensor in found.items():
        if name.endswith("norm.weight"):
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            continue
        assert tensor.tensor_type.name == kind
        stored = quantize(wanted[name], tensor.tensor_type)
        step = np.abs(dequantize(stored, tensor.tensor_type) - dequantize(tensor.data, tensor.tensor_type))
        assert (step > 1e-5).mean() < 1e-3  # a value on the edge may round the other way
    file_type = gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]
    assert read_header(out).fields["general.file_type"] == file_type
    causal = np.tri(len(TOKENS), dtype=bool)
    assert kl(tiny_gguf.reference(wanted, TOKENS, causal), logits(out)).mean() < BOUNDS[kind]


def test_untouched_tensors_of_the_right_type_are_copied(base: Path, adapter: Adapters, tmp_path: Path) -> None:
    merge(base, adapter(), tmp_path / "q4.gguf", "Q4_1")
    one = {"model.layers.1.mlp.down_proj": ("", HIDDEN, INNER)}
    merge(tmp_path / "q4.gguf", adapter(arrays_of(one), name="one"), tmp_path / "again.gguf", "Q4_1")
    before, after = tensors(tmp_path / "q4.gguf"), tensors(tmp_path / "again.gguf")
    assert list(before) == list(after)
    changed = [name for name in before if before[name].data.tobytes() != after[name].data.tobytes()]
    assert changed == ["blk.1.ffn_down.weight"]


def test_rows_that_no_block_divides_become_f16(
    adapter: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_gguf, "INNER", 80)
    base = tiny_gguf.write(tmp_path / "odd.gguf")
    modules = {"model.layers.0.mlp.down_proj": ("", HIDDEN, 80)}
    merge(base, adapter(arrays_of(modules)), tmp_path / "out.gguf", "Q8_0")
    found = tensors(tmp_path / "out.gguf")
    assert found["blk.0.ffn_down.weight"].tensor_type.name == found["blk.1.ffn_down.weight"].tensor_type.name == "F16"
    assert found["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"
    a, b = lora(HIDDEN, 80, 0)
    wanted = tiny_gguf.weights()["blk.0.ffn_down.weight"] + ALPHA / RANK * b @ a
    assert np.abs(found["blk.0.ffn_down.weight"].data.astype(np.float32) - wanted).max() < 5e-3
    assert np.isfinite(logits(tmp_path / "out.gguf")).all()


def test_metadata_is_carried_over(base: Path, adapter: Adapters, tmp_path: Path) -> None:
    merge(base, adapter(), tmp_path / "out.gguf", "Q8_0")
    before, after = gguf.GGUFReader(base).fields, gguf.GGUFReader(tmp_path / "out.gguf").fields
    own = {"GGUF.kv_count", "general.file_type", "general.quantization_version"}
    assert set(after) - set(before) == {"general.quantization_version"}
    for name in set(before) - own:
        assert before[name].types == after[name].types
        assert before[name].contents() == after[name].contents(), name
    assert "tokenizer.chat_template" in after


def test_progress_ends_at_all_bytes(base: Path, adapter: Adapters, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    merge(base, adapter(), tmp_path / "out.gguf", "F16", progress=lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == steps[-1][1] > 0
    assert len({total for _, total in steps}) == 1


# --- settings ------------------------------------------------------------------------------------------------------


def test_settings_travel_in_the_file(base: Path, adapter: Adapters, tmp_path: Path) -> None:
    settings = Settings(AnchorConfig(reduction=7.5, pinned=("Ahab – 鯨",)), bytes(range(256)) * 8192, "mine")
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    merge(base, adapter(), first, "Q8_0", settings)
    assert read_settings(first) == settings
    assert np.isfinite(logits(first)).all()  # llama.cpp takes 2.7 MB of text as metadata
    merge(first, adapter(), second, "Q8_0")
    assert read_settings(second) == settings
    bare = Settings(None, None, "bare")
    merge(first, adapter(), second, "Q8_0", bare)
    assert read_settings(second) == bare
    assert read_settings(base) is None


def test_damaged_settings_are_refused(base: Path, adapter: Adapters, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    merge(base, adapter(), out, "F32", Settings(AnchorConfig(), b"abcdef", "mine"))
    data = out.read_bytes()
    for old, new in ((b'"sinks"', b'"sunks"'), (b"YWJjZGVm", b"YWJj*GVm")):
        assert data.count(old) == 1
        out.write_bytes(data.replace(old, new))
        with pytest.raises(ModelError, match=r"settings in .* cannot be read"):
            read_settings(out)
    out.write_bytes(b"GGUX" + data[4:])
    with pytest.raises(ModelError, match="not a GGUF file"):
        read_settings(out)


def test_settings_lie_beside_the_adapter(adapter: Adapters) -> None:
    folder = adapter()
    assert settings_of(folder) == Settings(None, None, "adapter")
    AnchorConfig(reduction=9).save(folder / "anchorkv.json")
    assert settings_of(folder).policy == AnchorConfig(reduction=9)
    (folder / "scorer.safetensors").write_bytes(b"no scorer")
    with pytest.raises(ModelError, match="not a scorer"):
        settings_of(folder)
    (folder / "scorer.safetensors").unlink()
    (folder / "anchorkv.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid JSON"):
        settings_of(folder)


# --- refusals ------------------------------------------------------------------------------------------------------

UP = "base_model.model.model.layers.0.mlp.up_proj."
EMBEDDING = "base_model.model.model.embed_tokens."


def pair(prefix: str = UP, rows: int = INNER, columns: int = HIDDEN, rank: int = RANK) -> dict[str, Array]:
    a, b = lora(rows, columns, 0, rank)
    return {prefix + "lora_A.weight": a, prefix + "lora_B.weight": b}


@pytest.mark.parametrize(("arrays", "config", "sentence"), [
    (None, {"use_dora": True}, "DoRA"),
    (None, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    (None, {"peft_type": "IA3"}, "of the kind IA3"),
    (None, {"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
    (None, {"layer_replication": [[0, 2], [1, 2]]}, "replicated layers"),
    (None, {"r": 8}, "not of rank 8"),
    (None, {"r": None}, "does not fit together"),
    (None, {"rank_pattern": {"(": 3}}, "does not fit together"),
    ({}, {}, "is empty"),
    (pair() | {UP + "lora_magnitude_vector": np.ones((1, INNER), np.float32)}, {}, "lora_magnitude_vector"),
    (pair() | {UP + "bias": np.ones((1, INNER), np.float32)}, {}, "up_proj.bias"),
    (pair() | {UP + "base_layer.weight": np.ones((INNER, HIDDEN), np.float32)}, {}, "base_layer"),
    (pair("base_model.model.model.layers.0.input_layernorm."), {}, "input_layernorm, which"),
    (pair("base_model.model.model.layers.0.mlp.experts.0.up_proj."), {}, "experts.0.up_proj, which"),
    (pair("base_model.model.model.layers.9.mlp.up_proj."), {}, "layers.9.mlp.up_proj, which"),
    ({UP + "lora_A.weight": pair()[UP + "lora_A.weight"]}, {}, "lora_B.weight' is missing"),
    (pair(rows=INNER + 32), {}, "for another model"),
    (pair(columns=HIDDEN * 2), {}, "for another model"),
    (pair("base_model.model.model.layers.0.self_attn.q_proj.", rows=HIDDEN * 2), {}, "for another model"),
    ({EMBEDDING + "weight": np.ones((VOCABULARY + 1, HIDDEN), np.float32)}, {}, "vocabulary of another size"),
    ({EMBEDDING + "token_adapter.trainable_tokens_delta": np.ones((2, HIDDEN), np.float32)},
     {"trainable_token_indices": [3]}, "2 trained tokens"),
    ({EMBEDDING + "token_adapter.trainable_tokens_delta": np.ones((1, HIDDEN), np.float32)},
     {"trainable_token_indices": [VOCABULARY]}, "vocabulary of another size"),
    ({EMBEDDING + "token_adapter.trainable_tokens_delta": np.ones((1, HIDDEN), np.float32)}, {}, "is missing"),
    ({UP + "lora_A.weight": np.ones(4, np.float32)}, {}, "of shape"),
    ({key: np.full_like(value, np.nan) for key, value in pair().items()}, {}, "no finite numbers"),
    ({key: value.astype(np.int32) for key, value in pair().items()}, {}, "weights of type I32"),
])
def test_what_cannot_be_merged_is_refused(
    base: Path, adapter: Adapters, tmp_path: Path, arrays: Any, config: dict[str, Any], sentence: str
) -> None:
    refuse(base, adapter(arrays, **config), tmp_path / "out" / "out.gguf", sentence)


def refuse(base: Path, folder: Path, out: Path, sentence: str, kind: str = "Q8_0") -> None:
    """One sentence, and nothing left behind."""
    out.parent.mkdir(exist_ok=True)
    with pytest.raises(ModelError) as caught:
        merge(base, folder, out, kind)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert list(out.parent.iterdir()) == []


def test_missing_and_damaged_files_are_refused(base: Path, adapter: Adapters, tmp_path: Path) -> None:
    out, whole = tmp_path / "out" / "out.gguf", adapter()
    refuse(base, tmp_path / "nowhere", out, "no adapter folder")
    refuse(base, whole, out, "cannot be stored as Q4_K", kind="Q4_K")
    refuse(tmp_path / "nowhere.gguf", whole, out, "cannot be read")
    refuse(whole / "adapter_config.json", whole, out, "not a GGUF file")
    short = tmp_path / "short.gguf"
    short.write_bytes(base.read_bytes()[:-1000])
    refuse(short, whole, out, "truncated")
    weights = whole / "adapter_model.safetensors"
    data = weights.read_bytes()
    for damaged in (b"", data[:7], data[:-1], b"\xff" * 8 + data[8:]):
        weights.write_bytes(damaged)
        refuse(base, whole, out, "damaged or truncated")
    weights.unlink()
    refuse(base, whole, out, "no adapter_model.safetensors")
    (whole / "adapter_config.json").write_text("[]", encoding="utf-8")
    refuse(base, whole, out, "cannot be read")
    (whole / "adapter_config.json").unlink()
    refuse(base, whole, out, "no adapter_config.json")


def test_unknown_architectures_are_refused(adapter: Adapters, tmp_path: Path) -> None:
    out = tmp_path / "out" / "out.gguf"
    refuse(tiny_gguf.write(tmp_path / "a.gguf", architecture="no-such"), adapter(), out, "known architecture")
    refuse(tiny_gguf.write(tmp_path / "b.gguf", architecture="baichuan"), adapter(), out, "order the rows of k_proj")


def test_other_architectures_keep_the_order_of_rows(adapter: Adapters, tmp_path: Path) -> None:
    base, out = tiny_gguf.write(tmp_path / "qwen.gguf", architecture="qwen2"), tmp_path / "out.gguf"
    modules = {"model.layers.0.self_attn.q_proj": ("", HEADS * HEAD, HIDDEN)}
    merge(base, adapter(arrays_of(modules)), out, "F32")
    a, b = lora(HEADS * HEAD, HIDDEN, 0)
    wanted = tiny_gguf.weights()["blk.0.attn_q.weight"] + ALPHA / RANK * b @ a
    assert np.abs(numbers(out)["blk.0.attn_q.weight"] - wanted).max() < 1e-6


def test_targets_that_cannot_be_written_are_refused(base: Path, adapter: Adapters, tmp_path: Path) -> None:
    folder = adapter()
    for target, sentence in (
        (tmp_path, "is a folder"), (tmp_path / "no" / "out.gguf", "no folder at"), (base, "is the base itself"),
        (base / "out.gguf", "no folder at"), (tmp_path / ("x" * 300), "cannot be written to"),
    ):
        before = base.read_bytes()
        with pytest.raises(ModelError, match=sentence):
            merge(base, folder, target)
        assert base.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_interrupted_merge_leaves_the_old_file(base: Path, adapter: Adapters, tmp_path: Path) -> None:
    out = tmp_path / "out" / "out.gguf"
    out.parent.mkdir()
    out.write_bytes(b"old")

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter(), out, progress=stop)
    assert out.read_bytes() == b"old"
    assert list(out.parent.iterdir()) == [out]


# --- the command ---------------------------------------------------------------------------------------------------

AGREES = Agreement(200, 1e-5, 0.995)


@pytest.fixture
def call() -> Callable[..., Any]:
    """Runs `anchorkv export` with the arguments."""
    if not any(command.name == "export" for command in app.registered_commands):
        app.command("export")(anchorkv.cli.export.export)

    def run(*arguments: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, ["export", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    return run


def comparing(monkeypatch: pytest.MonkeyPatch, outcome: Agreement | Exception | None) -> None:
    """What the comparison finds; None: torch is not installed."""

    def compare(*_: Path) -> Agreement:
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome

    monkeypatch.setattr(anchorkv.cli.export, "compare", compare)
    monkeypatch.setattr(anchorkv.cli.export, "_NEEDED", ("json",) if outcome else ("no_such_torch",))


def test_the_command_writes_and_verifies(
    base: Path, adapter: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    comparing(monkeypatch, AGREES)
    folder, out = adapter(), tmp_path / "out.gguf"
    AnchorConfig(reduction=9).save(folder / "anchorkv.json")
    text = call(folder, "--model", base, "--gguf", "q4_0", "--out", out).stdout
    assert "(Q4_0," in text
    assert "with policy in it" in text
    assert "mean KL 1e-05" in text
    assert "99.5%" in text
    settings = read_settings(out)
    assert settings is not None
    assert settings.policy == AnchorConfig(reduction=9)
    assert tensors(out)["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out.gguf"]


def test_the_command_reports_in_json(
    base: Path, adapter: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    comparing(monkeypatch, AGREES)
    report = json.loads(call(adapter(), "--model", base, "--out", tmp_path / "out.gguf", "--json").stdout)
    assert report["weights"] == "Q8_0"
    assert report["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert report["verified"]
    assert report["agreement"] == {"tokens": 200, "mean_kl": 1e-5, "bound": 2e-2, "argmax": 0.995}
    comparing(monkeypatch, None)
    report = json.loads(call(adapter(), "--model", base, "--out", tmp_path / "out.gguf", "--json").stdout)
    assert report["verified"] is False
    assert report["agreement"] is None
    assert "no_such_torch" in report["not_verified_because"]


def test_without_torch_it_says_so(
    base: Path, adapter: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    for outcome, reason in ((None, "no_such_torch"), (ModelError("No such thing."), "No such thing")):
        comparing(monkeypatch, outcome)
        result = call(adapter(), "--model", base, "--out", tmp_path / "out.gguf")
        assert f"not verified: {'that needs ' if outcome is None else 'PyTorch'}" in result.stderr
        assert reason in result.stderr
        assert (tmp_path / "out.gguf").is_file()


@pytest.mark.parametrize("outcome", [
    Agreement(200, 0.03, 0.7), Agreement(200, float("nan"), 0.0), MergedError("It cannot be loaded."),
])
def test_a_merged_model_that_disagrees_is_removed(
    base: Path, adapter: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any, outcome: Any
) -> None:
    comparing(monkeypatch, outcome)
    result = call(adapter(), "--model", base, "--out", tmp_path / "out.gguf", code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: The merged model ")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_command_wants_a_gguf_base(adapter: Adapters, tmp_path: Path, call: Any) -> None:
    for model in (tmp_path, "HuggingFaceTB/SmolLM2-135M", adapter() / "adapter_config.json"):
        result = call(adapter(), "--model", model, "--out", tmp_path / "out.gguf", code=2)
        assert "a GGUF file of the same model" in result.stderr
        assert result.stderr.count("\n") == 1


# --- beside PEFT itself --------------------------------------------------------------------------------------------


def with_peft(weights: dict[str, Array], folder: Path, **config: Any) -> Array:
    """Logits [n, vocabulary] of transformers' Llama with these weights and a random PEFT adapter, saved to `folder`."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    tied = "output.weight" not in weights
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
             "output.weight": "lm_head.weight"}
    for layer in range(LAYERS):
        names[f"blk.{layer}.attn_norm.weight"] = f"model.layers.{layer}.input_layernorm.weight"
        names[f"blk.{layer}.ffn_norm.weight"] = f"model.layers.{layer}.post_attention_layernorm.weight"
    names |= {name: f"{module}.weight" for module, (name, _, _) in every_module().items()}
    state = {names[name]: weight for name, weight in weights.items()}
    for module, (name, _, _) in every_module().items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(module.rpartition(".")[2])
        if heads:  # the file's order back to transformers'
            order = permuted(np.arange(len(weights[name]), dtype=np.float32)[:, None], heads)[:, 0].astype(int)
            state[f"{module}.weight"] = weights[name][np.argsort(order)]
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )).eval()
    found = model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=False)
    assert found.missing_keys == (["lm_head.weight"] if tied else [])
    if tied:
        model.tie_weights()
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name:
                parameter.normal_(std=0.3)
        out: Array = tuned(input_ids=torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    tuned.save_pretrained(folder)
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("config", [
    {"r": 4, "lora_alpha": 6, "target_modules": [module.rpartition(".")[2] for module in SHAPES], "use_rslora": True,
     "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"0.self_attn.k_proj": 9}},
    {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "v_proj"]},
    {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "v_proj"]},
    {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head"]},
    {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "trainable_token_indices": [84, 260]},
], ids=["linear", "embedding", "output", "both", "tokens"])
def test_the_merged_weights_say_what_peft_says(
    base: Path, tied: Path, tmp_path: Path, config: dict[str, Any], is_tied: bool
) -> None:
    weights = tiny_gguf.weights()
    if is_tied:
        del weights["output.weight"]
    wanted = with_peft(weights, tmp_path / "peft", **config)
    merge(tied if is_tied else base, tmp_path / "peft", tmp_path / "out.gguf", "F32")
    found = numbers(tmp_path / "out.gguf")
    found.setdefault("output.weight", found["token_embd.weight"])
    computed = tiny_gguf.reference(found, TOKENS, np.tri(len(TOKENS), dtype=bool))
    assert np.abs(computed - wanted).max() < 1e-3
    assert kl(computed, logits(tmp_path / "out.gguf")).mean() < 1e-3


@pytest.mark.filterwarnings("ignore")
def test_the_comparison_tells_right_from_wrong(
    adapter: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    # transformers wants the outcome of the one merge among the tokens.
    monkeypatch.setitem(tiny_gguf.CONTROL, 263, "\u0100\u0101")
    base, out = tiny_gguf.write(tmp_path / "base.gguf"), tmp_path / "out.gguf"
    folder = adapter(target_modules=[module.rpartition(".")[2] for module in SHAPES], task_type="CAUSAL_LM")
    merge(base, folder, out, "F32")
    right = compare(base, folder, out)
    assert right.tokens == 200
    assert right.kl < 1e-4
    assert right.argmax > 0.98
    merge(base, adapter(name="other", lora_alpha=5), out, "F32")
    assert compare(base, folder, out).kl > BOUNDS["F32"]
    out.write_bytes(base.read_bytes()[:5000])
    with pytest.raises(MergedError, match="cannot be loaded"):
        compare(base, folder, out)


@pytest.mark.slow
def test_the_built_in_model_is_merged_in_time_and_verified(adapter: Adapters, tmp_path: Path, call: Any) -> None:
    pytest.importorskip("peft")
    header = read_header(builtin())
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    modules = {}
    for layer in range(header.of_architecture("block_count")):
        for module, (name, _, _) in SHAPES.items():
            columns, rows = shapes[f"blk.{layer}.{name}.weight"]
            modules[f"model.layers.{layer}.{module}"] = ("", rows, columns)
    arrays = {key: value * np.float32(0.05) for key, value in arrays_of(modules).items()}
    folder = adapter(arrays, base_model_name_or_path="", task_type="CAUSAL_LM",
                     target_modules=[module.rpartition(".")[2] for module in SHAPES])
    started = time.perf_counter()
    merge(builtin(), folder, tmp_path / "out.gguf", "Q8_0")
    assert time.perf_counter() - started < 20
    report = json.loads(call(folder, "--gguf", "F16", "--out", tmp_path / "out.gguf", "--json").stdout)
    assert report["verified"]
    assert report["agreement"]["argmax"] > 0.97


def test_an_exported_file_needs_no_option(
    base: Path, adapter: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    policy, head = preset("default").replace(reduction=3, recall="off"), tmp_path / "head.safetensors"
    random_head(tiny_gguf.LAYERS * (tiny_gguf.KV_HEADS * tiny_gguf.HEAD + 1) + 4, head)
    out = tmp_path / "own.gguf"
    merge(base, adapter(), out, "F16", Settings(policy, head.read_bytes(), "own"))
    with anchorkv.load(out) as model:
        assert model.policy == policy
        session = model.read_text(TEXT).session
        assert session.choice.scorer is not None
        assert session.choice.scorer.name == "learned"
        assert Path(model.engine.info.scorer).read_bytes() == head.read_bytes()
    with anchorkv.load(out, policy="sepllm") as model:
        assert model.policy == preset("sepllm")
