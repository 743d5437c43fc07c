"""Capacity and cost: the formulas against what engines hold, their edges, where shapes come from, the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from capacity_cases import any_shape, assumptions, inputs, shape
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from policies import TEXT
from typer import Typer
from typer.testing import CliRunner

from anchorkv.cli.app import _Program
from anchorkv.cli.capacity import capacity as command
from anchorkv.config import AnchorConfig, preset
from anchorkv.engines.llama import LlamaEngine
from anchorkv.errors import ConfigError
from anchorkv.poc import shapes
from anchorkv.poc.capacity import (
    BLOCKS,
    CapacityInputs,
    ModelShape,
    cache_bytes,
    chosen_reduction,
    full_bytes,
    held_cells,
    kv_bytes,
    machines,
    nbytes,
    peak_cells,
    row,
    rows,
    saving,
    sessions,
    weight_bytes,
)
from anchorkv.session import Session

GIB = 2**30
runner = CliRunner()
program = Typer(cls=_Program)
program.command("capacity")(command)
program.command("other")(lambda: None)


# --- against what engines hold -------------------------------------------------------------------------------------


def held_by_engine(session: Session, tokens: list[int]) -> tuple[int, int, int]:
    session.read(tokens)
    found = session.accounting()
    return found.kept_bytes, found.peak_bytes, found.full_bytes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    engine = LlamaEngine.load(tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf"), threads=1, cells=256)
    yield engine
    engine.close()


@pytest.mark.parametrize(("kv_type", "layers", "heads", "kv_heads"), [
    ("f16", 2, 4, 2), ("f16", 3, 4, 4), ("f16", 5, 4, 1), ("q8_0", 3, 2, 1), ("q4_0", 3, 2, 1), ("q8_0", 2, 2, 2),
])
def test_bytes_equal_those_that_llama_cpp_measures(
    tmp_path: Path, kv_type: str, layers: int, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several shapes, grouped queries among them, and every type of cell that the engine has."""
    sizes = {"LAYERS": layers, "HEADS": heads, "KV_HEADS": kv_heads, "HEAD": tiny_gguf.HIDDEN // heads}
    for name, value in sizes.items():
        monkeypatch.setattr(tiny_gguf, name, value)
    path = tiny_gguf.write(tmp_path / "tiny.gguf")
    engine = LlamaEngine.load(path, threads=1, cells=256, kv_type=kv_type)
    own = shapes.of_info(engine.info, path.stat().st_size)
    try:
        with Session(engine, preset("full")) as session:
            tokens = engine.tokenizer.encode(TEXT)
            kept, _, full = held_by_engine(session, tokens)
    finally:
        engine.close()
    assert (own.layers, own.kv_heads) == (layers, kv_heads)
    assert kv_bytes(own, 1, kv_type) == engine.info.cell_bytes
    assert full_bytes(own, len(tokens), kv_type) == kept == full


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma3", "qwen3"])
def test_bytes_equal_those_that_torch_measures(architecture: str) -> None:
    """Grouped queries, none, sliding layers, heads of another size than hidden / heads."""
    tiny = pytest.importorskip("tiny")
    from anchorkv.engines.torch import TorchEngine
    from anchorkv.engines.torch_tokenizer import TorchTokenizer

    tokenizer = TorchTokenizer(tiny.tiny_tokenizer(), tiny.VOCABULARY)
    engine = TorchEngine(tiny.tiny_model(architecture), tokenizer)
    own = shapes.of_info(engine.info, 1000)
    with Session(engine, AnchorConfig(reduction=4, recall="off", max_segment=24, scorer="frequency")) as session:
        session.read(engine.tokenizer.encode(tiny.TEXT * 3))
        held = session.accounting().kept_cells
        assert session.memory.nbytes() == kv_bytes(own, held, "f32")
    assert kv_bytes(own, 1, "f32") == engine.info.cell_bytes


@pytest.mark.parametrize("changes", [
    {"reduction": 4.0, "max_segment": 24}, {"reduction": 8.0, "max_segment": 48, "recent_window": 2, "sinks": 16},
    {"reduction": 3.0, "max_segment": 16, "min_segment": 4, "cell_budget": 120},
])
def test_an_anchored_session_holds_what_the_formula_says_at_most(llama: LlamaEngine, changes: dict[str, Any]) -> None:
    """Never more, and not so much less that the formula would be useless."""
    policy = AnchorConfig(scorer="frequency", recall="on", recall_cells=64, **changes)
    tokens = llama.tokenizer.encode(TEXT * 12)
    assumed = inputs(context=len(tokens)).of_policy(policy, llama.info.window)
    own = shapes.of_info(llama.info, 1000)
    with Session(llama, policy) as session:
        kept, peak, _ = held_by_engine(session, tokens)
        for segment in session.ledger.dropped_segments()[-2:]:
            session.recall(segment, "test")
        recalled = session.accounting()
    most = kv_bytes(own, held_cells(assumed, policy.reduction), "f16")
    assert 0.6 * most <= kept <= most
    assert peak <= most if policy.cell_budget is None else peak <= most + assumed.segment * llama.info.cell_bytes
    assert recalled.peak_bytes <= kv_bytes(own, peak_cells(assumed, policy.reduction), "f16")
    assert recalled.kept_cells > kept // llama.info.cell_bytes


# --- the formulas --------------------------------------------------------------------------------------------------


def test_blocks_are_those_of_ggml() -> None:
    for name, (size, numbers) in BLOCKS.items():
        block, bytes_ = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
        assert (bytes_, block) == (size, numbers)


@pytest.mark.parametrize(("name", "token"), [
    ("Llama-2-7B", 512 * 1024), ("Llama-3-8B", 128 * 1024), ("Llama-3-70B", 320 * 1024), ("Qwen2.5-7B", 56 * 1024),
    ("SmolLM2-135M", 22.5 * 1024),
])
def test_bytes_a_token_of_known_models(name: str, token: float) -> None:
    assert kv_bytes(shape(name), 1, "f16") == token
    assert kv_bytes(shape(name), 32, "q8_0") == token * 17
    assert kv_bytes(shape(name), 32, "q4_0") == token * 9


def test_by_hand() -> None:
    """Llama-3-8B on 24 GiB: 8,030,261,248 parameters of two bytes; 1 GiB a full session of 8,192 tokens."""
    found = row(inputs(users=50, price=1200), shape(), 12.0)
    left = int(24 * GIB * 0.9) - 2 * 8_030_261_248
    cells = 4 + 2 * 64 + 683 + 256
    assert found.full_bytes_session == GIB
    assert found.anchored_bytes_session == cells * 128 * 1024
    assert (found.sessions_full, found.sessions_anchored) == (left // GIB, left // (cells * 128 * 1024)) == (6, 50)
    assert (found.machines_full, found.machines_anchored) == (9, 1)
    assert (found.cost_full, found.cost_anchored, saving(found)) == (10_800, 1_200, 9_600)


def test_weights_by_type_or_by_file() -> None:
    assert weight_bytes(shape(), "f16") == 16_060_522_496
    assert weight_bytes(shape(), "q8_0") == 8_532_152_576
    known = ModelShape(**{**shape().model_dump(), "weight_bytes": 5})
    assert weight_bytes(known, "f16") == 5


def test_a_reduction_of_one_is_the_full_cache() -> None:
    found = row(inputs(reduction=1), shape(), 1.0)
    assert found.anchored_bytes_session == found.full_bytes_session
    assert found.machines_anchored == found.machines_full


def test_a_model_larger_than_the_machine_has_no_session_and_no_price() -> None:
    found = row(inputs(price=1000), shape("Llama-3-70B"), 12.0)
    assert (found.sessions_full, found.sessions_anchored, found.machines_full, found.machines_anchored) == (0, 0, 0, 0)
    assert saving(found) is None


def test_a_full_cache_that_fits_nowhere_has_no_saving() -> None:
    found = row(inputs(memory="18GB", reserve=0, context=100_000, price=10), shape(), 12.0)
    assert found.sessions_full == 0 < found.sessions_anchored
    assert saving(found) is None


def test_sliding_layers_stop_growing_with_the_full_cache_only() -> None:
    gemma = shape("Gemma-2-9B")
    assert full_bytes(gemma, 4096, "f16") == kv_bytes(gemma, 4096, "f16")
    assert full_bytes(gemma, 8192, "f16") == kv_bytes(gemma, 4096 + 2048, "f16")
    assert gemma.notes(8192) == ("sliding",)
    assert shape().notes(8193) == ("window",)


def test_a_budget_bounds_and_recall_comes_on_top() -> None:
    assumed = inputs(context=10**6, cell_budget=768)
    assert (held_cells(assumed, 12), peak_cells(assumed, 12)) == (768, 768 + 256)
    assert peak_cells(inputs(context=10**6, cell_budget=768, reading_cells=512), 12) == 768 + 512


def test_which_reduction_counts() -> None:
    assert chosen_reduction(inputs(reduction=5), 9.0) == 5
    assert chosen_reduction(inputs(), 9.0) == 9
    assert chosen_reduction(inputs(), 0.8) == 1
    assert chosen_reduction(inputs()) == 12
    assert rows(inputs(), [shape()], 9.0) == (row(inputs(), shape(), 9.0),)


@pytest.mark.parametrize(("text", "expected"), [
    ("24GB", 24 * GIB), ("24 GiB", 24 * GIB), ("0.5g", GIB // 2), ("512M", 512 * 2**20), ("1000", 1000),
    ("80 gb", 80 * GIB),
])
def test_sizes(text: str, expected: int) -> None:
    assert nbytes(text) == expected == inputs(memory=text).memory


@pytest.mark.parametrize(("fields", "named"), [
    ({"users": 0}, "users"), ({"context": 0}, "context"), ({"memory": "much"}, "24GB"), ({"memory": 0}, "memory"),
    ({"reserve": 1}, "reserve"), ({"reduction": 0.5}, "reduction"), ({"price": -1}, "price"),
    ({"currency": "€"}, "currency"), ({"kv_type": "q2"}, "kv_type"), ({"unknown": 1}, "unknown"),
    ({"price": float("nan")}, "price"),
])
def test_wrong_inputs_are_one_sentence(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as told:
        inputs(**fields)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("fields", [
    {"layers": 2}, {"layers": 0, "kv_heads": 1, "head_dim": 1},
    {"layers": 2, "kv_heads": 1, "head_dim": 8, "parameters": 0},
    {"layers": 2, "kv_heads": 1, "head_dim": 8, "parameters": 9, "sliding_layers": 3, "sliding_window": 8},
    {"layers": 2, "kv_heads": 1, "head_dim": 8, "parameters": 9, "sliding_layers": 1},
])
def test_wrong_shapes_are_one_sentence(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="model shape"):
        ModelShape(name="mine", **fields)


# --- hypothesis ----------------------------------------------------------------------------------------------------

@given(assumptions, any_shape())
def test_more_memory_never_holds_fewer_and_costs_never_more(fields: dict[str, Any], model: dict[str, Any]) -> None:
    small, large = inputs(**fields), inputs(**{**fields, "memory": fields["memory"] * 2})
    one, two = (row(each, ModelShape(**model), fields["reduction"]) for each in (small, large))
    assert two.sessions_full >= one.sessions_full
    assert two.sessions_anchored >= one.sessions_anchored
    assert two.cost_anchored <= one.cost_anchored or not one.machines_anchored


@given(assumptions, any_shape(), st.floats(1, 1000))
def test_a_higher_reduction_never_takes_more_and_anchors_never_more_than_all(
    fields: dict[str, Any], model: dict[str, Any], other: float
) -> None:
    low, high = sorted((fields["reduction"], other))
    assumed, own = inputs(**fields), ModelShape(**{**model, "sliding_layers": 0, "sliding_window": 0})
    one, two = row(assumed, own, low), row(assumed, own, high)
    assert two.anchored_bytes_session <= one.anchored_bytes_session <= one.full_bytes_session
    assert held_cells(assumed, low) <= peak_cells(assumed, low) <= assumed.context


@given(st.integers(1, 10**9), st.integers(0, 10**6), st.integers(0, 2**45), st.integers(1, 2**40))
def test_machines_are_enough_and_not_one_too_many(users: int, each: int, cache: int, session: int) -> None:
    count = machines(users, each)
    assert (count == 0) == (each == 0)
    assert not each or (count - 1) * each < users <= count * each
    assert sessions(cache, session) * session <= cache < (sessions(cache, session) + 1) * session


@given(assumptions)
def test_inputs_survive_json(fields: dict[str, Any]) -> None:
    assumed = inputs(**fields)
    assert CapacityInputs(**json.loads(assumed.model_dump_json())) == assumed
    assert 0 <= cache_bytes(assumed.memory, assumed.reserve, 0) <= assumed.memory


# --- the command ---------------------------------------------------------------------------------------------------


def call(*arguments: object, code: int = 0) -> Any:
    done = runner.invoke(program, ["capacity", *map(str, arguments)], env={"COLUMNS": "100"})
    assert done.exit_code == code, done.output
    return done


def test_the_command_prints_a_table() -> None:
    text = call("--model", "Llama-3-8B", "--memory", "24GB", "--context", 8192, "--users", 50, "--price", 1200).stdout
    for expected in ("Llama-3-8B", "1.0 GiB", "134 MiB", "10,800", "1,200", "Saves 9,600 USD", "not a measurement"):
        assert expected in text


def test_the_command_as_json_is_the_formulas() -> None:
    found = json.loads(call("-m", "Llama-3-8B", "-m", "Llama-3-70B", "--price", 100, "--reduction", 9, "--json").stdout)
    assumed = inputs(price=100, reduction=9)
    assert found["inputs"] == json.loads(assumed.model_dump_json())
    eight, seventy = found["models"]
    assert eight["sessions_anchored"] == row(assumed, shape(), 9).sessions_anchored
    assert seventy["problem"].startswith("The weights (131")
    assert seventy["saving"] is None


def test_the_command_takes_weights_as_a_type_or_a_size() -> None:
    by_type = json.loads(call("-m", "Llama-3-8B", "--weights", "q4_k", "--json").stdout)["models"][0]
    by_size = json.loads(call("-m", "Llama-3-8B", "--weights", "5GB", "--json").stdout)["models"][0]
    assert by_type["weight_bytes"] == -(-8_030_261_248 * 144 // 256)
    assert by_size["weight_bytes"] == 5 * GIB


@pytest.mark.parametrize(("arguments", "named"), [
    (("--users", 0), "users"), (("--memory", "lots"), "24GB"), (("-m", "llama-9"), "known models"),
    (("--weights", "q1"), "q4_k"), (("--kv-type", "q5"), "kv_type"), (("--reduction", 0.2), "reduction"),
    (("-m", "/nowhere/at.gguf"), "no file"),
])
def test_mistakes_are_one_sentence(arguments: tuple[object, ...], named: str) -> None:
    done = call(*arguments, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_lists_what_it_knows() -> None:
    assert "Qwen2.5-72B" in call("--list").stdout
    assert len(json.loads(call("--list", "--json").stdout)["models"]) == len(shapes.known())
