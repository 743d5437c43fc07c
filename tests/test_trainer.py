"""A training run: it learns, stops and goes on to the same weights, and leaves an adapter that loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_gguf
from gguf.quants import dequantize
from policies import POLICIES, TEXT

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny  # noqa: E402 (needs torch)
from safetensors.torch import load_file  # noqa: E402
from test_train_student import batch, incremental  # noqa: E402
from transformers import LlamaConfig, TrainerCallback  # noqa: E402

from anchorkv.config import AnchorConfig, preset  # noqa: E402
from anchorkv.engines.torch import TorchEngine  # noqa: E402
from anchorkv.engines.torch_tokenizer import TorchTokenizer  # noqa: E402
from anchorkv.errors import ConfigError, DataError  # noqa: E402
from anchorkv.export import compare, merge  # noqa: E402
from anchorkv.train.progress import LOG, Progress  # noqa: E402
from anchorkv.train.student import Policies, Student  # noqa: E402
from anchorkv.train.trainer import (  # noqa: E402
    STATE,
    STREAM,
    Settings,
    begin_as,
    give_anchor,
    train,
    with_adapter,
)

POLICY = AnchorConfig(reduction=6, max_segment=24, recall="off", scorer="frequency")


class StopAfter(TrainerCallback):
    """As if killed right after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


def write_texts(path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number in range(40):
            file.write(json.dumps({"text": f"Chapter {number}. {TEXT} {TEXT[number:]}"}) + "\n")
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Six steps of two blocks."""
    tiny.save_tiny(tmp_path / "model")
    return Settings(
        model=str(tmp_path / "model"), data=str(write_texts(tmp_path / "text.jsonl")), policy=POLICY,
        tokens=6 * 2 * 256, length=256, accumulation=2, rank=4, alpha=8, rate=0.01,
    )


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one: Path, other: Path, atol: float = 1e-5) -> None:
    found = weights(other)
    for name, wanted in weights(one).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=atol)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings, whole, save_steps=100)
    train(settings, parts, save_steps=2, callbacks=(StopAfter(4),))
    assert (parts / "checkpoint-4").is_dir()
    assert any(value.abs().max() > 0 for name, value in weights(parts).items() if "lora_B" in name)
    encoded: list[str] = []
    encode = TorchTokenizer.encode
    monkeypatch.setattr(
        TorchTokenizer, "encode", lambda self, text, special=False: encoded.append(text) or encode(self, text, special)
    )
    train(settings, parts, save_steps=2)
    assert_same(whole, parts)
    # The check before the run tokenises 40 beginnings; of what the run had read, only what was still open follows.
    stream = json.loads((parts / "checkpoint-4" / STREAM).read_text(encoding="utf-8"))
    assert stream["blocks"] == 8
    assert len(encoded) < 40 + 2 * 4 + 2 * len(stream["packing"]) + 4


def test_a_step_may_be_cut_otherwise_but_not_grow(settings: Settings, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings, whole)
    train(settings, parts, save_steps=2, callbacks=(StopAfter(2),))
    with pytest.raises(ConfigError, match="read 2 blocks a step and would now read 4"):
        train(replace(settings, rows=2), parts)
    train(replace(settings, rows=2, accumulation=1), parts)
    assert_same(whole, parts)


def test_a_finished_run_is_left_as_it_is(settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(settings, out)
    before = weights(out)
    (out / "adapter_model.safetensors").unlink()  # as if killed between the last checkpoint and the end
    train(settings, out)
    assert all((before[name] == value).all() for name, value in weights(out).items())
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-6"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path]:
    """A run's settings, and the folder of a "whole" run and of one that was killed after its second checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    tiny.save_tiny(folder / "model")
    settings = Settings(
        model=str(folder / "model"), data=str(write_texts(folder / "text.jsonl")), policy=POLICY, tokens=6 * 256,
        length=256, accumulation=1, rank=4, alpha=8, rate=0.01,
    )
    train(settings, folder / "whole", save_steps=100)
    train(settings, folder / "parts", save_steps=2, callbacks=(StopAfter(4),))
    return settings, folder


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no state": lambda folder: (folder / STATE).unlink(),
    "state": lambda folder: cut(folder / STATE),
    "stream": lambda folder: cut(folder / STREAM),
    "adapter": lambda folder: cut(folder / "adapter_model.safetensors"),
    "no adapter": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "empty optimizer": lambda folder: (folder / "optimizer.pt").write_bytes(b""),
    "optimizer": lambda folder: cut(folder / "optimizer.pt"),
    "just begun": lambda folder: [path.unlink() for path in folder.iterdir() if path.name != "rng_state.pth"],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_was_half_written_is_passed_over(
    stopped: tuple[Settings, Path], tmp_path: Path, damage: str
) -> None:
    settings, folder = stopped
    out, seen = tmp_path / "parts", []
    shutil.copytree(folder / "parts", out)
    DAMAGE[damage](out / "checkpoint-4")

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            seen.append(state.global_step)
            assert not (out / "checkpoint-4").exists()

    train(settings, out, callbacks=(Look(),))
    assert seen == [2]
    assert_same(folder / "whole", out)


def test_without_a_whole_checkpoint_the_run_begins_anew(stopped: tuple[Settings, Path], tmp_path: Path) -> None:
    settings, folder = stopped
    out = tmp_path / "parts"
    shutil.copytree(folder / "parts", out)
    for checkpoint in out.glob("checkpoint-*"):
        (checkpoint / STATE).unlink()
    train(settings, out)
    assert_same(folder / "whole", out)


def test_what_another_program_wrote_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    other = tmp_path / "out" / "checkpoint-9" / "weights.bin"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="other settings"):
        train(settings, tmp_path / "out")
    assert other.read_bytes() == b"precious"


