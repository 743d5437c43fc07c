"""Several processes train what one trains: the same losses and weights, no block twice, and one of them writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import torch.distributed as dist  # noqa: E402
from accelerate.commands.config.config_args import load_config_from_file  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from exact import compute_in_fp32  # noqa: E402
from test_trainer import POLICY, StopAfter, assert_same, weights, write_texts  # noqa: E402
from tiny import save_tiny  # noqa: E402

from anchorkv.config import AnchorConfig  # noqa: E402
from anchorkv.engines.torch import TorchEngine  # noqa: E402
from anchorkv.train import trainer as training  # noqa: E402
from anchorkv.train.student import Policies, Student  # noqa: E402
from anchorkv.train.trainer import AnchorTrainer, BlockRows, Settings, collate, train, with_adapter  # noqa: E402

ONE, TWO = {"accumulation": 4}, {"accumulation": 2}
"""The same four blocks a step, for one process and for each of two."""


def settings_in(folder: Path, **changes: Any) -> Settings:
    return Settings(**{
        "model": str(folder / "model"), "data": str(folder / "text.jsonl"), "policy": POLICY, "tokens": 6 * 4 * 128,
        "length": 128, "rank": 4, "alpha": 8, "rate": 0.01, **changes,
    })


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    return [row["loss"] for row in state["log_history"] if "loss" in row]


# --- what each of the two processes does ----------------------------------------------------------------------------


def train_twice(folder: Path, rank: int) -> None:
    """A run, and another that is stopped and resumed. In the first every process has a folder of its own."""
    settings, seen = settings_in(folder, **TWO), []
    forward = Student.forward

    def note(self: Student, input_ids: Any, sizes: Any, seeds: Any) -> Any:
        seen.extend(seeds.tolist())
        return forward(self, input_ids, sizes, seeds)

    Student.forward = note  # type: ignore[method-assign]
    train(settings, folder / f"own-{rank}", save_steps=2, log_steps=1)
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    train(settings, folder / "parts", save_steps=2, log_steps=1, callbacks=(StopAfter(2),))
    dist.barrier()
    train(settings, folder / "parts", save_steps=2, log_steps=1)


def shard(folder: Path, rank: int) -> None:
    """One forward and backward with FSDP's own call, and a save of what it gathers."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    student, settings, inputs = student_and_batch(folder)
    wanted = student(**inputs)["loss"].detach()
    arguments = training.TrainingArguments(output_dir=str(folder / "out"), use_cpu=True, report_to=[])
    trainer = AnchorTrainer(student, settings, args=arguments, train_dataset=None)
    (name,) = student._no_split_modules
    for module in [module for module in student.modules() if type(module).__name__ == name]:
        fully_shard(module)
    fully_shard(student)
    loss = student(**inputs)["loss"]
    torch.testing.assert_close(loss.detach(), wanted)
    loss.backward()
    gradients = [p.grad.full_tensor().abs().max() for p in student.parameters() if p.grad is not None]
    assert max(gradients) > 0
    state = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    trainer._save(str(folder / "out"), state_dict=state)
    dist.barrier()


def student_and_batch(folder: Path) -> tuple[Student, Settings, dict[str, Any]]:
    torch.manual_seed(0)
    settings, engine = settings_in(folder), TorchEngine.load(folder / "model")
    rows = iter(BlockRows(settings, engine.tokenizer, training.Recipe.load(settings.data)))
    student = Student(with_adapter(engine.model, settings), engine.tokenizer, engine.info, Policies(settings.policy))
    return student, settings, collate(settings.length)([next(rows)])


def launch(work: str, folder: Path) -> None:
    """Two processes that do `work`, as torchrun starts them."""
    here = Path(__file__).resolve()
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(here), work, folder],
        check=False, capture_output=True, text=True, timeout=3000,
        env={**os.environ, "PYTHONPATH": str(here.parents[1]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ran.returncode == 0, ran.stderr[-4000:]


# --- what comes of it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    save_tiny(folder / "model")
    write_texts(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module")
def ran(folder: Path) -> Path:
    train(settings_in(folder, **ONE), folder / "one", log_steps=1)
    launch("train_twice", folder)
    return folder


@pytest.mark.slow
def test_two_processes_train_what_one_trains(ran: Path) -> None:
    assert len(losses(ran / "one")) == 6
    assert losses(ran / "own-0") == pytest.approx(losses(ran / "one"), abs=1e-4)
    assert_same(ran / "one", ran / "own-0", atol=1e-4)
    assert AnchorConfig.load(ran / "own-0" / "anchorkv.json") == POLICY


@pytest.mark.slow
def test_they_go_on_where_they_stopped(ran: Path) -> None:
    assert losses(ran / "parts") == pytest.approx(losses(ran / "one"), abs=1e-4)
    assert_same(ran / "one", ran / "parts", atol=1e-4)


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(ran: Path, tmp_path: Path) -> None:
    shutil.copytree(ran / "parts" / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    train(settings_in(ran, **ONE), tmp_path / "out", log_steps=1)
    assert losses(tmp_path / "out") == pytest.approx(losses(ran / "one"), abs=1e-4)
    assert_same(ran / "one", tmp_path / "out", atol=1e-4)


@pytest.mark.slow
def test_every_block_is_trained_once(ran: Path) -> None:
    one, other = (json.loads((ran / f"seen-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    settings = settings_in(ran, **ONE)
    rows = iter(BlockRows(settings, TorchEngine.load(settings.model).tokenizer, training.Recipe.load(settings.data)))
    wanted = [int(next(rows)["seeds"]) for _ in range(24)]
    assert len(one) == len(other) == 12
    assert sorted(one + other) == sorted(wanted)
    assert len(set(wanted)) == 24


@pytest.mark.slow
def test_only_the_main_process_writes(ran: Path) -> None:
    """Random states apart, of which Trainer has every process write its own."""
    written = [path.name for path in (ran / "own-1").rglob("*") if path.is_file()]
    assert set(written) == {"rng_state_1.pth"}


@pytest.mark.slow
def test_a_model_shared_out_by_fsdp_says_and_saves_the_same(folder: Path) -> None:
    launch("shard", folder)
    student, *_ = student_and_batch(folder)
    found = weights(folder / "out")
    for name, wanted in student.model.state_dict().items():
        if "lora_" in name:
            torch.testing.assert_close(found[name.replace(".default.", ".")], wanted)
    assert TorchEngine.load(folder / "model", adapter=folder / "out").info.vocabulary == student.info.vocabulary


@pytest.mark.parametrize(("name", "machines"), [("one-machine", 1), ("several-machines", 2)])
def test_accelerate_reads_the_launch_files(name: str, machines: int) -> None:
    config = load_config_from_file(str(files("anchorkv.train") / "launch" / f"{name}.yaml"))
    assert config.distributed_type is DistributedType.FSDP
    assert config.num_machines == machines
    assert config.num_processes >= 2 * machines
    assert config.fsdp_config["fsdp_version"] == 2
    # Trainer saves the adapter from a gathered state only.
    assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert config.use_cpu is False


def main(arguments: Sequence[str]) -> None:
    work, folder = arguments
    {"train_twice": train_twice, "shard": shard}[work](Path(folder), int(os.environ["RANK"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    compute_in_fp32(pytest.MonkeyPatch())
    main(sys.argv[1:])
