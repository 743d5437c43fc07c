"""A training run: it learns, stops and goes on to the same weights, and leaves an adapter that loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from policies import TEXT

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402
from tiny import save_tiny  # noqa: E402 (needs torch)
from transformers import TrainerCallback  # noqa: E402

from anchorkv.config import AnchorConfig  # noqa: E402
from anchorkv.engines.torch import TorchEngine  # noqa: E402
from anchorkv.errors import ConfigError, DataError  # noqa: E402
from anchorkv.train.progress import LOG, Progress  # noqa: E402
from anchorkv.train.trainer import Settings, train  # noqa: E402

POLICY = AnchorConfig(reduction=6, max_segment=24, recall="off", scorer="frequency")


class StopAfter(TrainerCallback):
    """As if killed right after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    save_tiny(tmp_path / "model")
    with (tmp_path / "text.jsonl").open("w", encoding="utf-8") as file:
        for number in range(40):
            file.write(json.dumps({"text": f"Chapter {number}. {TEXT} {TEXT[number:]}"}) + "\n")
    return Settings(
        model=str(tmp_path / "model"), data=str(tmp_path / "text.jsonl"), policy=POLICY, tokens=6 * 2 * 256, length=256,
        accumulation=2, rank=4, alpha=8, rate=0.01,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(settings: Settings, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings, whole, save_steps=100)
    train(settings, parts, save_steps=2, callbacks=(StopAfter(2),))
    assert (parts / "checkpoint-2").is_dir()
    train(settings, parts, save_steps=2)
    one, other = weights(whole), weights(parts)
    assert any(value.abs().max() > 0 for name, value in one.items() if "lora_B" in name)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


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
