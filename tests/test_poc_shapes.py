"""Where the shapes of models come from: the list, folders, GGUF files, the hub; and the report's part made of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from capacity_cases import inputs, shape

from anchorkv.catalog import Entry, describe
from anchorkv.engines.llama import LlamaEngine
from anchorkv.errors import ModelError
from anchorkv.poc import shapes
from anchorkv.poc.capacity import ModelShape, kv_bytes, rows


def test_the_list_is_whole() -> None:
    names = [known.name for known in shapes.known()]
    assert len(names) == len(set(names))
    assert {"Llama-2-7B", "Llama-3-8B", "Llama-3-70B", "Mistral-7B-v0.3", "Qwen2.5-72B", "SmolLM2-135M"} <= set(names)
    for known in shapes.known():
        assert known.parameters, known.name
        assert known.window, known.name
        assert known.kv_heads * known.head_dim * known.layers, known.name
        said = re.search(r"-([\d.]+)([BM])(-|$)", known.name)
        if said:  # the name's own size agrees with the parameters counted
            size = float(said[1]) * (1e9 if said[2] == "B" else 1e6)
            assert known.parameters == pytest.approx(size, rel=0.25), known.name


@pytest.mark.parametrize(
    "name", ["Llama-3-8B", "llama-3-8b", "LLAMA_3_8B", "meta-llama/Meta-Llama-3-8B", "Meta-Llama-3-8B"]
)
def test_a_known_model_by_its_names(name: str) -> None:
    assert shapes.find(name) == shape()
    assert shapes.find(name, 77).weight_bytes == 77


def test_an_unknown_name_is_told_what_is_alike() -> None:
    with pytest.raises(ModelError, match="Llama-3-8B") as told:
        shapes.find("Llama-3-8")
    assert "\n" not in str(told.value)


def test_a_gguf_file_as_its_engine_says(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf")
    engine = LlamaEngine.load(path, threads=1, cells=256)
    info = engine.info
    engine.close()
    found = shapes.find(str(path))
    assert kv_bytes(found, 1, "f16") == info.cell_bytes
    assert (found.layers, found.window, found.weight_bytes) == (info.layers, info.window, path.stat().st_size)


def config(folder: Path, **fields: Any) -> Path:
    base = {"model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
            "hidden_size": 64, "max_position_embeddings": 512}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**base, **fields}))
    return folder


def test_a_folder_needs_no_weights_where_their_size_is_given(tmp_path: Path) -> None:
    folder = config(tmp_path / "m")
    with pytest.raises(ModelError, match="give their size"):
        shapes.find(str(folder))
    found = shapes.find(str(folder), 1000)
    assert (kv_bytes(found, 1, "f16"), found.sliding_layers, found.hybrid) == (2 * 4 * 2 * 8 * 2, 0, False)


@pytest.mark.parametrize(("fields", "sliding", "layers"), [
    ({"sliding_window": 16}, 4, 4), ({"sliding_window": 16, "use_sliding_window": False}, 0, 4),
    ({"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}, 2, 4),
    ({"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}, 0, 1),
])
def test_layers_that_slide_and_layers_without_cells(
    tmp_path: Path, fields: dict[str, Any], sliding: int, layers: int
) -> None:
    found = shapes.find(str(config(tmp_path / "m", **fields)), 1000)
    assert (found.sliding_layers, found.layers, found.hybrid) == (sliding, layers, layers < 4)
    assert kv_bytes(found, 1, "f16") == 2 * layers * 2 * 8 * 2


def test_a_hub_model_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ModelError, match="cannot be had"):
        shapes.find("somebody/something-never-made")


def test_a_hub_model_is_described_once_its_configuration_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = config(tmp_path / "m")
    had: list[str] = []

    def described(name: str) -> Entry:
        return replace(describe(str(folder)), name=name) if had else Entry(name=name, spec=name)

    monkeypatch.setattr(shapes, "describe", described)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: had.append(f"{name} {file}"))
    assert shapes.find("somebody/some-model", 500).layers == 4
    assert had == ["somebody/some-model config.json"]


def test_the_reports_part() -> None:
    own = ModelShape(name="mine", layers=2, kv_heads=2, head_dim=16, weight_bytes=10**6)
    found = shapes.capacity(inputs(models=("Llama-3-8B",)), own, 7.5)
    assert [each.model for each in found.rows] == ["mine", "Llama-3-8B"]
    assert found.inputs["reduction"] == 7.5
    assert [model["name"] for model in found.models[:2]] == ["mine", "Llama-3-8B"]
    assert len(found.models) == len(shapes.known()) + 1
    assert found.rows == rows(inputs(), [own, shape()], 7.5)
    with pytest.raises(ModelError):
        shapes.capacity(inputs(models=("nothing-like-it",)))