def test_checkpoints_of_other_settings_are_refused(settings: Settings, tmp_path: Path) -> None:
    train(settings, tmp_path / "out", save_steps=2, callbacks=(StopAfter(2),))
    with pytest.raises(ConfigError, match="other settings"):
        train(replace(settings, rate=0.02), tmp_path / "out")


def test_the_adapter_loads_and_its_progress_is_logged(settings: Settings, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []
    progress = Progress(settings, out, settings.data, lambda done, total: seen.append((done, total)), None)
    train(settings, out, save_steps=3, log_steps=1, callbacks=(progress,))
    assert seen[-1] == (6 * 2 * 256, 6 * 2 * 256)
    rows = [json.loads(line) for line in (out / LOG).read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert {"context_recovered", "ratio", "reduction"} <= set(progress.last)
    assert AnchorConfig.load(out / "anchorkv.json") == POLICY
    plain, adapted = TorchEngine.load(settings.model), TorchEngine.load(settings.model, adapter=out)
    tokens = plain.tokenizer.encode(TEXT)[:30]
    one, other = (engine.open().decode(tokens, 0).logits for engine in (plain, adapted))
    assert abs(one - other).max() > 1e-3


def test_bad_data_stops_before_the_first_step(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine and long enough"}\n{"text": 7}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        train(replace(settings, data=str(tmp_path / "bad.jsonl")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["tokens", "length", "rate"])
def test_settings_out_of_range_are_named(settings: Settings, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(settings, **{field: 0})


# --- from another adapter ------------------------------------------------------------------------------------------


def test_a_run_starts_from_another_adapter(settings: Settings, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(settings, first)
    train(replace(settings, start=str(first), rate=1e-9), second)
    assert_same(first, second)
    train(replace(settings, start=str(first)), tmp_path / "third")
    one, other = weights(first), weights(tmp_path / "third")
    assert any((one[name] - other[name]).abs().max() > 1e-4 for name in one)


def test_starts_that_are_none_are_refused(settings: Settings, tmp_path: Path) -> None:
    first = tmp_path / "first"
    train(replace(settings, tokens=512), first)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="There is no adapter folder at"):
        train(replace(settings, start=str(tmp_path / "nothing")), out)
    with pytest.raises(ConfigError, match="has no adapter_config"):
        train(replace(settings, start=settings.model), out)
    with pytest.raises(ConfigError, match="is of rank 4, not 8"):
        train(replace(settings, start=str(first), rank=8), out)
    tiny.save_tiny(tmp_path / "neox", "gpt_neox")
    with pytest.raises(ConfigError, match="does not fit the model"):
        train(replace(settings, start=str(first), model=str(tmp_path / "neox")), out)
    with pytest.raises(ConfigError, match="choose one of them"):
        replace(settings, start=str(first), rank=0)
    cut(first / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="damaged or truncated"):
        train(replace(settings, start=str(first)), out)


# --- trained <AC> --------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    config = {**tiny._GROUPED, "tie_word_embeddings": request.param}
    monkeypatch.setitem(tiny.CONFIGS, "llama", lambda: LlamaConfig(**config))
    return bool(request.param)


def leave_nothing_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models get no token that could stand in for <AC>, and no row for another one."""
    monkeypatch.setattr(tiny, "SPECIAL", tiny.SPECIAL[:3])
    config = tiny.CONFIGS["llama"]().to_dict() | {"vocab_size": len(tiny.tiny_tokenizer())}
    monkeypatch.setitem(tiny.CONFIGS, "llama", lambda: LlamaConfig(**config))


@pytest.mark.parametrize("spare", ["a spare token", "a spare row", "nothing spare"])
def test_the_row_of_the_anchor_token_is_trained(
    tied: bool, spare: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spare == "a spare row":
        monkeypatch.setattr(tiny, "SPECIAL", tiny.SPECIAL[:3])
    elif spare == "nothing spare":
        leave_nothing_spare(monkeypatch)
    tiny.save_tiny(tmp_path / "model")
    policy, out = preset("paper-ac"), tmp_path / "out"
    settings = replace(settings, policy=policy, tokens=2 * 2 * 256)
    train(settings, out)

    plain = TorchEngine.load(settings.model)
    before = len(plain.tokenizer.hf)
    anchor = give_anchor(plain)
    assert (anchor == before) == (spare != "a spare token")
    assert (out / "tokenizer.json").is_file() == (spare != "a spare token")
    (row,) = weights(out)["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    if spare != "nothing spare":
        assert (row - plain.model.get_input_embeddings().weight[anchor]).abs().max() > 1e-4
    assert not any("base_layer" in name or name.endswith("embed_tokens.weight") for name in weights(out))

    # What is trained further is what the engine reads with the adapter, <AC>'s own logit apart.
    model = with_adapter(plain.model, replace(settings, start=str(out)), anchor)
    student = Student(model, plain.tokenizer, plain.info, Policies.only(policy), distil=0, next_token=1)
    engine = TorchEngine.load(settings.model, adapter=out)
    assert engine.tokenizer.anchor_id() == anchor
    assert torch.equal(engine.model.get_input_embeddings().weight[anchor], row)
    if spare == "nothing spare":
        assert engine.info.vocabulary == before + 1
    wrapped = engine.model.get_output_embeddings()
    assert hasattr(wrapped, "original_module") == tied
    engine.model.set_output_embeddings(getattr(wrapped, "original_module", wrapped))
    tokens = plain.tokenizer.encode(TEXT)
    losses, thinned = incremental(engine, policy, tokens)
    value = student(**batch([tokens]))["loss"]
    assert float(value.detach()) == pytest.approx(losses[thinned].sum() / len(tokens), rel=1e-4)
    value.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.requires_grad}
    (name,) = (name for name in gradients if "trainable_tokens_delta" in name)
    assert gradients[name].abs().max() > 0
    assert not student.head.weight.requires_grad


@pytest.mark.parametrize("rank", [0, 2])
def test_the_anchor_token_begins_as_a_full_stop(rank: int, settings: Settings) -> None:
    engine = TorchEngine.load(settings.model)
    anchor, stop = give_anchor(engine), engine.tokenizer.encode(".")[-1]
    before = engine.model.get_input_embeddings().weight.detach().clone()
    model = with_adapter(engine.model, replace(settings, rank=rank), anchor)
    begin_as(model, anchor, stop)
    with torch.no_grad():
        rows = model.get_input_embeddings()(torch.tensor([anchor, stop]))
    assert torch.equal(rows[0], before[stop])
    assert torch.equal(rows[1], before[stop])
    assert not torch.equal(before[anchor], before[stop])


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_trained_row_is_merged_into_a_gguf_file(
    is_tied: bool, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers wants the outcome of the one merge among the tokens.
    monkeypatch.setitem(tiny_gguf.CONTROL, 263, "\u0100\u0101")
    whole = tiny_gguf.weights
    if is_tied:
        monkeypatch.setattr(
            tiny_gguf, "weights", lambda seed=0: {k: v for k, v in whole(seed).items() if k != "output.weight"}
        )
    base, out = tiny_gguf.write(tmp_path / "tiny.gguf"), tmp_path / "out"
    train(replace(settings, model=str(base), policy=POLICIES["ac-2-see"], tokens=2 * 2 * 256), out)
    merge(base, out, tmp_path / "merged.gguf", "F32")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    embedding = dequantize(tensors["token_embd.weight"].data, tensors["token_embd.weight"].tensor_type)
    (row,) = weights(out)["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"].numpy()
    (anchor,) = (token for token, name in tiny_gguf.CONTROL.items() if name == "<AC>")
    np.testing.assert_array_equal(embedding[anchor], row)
    assert np.abs(row - tiny_gguf.weights()["token_embd.weight"][anchor]).max() > 1e-4
    assert ("output.weight" in tensors) != is_tied
    assert compare(base, out, tmp_path / "merged.gguf").kl < 1e-3


# --- all weights ---------------------------------------------------------------------------------------------------


def test_all_weights_are_trained_saved_and_resumed(
    tied: bool, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tied:
        leave_nothing_spare(monkeypatch)
    tiny.save_tiny(tmp_path / "model")
    settings = replace(settings, rank=0, rate=1e-3, next_token=0.5, policy=preset("paper-ac"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings, whole, save_steps=100)
    train(settings, parts, save_steps=2, callbacks=(StopAfter(2),))
    train(settings, parts, save_steps=2)
    plain, one, other = (TorchEngine.load(folder) for folder in (settings.model, whole, parts))
    found = other.model.state_dict()
    for name, wanted in one.model.state_dict().items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)
    tokens = plain.tokenizer.encode(TEXT)[:30]
    assert one.tokenizer.encode(TEXT)[:30] == tokens
    assert one.info.vocabulary == plain.info.vocabulary + tied
    assert one.tokenizer.anchor_id() == (plain.info.vocabulary if tied else plain.tokenizer.anchor_id())
    said, before = (engine.open().decode(tokens, 0).logits for engine in (one, plain))
    assert abs(said[: len(before)] - before).max() > 1e-3
    shutil.rmtree(parts / "checkpoint-6")
    train(settings, parts)  # from checkpoint 4
    torch.testing.assert_close(
        TorchEngine.load(parts).model.get_input_embeddings().weight, one.model.get_input_embeddings().weight,
        rtol=1e-4, atol=1e-5,
    )
