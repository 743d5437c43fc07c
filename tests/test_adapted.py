"""The built-in model runs with the adapter that the package brings, merged once, and says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_gguf
from policies import TEXT, random_head
from test_export import Adapters, adapter, numbers  # noqa: F401 (a fixture)

import anchorkv
from anchorkv import models, shipped
from anchorkv.adapted import adapted
from anchorkv.config import AnchorConfig
from anchorkv.errors import ModelError
from anchorkv.evaluate.losses import read_losses
from anchorkv.export import POLICY_FILE, SCORER_FILE
from anchorkv.shipped import FOLDER, KNOWN

POLICY = AnchorConfig(reduction=3, recall="off", max_segment=24)


@pytest.fixture
def built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Adapters) -> Path:  # noqa: F811
    """A tiny model in the place of the built-in one, with an adapter, a policy and a scorer of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tiny_gguf.write(tmp_path / f"{models.DEFAULT}.gguf")
    folder = tmp_path / "shipped" / models.DEFAULT
    shutil.copytree(adapter(), folder)
    POLICY.save(folder / POLICY_FILE)
    random_head(tiny_gguf.LAYERS * (tiny_gguf.KV_HEADS * tiny_gguf.HEAD + 1) + 4, folder / SCORER_FILE)
    monkeypatch.setattr(models, "builtin", lambda: base)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    return folder


def test_the_adapter_is_merged_at_first_use_and_found_again(built_in: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with anchorkv.load(progress=lambda done, total: seen.append((done, total))) as model:
        assert (model.adapter, model.policy, model.engine.info.name) == (models.DEFAULT, POLICY, models.DEFAULT)
        assert Path(model.engine.info.scorer).read_bytes() == (built_in / SCORER_FILE).read_bytes()
        assert model.read_text(TEXT).accounting().reduction > 1
    assert seen[-1][0] == seen[-1][1] > 0
    before = list(seen)
    anchorkv.load(progress=lambda done, total: seen.append((done, total))).close()
    assert seen == before
    assert len(list((tmp_path / "cache" / "anchorkv" / "weights").iterdir())) == 1


def test_without_the_adapter_the_weights_are_the_models_own(built_in: Path, tmp_path: Path) -> None:
    with anchorkv.load(adapter=False) as model:
        assert model.adapter == ""
        assert model.policy == anchorkv.preset("default")
    assert not (tmp_path / "cache").exists()


def test_another_adapter_makes_another_file(built_in: Path) -> None:
    base = models.builtin()
    first = adapted(base, built_in)
    (built_in / POLICY_FILE).write_text(POLICY.replace(reduction=9).to_json(), encoding="utf-8")
    second = adapted(base, built_in)
    assert first != second
    one, other = numbers(first), numbers(second)
    assert all((one[name] == other[name]).all() for name in one)
    assert any((one[name] != value).any() for name, value in numbers(base).items())


def test_a_cache_that_cannot_be_written_is_told_in_one_sentence(
    built_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="--no-adapter"):
        anchorkv.load()


def test_options_change_the_models_own_policy(built_in: Path) -> None:
    from anchorkv.cli.options import PolicyOptions

    with anchorkv.load(policy=PolicyOptions(sinks=2).chosen()) as model:
        assert model.policy == POLICY.replace(sinks=2)
    with anchorkv.load(policy=PolicyOptions(policy="sepllm", sinks=2).chosen()) as model:
        assert model.policy == anchorkv.preset("sepllm").replace(sinks=2)


@pytest.mark.slow
def test_the_real_one_is_small_is_the_built_in_models_and_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = FOLDER / models.DEFAULT
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25e6
    assert AnchorConfig.load(folder / POLICY_FILE) == anchorkv.preset("default")
    assert json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    ratios = {}
    for with_adapter in (True, False):
        with anchorkv.load(adapter=with_adapter) as model:
            assert KNOWN[0].is_model(model.engine.info)
            tokens = model.engine.tokenizer.encode(
                (Path(__file__).parent.parent / "examples" / "english.txt").read_text(encoding="utf-8")
            )[:2048]
            means = {
                name: read_losses(model.engine, policy.replace(recall="off"), tokens).losses[512:].mean()
                for name, policy in {"full": anchorkv.preset("full"), "anchored": anchorkv.preset("default")}.items()
            }
            ratios[with_adapter] = means["anchored"] - means["full"]
    assert ratios[True] < ratios[False]


@pytest.mark.slow
def test_the_torch_engine_takes_it_unmerged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with anchorkv.load(engine="torch") as model:
        assert model.adapter == models.DEFAULT
        assert model.policy == AnchorConfig.load(FOLDER / models.DEFAULT / POLICY_FILE)
        assert any("lora" in name for name, _ in model.engine.model.named_modules())
    assert not (tmp_path / "anchorkv" / "weights").exists()
