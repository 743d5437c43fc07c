"""The half of the peers benchmark that runs other methods: their environment, the protocol of jobs, exact masks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

PEERS = Path(__file__).resolve().parent.parent / "benchmarks" / "peers"
# They run as scripts in an environment of their own, so they are no package.
sys.path.insert(0, str(PEERS))
try:
    import environment
    import methods
    import worker
finally:
    sys.path.remove(str(PEERS))

CONTEXT, NEXT, GOLD = list(range(20, 60)), list(range(100, 112)), [7, 8, 9]
BUILT = Path(os.environ.get("ANCHORKV_PEERS", Path.home() / ".cache" / "anchorkv" / "peers"))
Press = Callable[[float], Any]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def ask(model: Any, tokenizer: Any) -> Callable[..., dict[str, Any]]:
    def answer(**fields: Any) -> dict[str, Any]:
        job = {"id": 7, "kind": "continuation", "method": "full", "reduction": 1, "context": CONTEXT,
               "continuation": NEXT, "gold": GOLD}
        found: dict[str, Any] = worker.answer(json.dumps(job | fields), model, tokenizer)
        json.dumps(found)
        return found

    return answer


def plain_losses(model: Any, context: Sequence[int], continuation: Sequence[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(continuation), reduction="none").tolist()


def pruning(keep: Callable[[int], list[int]]) -> Press:
    """A press that keeps the cells `keep(layer)` when the context was read, as most of kvpress' do."""

    @contextmanager
    def press(model: Any) -> Iterator[None]:
        def prune(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            # transformers renames it.
            layer = kwargs["cache" if "cache" in kwargs else "past_key_values"].layers[module.layer_idx]
            cells = keep(module.layer_idx)
            layer.keys, layer.values = layer.keys[:, :, cells], layer.values[:, :, cells]

        hooks = [layer.self_attn.register_forward_hook(prune, with_kwargs=True) for layer in model.model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    return lambda reduction: press


def masking(hidden: Callable[[int, int], list[int]]) -> Press:
    """A press that only notes which cells `hidden(layer, head)` are gone, as AdaKV's does."""

    @contextmanager
    def press(model: Any) -> Iterator[None]:
        yield
        for number, layer in enumerate(model.model.layers):
            pairs = [(head, cell) for head in range(2) for cell in hidden(number, head)]
            heads, cells = torch.tensor(pairs).T
            layer.self_attn.masked_key_indices = (torch.zeros_like(heads), heads, cells)

    return lambda reduction: press


def test_full_is_the_plain_model(ask: Any, model: Any) -> None:
    found = ask()
    assert found["losses"] == pytest.approx(plain_losses(model, CONTEXT, NEXT), abs=1e-4)
    assert (found["id"], found["kept_cells"], found["decode_tokens"]) == (7, 40, 11)
    assert found["kv_bytes"] == 40 * 2 * 2 * 2 * 8 * 2  # cells, layers, KV heads, keys and values, head size, f16
    assert ask(continuation=[5])["losses"] == pytest.approx(plain_losses(model, CONTEXT, [5]), abs=1e-4)


def test_a_masked_cell_is_a_pruned_cell(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cells' original positions both ways, and counted alike."""
    gone = [3, 4, 5, 11, 30]
    kept = [cell for cell in range(len(CONTEXT)) if cell not in gone]
    monkeypatch.setitem(methods.METHODS, "pruned", pruning(lambda layer: kept))
    monkeypatch.setitem(methods.METHODS, "masked", masking(lambda layer, head: gone))
    pruned, masked = ask(method="pruned"), ask(method="masked")
    assert masked["losses"] == pytest.approx(pruned["losses"], abs=1e-4)
    assert ask()["losses"] != pytest.approx(pruned["losses"], abs=1e-3)
    assert masked["kept_cells"] == pruned["kept_cells"] == len(kept)
    assert masked["kv_bytes"] == pruned["kv_bytes"] == ask()["kv_bytes"] * len(kept) // len(CONTEXT)


@pytest.mark.parametrize("press", [
    pytest.param(pruning(lambda layer: list(range(5 + 20 * (1 - layer)))), id="layers of different lengths"),
    pytest.param(masking(lambda layer, head: list(range(4, 9 + 11 * head))), id="heads of different lengths"),
])
def test_nothing_sees_what_follows_it(ask: Any, monkeypatch: pytest.MonkeyPatch, press: Press) -> None:
    """One forward over the continuation is the same as one token at a time."""
    monkeypatch.setitem(methods.METHODS, "uneven", press)
    whole = ask(method="uneven")["losses"]
    assert ask(method="uneven", continuation=NEXT[:5])["losses"] == pytest.approx(whole[:5], abs=1e-4)
    answer = ask(method="uneven", kind="generate", question=NEXT, max_tokens=4, stop=[])["tokens"]
    one = [*NEXT, *answer]
    assert ask(method="uneven", kind="generate", question=one[:-1], max_tokens=1, stop=[])["tokens"] == answer[-1:]


def test_kept_cells_are_the_mean_over_layers_and_heads(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "uneven", masking(lambda layer, head: list(range(1 + layer + 4 * head))))
    assert ask(method="uneven")["kept_cells"] == 40 - (1 + 5 + 2 + 6) / 4


def test_generate_is_the_models_own_greedy_answer(ask: Any, model: Any) -> None:
    asked = {"kind": "generate", "question": NEXT, "max_tokens": 6, "stop": []}
    found = ask(**asked)
    expected = [*CONTEXT, *NEXT]
    with torch.no_grad():
        for _ in range(6):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    answer = expected[-6:]
    assert (found["tokens"], found["decode_tokens"]) == (answer, 5)
    assert ask(**asked | {"stop": answer[3:4]})["tokens"] == answer[: answer.index(answer[3])]
    assert ask(**asked | {"context": [*CONTEXT, *NEXT], "question": []})["tokens"] == answer


@pytest.mark.parametrize("press", [
    pytest.param(pruning(lambda layer: list(range(5 + 20 * (1 - layer)))), id="pruned"),
    pytest.param(masking(lambda layer, head: list(range(4, 9 + 11 * head))), id="masked"),
])
@pytest.mark.parametrize("gold", [GOLD, GOLD[:1]])
def test_the_right_answers_loss_leaves_no_trace(
    ask: Any, monkeypatch: pytest.MonkeyPatch, press: Press, gold: list[int]
) -> None:
    """It is the mean over the answer's tokens after the question, and what is generated then is as without it."""
    monkeypatch.setitem(methods.METHODS, "uneven", press)
    asked = {"method": "uneven", "kind": "generate", "question": NEXT, "max_tokens": 6, "stop": []}
    found = ask(**asked, gold=gold)
    losses = ask(method="uneven", continuation=[*NEXT, *gold])["losses"][len(NEXT) :]
    assert found["answer_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert found["tokens"] == ask(**asked, gold=list(range(200, 230)))["tokens"]


@pytest.mark.parametrize(("line", "said"), [
    ("no json", "JSONDecodeError"),
    ("[1]", "JSON object"),
    ('{"id": 3, "kind": "x"}', "no kind of job 'x'"),
    ('{"id": 3, "kind": [1]}', "no kind of job"),
    ('{"id": 3, "kind": "generate", "method": "magic"}', "no method 'magic'"),
    ('{"id": 3, "kind": "generate", "method": "full", "reduction": 0.5}', "from 1 on"),
    ('{"id": 3, "kind": "continuation", "method": "full", "reduction": 2, "context": [9999]}', "context is a list"),
    ('{"id": 3, "kind": "continuation", "method": "full", "reduction": 2, "context": []}', "context is empty"),
    ('{"id": 3, "kind": "continuation", "method": "full", "reduction": 2, "context": [1]}', "continuation is a list"),
    ('{"id": 3, "kind": "generate", "method": "full", "reduction": 2, "context": [1], "question": [], "stop": [],'
     ' "gold": []}', "gold is empty"),
    ('{"id": 3, "kind": "generate", "method": "full", "reduction": 2, "context": [1], "question": [], "stop": [],'
     ' "gold": [1]}', "max_tokens"),
])
def test_a_malformed_job_is_an_error_line(model: Any, tokenizer: Any, line: str, said: str) -> None:
    found = worker.answer(line, model, tokenizer)
    assert set(found) == {"id", "error"}
    assert said in found["error"]
    assert found["id"] == (3 if '"id"' in line else None)


def test_a_failing_method_is_an_error_and_the_next_job_runs(
    ask: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(reduction: float) -> Any:
        raise AssertionError("Input should\nbe longer")

    monkeypatch.setitem(methods.METHODS, "fails", fails)
    assert ask(method="fails") == {"id": 7, "error": "AssertionError: Input should be longer"}
    assert ask()["losses"] == pytest.approx(plain_losses(model, CONTEXT, NEXT), abs=1e-4)


def test_a_prompt_compressor_asks_again_until_the_length_is_right(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves the opening of the chat template whole."""
    asked: list[float] = []

    class Generous:
        def compress_prompt(self, texts: list[str], target_token: float, iterative_size: int) -> dict[str, str]:
            asked.append(target_token)
            return {"compressed_prompt": tokenizer.decode(tokenizer.encode(texts[0])[: round(1.5 * target_token)])}

    monkeypatch.setattr(methods, "_compressor", lambda model, tokenizer: Generous())
    start = methods.opening(tokenizer)
    assert tokenizer.decode(start).startswith("<|im_start|>user")
    text = tokenizer.encode("The pump on deck two was replaced on Monday. " * 20)
    found = methods.PromptCompressor(4).shorten(model, tokenizer, start + text)
    assert found[: len(start)] == start
    assert len(found) == pytest.approx(len(start + text) / 4, rel=0.1)
    assert len(asked) > 1


def test_every_method_names_its_paper() -> None:
    for name, factory in methods.METHODS.items():
        assert name == "full" or "arXiv" in (factory.__doc__ or "")
    assert len(methods.METHODS) >= 9


class FakeRunner:
    """In place of `environment.run`: makes the files that venv makes, or fails at a step."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.steps = failing, list[str]()

    def __call__(self, command: Sequence[str], say: Callable[[str], None]) -> tuple[int, list[str]]:
        step = command[2]
        self.steps.append(step)
        say(f"doing {step}")
        if step == self.failing:
            return 1, ["ERROR: No matching distribution found"]
        if step == "venv":
            python = Path(command[3]) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
            python.parent.mkdir(parents=True)
            python.touch()
            (Path(command[3]) / "pyvenv.cfg").touch()
        return 0, []


def test_an_environment_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, said = FakeRunner(), list[str]()
    monkeypatch.setattr(environment, "run", runner)
    python = environment.environment(tmp_path / "env", said.append)
    assert python.exists()
    assert "doing pip" in said
    assert environment.environment(tmp_path / "env", said.append) == python
    assert runner.steps == ["venv", "pip"]

    changed = tmp_path / "requirements.txt"
    changed.write_text("kvpress==9\n", encoding="utf-8")
    monkeypatch.setattr(environment, "REQUIREMENTS", changed)
    environment.environment(tmp_path / "env", said.append)
    assert runner.steps == ["venv", "pip"] * 2


def test_a_half_built_environment_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "run", FakeRunner(failing="pip"))
    with pytest.raises(environment.PeerFailed, match=r"cannot be installed.*\n.*No matching distribution"):
        environment.environment(tmp_path / "env", lambda line: None)
    left = tmp_path / "env" / "left-over"
    left.touch()
    monkeypatch.setattr(environment, "run", FakeRunner())
    assert environment.environment(tmp_path / "env", lambda line: None).exists()
    assert not left.exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.txt").touch()
    monkeypatch.setattr(environment, "run", FakeRunner())
    with pytest.raises(environment.PeerFailed, match="will not be overwritten"):
        environment.environment(tmp_path, lambda line: None)
    assert (tmp_path / "thesis.txt").exists()


def test_a_step_says_its_last_lines() -> None:
    said: list[str] = []
    script = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    code, last = environment.run([sys.executable, "-u", "-c", script], said.append)
    assert (code, last, said) == (3, ["one", "two"], ["one", "two"])
    assert environment.run([str(PEERS / "no such program")], said.append)[0] != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "full"])
def test_a_method_keeps_what_it_may(name: str, real_answers: dict[str, dict[str, Any]]) -> None:
    found = real_answers[name]
    assert "error" not in found
    assert found["kept_cells"] == pytest.approx(300 / 4, rel=0.15 if name == "LLMLingua" else 0.03)
    assert len(found["losses"]) == 8


@pytest.fixture(scope="module")
def real_answers() -> dict[str, dict[str, Any]]:
    """Every method on the built-in model, in an environment that is there already ($ANCHORKV_PEERS)."""
    python = BUILT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        pytest.skip("the peers' environment is not built")
    from anchorkv.models import builtin

    text = torch.randint(1000, 9000, (308,), generator=torch.Generator().manual_seed(0)).tolist()
    jobs = [
        {"id": name, "kind": "continuation", "method": name, "reduction": 4, "context": text[:300],
         "continuation": text[300:]}
        for name in methods.METHODS
    ]
    ran = subprocess.run(
        [str(python), str(PEERS / "worker.py"), str(builtin()), "--threads", "1"], check=True, capture_output=True,
        input="\n".join(map(json.dumps, jobs)), text=True, encoding="utf-8",
    )
    return {found["id"]: found for found in map(json.loads, ran.stdout.splitlines())}
