"""What is trained is what runs: losses, masks and anchors of a training step against the incremental engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policies import POLICIES, TEXT, random_head

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tiny import tiny_model, tiny_tokenizer  # noqa: E402 (needs torch)

from anchorkv.config import AnchorConfig, preset  # noqa: E402
from anchorkv.engines.base import SURPRISE  # noqa: E402
from anchorkv.engines.torch import TorchEngine  # noqa: E402
from anchorkv.engines.torch_tokenizer import TorchTokenizer  # noqa: E402
from anchorkv.errors import ConfigError  # noqa: E402
from anchorkv.session import Session  # noqa: E402
from anchorkv.train.objective import apartness, candidates, loss  # noqa: E402
from anchorkv.train.student import Policies, Student, join, reading  # noqa: E402
from anchorkv.train.validate import validate  # noqa: E402

NAMES = ["paper-ep", "paper-ac", "ac-2-see", "sel", "ep-sel-ac", "sepllm"]


@pytest.fixture
def engine() -> TorchEngine:
    return TorchEngine(tiny_model("llama"), TorchTokenizer(tiny_tokenizer()))


def batch(documents: list[list[int]]) -> dict[str, Any]:
    ids = [token for document in documents for token in document]
    return {
        "input_ids": torch.tensor([ids]), "sizes": torch.tensor([[len(d) for d in documents]]),
        "seeds": torch.tensor([7]),
    }


def incremental(engine: TorchEngine, policy: AnchorConfig, tokens: list[int]) -> tuple[Any, Any]:
    """-log p of every real token [n], and whether its prediction had lost sight of something."""
    found: list[Any] = []
    with Session(
        engine, policy, observe=lambda _, out: found.append(out.surprise), observe_needs=frozenset({SURPRISE})
    ) as session:
        session.read(tokens)
        added = session.ledger.column("added")
        thinned = np.isin(np.arange(1, len(tokens)), reading(session.ledger).answers)
        return np.concatenate(found)[~added][1:], thinned


def with_lora(engine: TorchEngine) -> Any:
    model = peft.get_peft_model(engine.model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_incremental_engines_also_after_two_steps(engine: TorchEngine, name: str) -> None:
    policy = POLICIES[name].replace(recall="off", cell_budget=None)
    student = Student(with_lora(engine), engine.tokenizer, engine.info, Policies.only(policy), distil=0, next_token=1)
    optimiser = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.5)
    documents = [engine.tokenizer.encode(TEXT), engine.tokenizer.encode(TEXT)[40:120]]
    values = []
    for _ in range(3):
        inputs = batch(documents)
        value = student(**inputs)["loss"]
        pairs = [incremental(TorchEngine(student.bare, engine.tokenizer), policy, d) for d in documents]
        wanted = np.concatenate([losses[thinned] for losses, thinned in pairs]).sum() / inputs["input_ids"].numel()
        assert float(value.detach()) == pytest.approx(float(wanted), rel=1e-4)
        values.append(float(value.detach()))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    assert values[2] < values[0]


def test_documents_of_a_block_do_not_see_each_other(engine: TorchEngine) -> None:
    tokens = engine.tokenizer.encode(TEXT)
    student = Student(with_lora(engine), engine.tokenizer, engine.info, Policies.only(POLICIES["sel"]))
    with torch.no_grad():
        together = student(**batch([tokens[:90], tokens[90:180]]))["loss"] * 180
        apart = sum(student(**batch([part]))["loss"] * 90 for part in (tokens[:90], tokens[90:180]))
    assert float(together) == pytest.approx(float(apart), rel=1e-4)


def test_padding_changes_nothing(engine: TorchEngine) -> None:
    tokens = engine.tokenizer.encode(TEXT)[:100]
    student = Student(with_lora(engine), engine.tokenizer, engine.info, Policies.only(POLICIES["paper-ac"]))
    inputs = batch([tokens])
    padded = {**inputs, "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 30))}
    with torch.no_grad():
        wide, narrow = (float(student(**each)["loss"]) for each in (padded, inputs))
    assert wide * 130 == pytest.approx(narrow * 100, rel=1e-4)


def test_a_student_that_keeps_everything_has_nothing_to_learn(engine: TorchEngine) -> None:
    student = Student(with_lora(engine), engine.tokenizer, engine.info, Policies.only(POLICIES["full"]))
    assert float(student(**batch([engine.tokenizer.encode(TEXT)]))["loss"]) == 0


def test_the_teacher_is_the_model_without_its_adapter(engine: TorchEngine) -> None:
    ids = torch.tensor([engine.tokenizer.encode(TEXT)[:60]])
    wanted = engine.model.model(input_ids=ids).last_hidden_state
    student = Student(with_lora(engine), engine.tokenizer, engine.info, Policies.only(POLICIES["sel"]))
    told, cells = student._teach(ids, [[60]])
    assert cells is None
    torch.testing.assert_close(told[0], wanted)
    assert not torch.allclose(student.states(ids, torch.arange(60)[None], None)[0], wanted, atol=1e-3)


def test_a_scorer_reads_the_teachers_cells(engine: TorchEngine, tmp_path: Path) -> None:
    policy = random_head(2 * (2 * 8 + 1) + 4, tmp_path / "head.safetensors")
    student = Student(with_lora(engine), engine.tokenizer, engine.info, Policies.only(policy))
    assert student.reads_cells
    tokens = engine.tokenizer.encode(TEXT)
    _, cells = student._teach(torch.tensor([tokens]), [[len(tokens)]])
    memory = engine.open()
    with student.model.disable_adapter():
        memory.decode(tokens, 0)
    wanted = memory.read_cells(memory.positions())
    assert cells is not None
    np.testing.assert_allclose(cells[0].values, wanted.values, atol=1e-4)
    np.testing.assert_allclose(cells[0].key_norms, wanted.key_norms, atol=1e-4)
    assert float(student(**batch([tokens]))["loss"].detach()) > 0


def test_the_chunked_loss_is_the_plain_one() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(300, 16, requires_grad=True), torch.randn(300, 16)
    head, targets = torch.nn.Linear(16, 50, bias=False), torch.randint(0, 50, (300,))
    plain = loss(student, teacher, head, targets, distil=0.7, next_token=0.3)
    plain.backward()
    wanted, student.grad = student.grad, None
    head.requires_grad_(False)
    chunked = loss(student, teacher, head, targets, distil=0.7, next_token=0.3)
    chunked.backward()
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(student.grad, wanted)


def test_policies_are_drawn_within_their_ranges() -> None:
    policies = Policies(AnchorConfig(), (4, 30), (0, 2), recall_documents=0.5)
    drawn = [policies.draw(np.random.default_rng(seed)) for seed in range(60)]
    assert all(4 <= found.policy.reduction <= 30 for found in drawn)
    assert {found.policy.recent_window for found in drawn} == {0, 2}
    assert {found.recalled for found in drawn} == {0.0, 0.1}


def test_some_documents_guard_the_full_cache(engine: TorchEngine) -> None:
    tokens = engine.tokenizer.encode(TEXT)[:120]
    policies = Policies(POLICIES["sel"], full_documents=1.0)
    assert policies.draw(np.random.default_rng(0)) == (preset("full"), 0.0, True)
    student = Student(with_lora(engine), engine.tokenizer, engine.info, policies)
    found = student._read(tokens, [120], None, 3)
    assert found.mask.sum() == 120 * 121 / 2
    assert len(found.asks) == 119


def test_nothing_to_learn_from_is_refused(engine: TorchEngine) -> None:
    with pytest.raises(ConfigError, match="both 0"):
        Student(engine.model, engine.tokenizer, engine.info, Policies.only(POLICIES["sel"]), distil=0, next_token=0)


def test_validation_knows_the_full_cache_from_no_memory(engine: TorchEngine) -> None:
    tokens = engine.tokenizer.encode(TEXT * 3)
    student = Student(with_lora(engine), engine.tokenizer, engine.info, Policies.only(POLICIES["sel"]))
    found = validate(student, [tokens], POLICIES["sel"])
    assert found.reduction > 2
    assert all(math.isfinite(value) for value in (found.full, found.anchored, found.none))
    assert found.none != pytest.approx(found.full, rel=1e-3)
    kept = validate(student, [tokens], POLICIES["sel"].replace(recent_window=1000))
    assert kept.ratio == pytest.approx(1, rel=1e-5)


def test_joined_readings_lie_beside_each_other(engine: TorchEngine) -> None:
    student = Student(with_lora(engine), engine.tokenizer, engine.info, Policies.only(POLICIES["paper-ac"]))
    tokens = engine.tokenizer.encode(TEXT)
    found = student._read(tokens[:100], [60, 40], None, 3)
    first = student._read(tokens[:60], [60], None, 3)
    size = len(first.tokens)
    assert not found.mask[size:, :size].any()
    assert not found.mask[:size, size:].any()
    assert found.positions[size] == 0
    assert join([first], [60]).asks.tolist() == first.asks.tolist()


def _heads(vocabulary: int = 400) -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(3)
    head = torch.nn.Linear(16, vocabulary, bias=False).requires_grad_(False)
    student, teacher = torch.randn(30, 16, requires_grad=True), torch.randn(30, 16)
    return head, student, teacher, torch.randint(vocabulary, (30,))


def test_all_candidates_give_the_exact_loss_and_gradient() -> None:
    head, student, teacher, targets = _heads()
    over = candidates(targets, 400, 1.0, np.random.default_rng(0))
    assert over.ids.tolist() == list(range(400))
    found = loss(student, teacher, head, targets, distil=0.7, next_token=0.3, over=over)
    logs, told = head(student).log_softmax(-1), head(teacher).log_softmax(-1)
    wanted = 0.7 * torch.nn.functional.kl_div(logs, told, reduction="batchmean", log_target=True)
    wanted = wanted + 0.3 * torch.nn.functional.nll_loss(logs, targets)
    torch.testing.assert_close(found, wanted)
    (mine,), (theirs,) = torch.autograd.grad(found, student), torch.autograd.grad(wanted, student)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_sampled_candidates_estimate_the_loss_over_all() -> None:
    head, student, teacher, targets = _heads()
    exact = float(loss(student, teacher, head, targets).detach())
    sampled = [
        float(loss(
            student, teacher, head, targets, over=candidates(targets, 400, 0.25, np.random.default_rng(seed))
        ).detach())
        for seed in range(200)
    ]
    assert np.mean(sampled) == pytest.approx(exact, rel=0.03)
    assert np.std(sampled) > 0


def test_every_token_of_the_text_is_a_candidate() -> None:
    text = torch.tensor([7, 7, 399, 0])
    over = candidates(text, 400, 0.1, np.random.default_rng(0))
    assert {0, 7, 399} <= set(over.ids.tolist())
    assert over.weights[torch.isin(over.ids, text)].tolist() == [0, 0, 0]
    assert float(over.weights.exp().sum()) == pytest.approx(400)


def test_hidden_states_are_apart_by_their_relative_distance() -> None:
    teacher = torch.randn(5, 8)
    assert float(apartness([teacher, teacher], [teacher, teacher])) == 0
    assert float(apartness([1.1 * teacher], [teacher])) == pytest.approx(0.01, rel=1e-3)


def test_hidden_states_are_learned_from(engine: TorchEngine) -> None:
    """A student whose logits are right but whose middle is not still has something to learn."""
    student = Student(
        with_lora(engine), engine.tokenizer, engine.info, Policies.only(POLICIES["sel"]), distil=0.0, next_token=1e-9,
        hidden=1.0,
    )
    assert float(student(**batch([engine.tokenizer.encode(TEXT)]))["loss"].detach()) > 1e-4
