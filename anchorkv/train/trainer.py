"""The training run: transformers' Trainer does steps, processes, checkpoints and resuming; here it learns what to do.

    Settings -> adapter and Student (student.py) -> blocks (data.py) -> Trainer -> adapter folder

`accelerate launch -m anchorkv train …` runs it on several GPUs or machines as it runs any Trainer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import ModelInfo, Tokenizer
from anchorkv.engines.torch import TorchEngine
from anchorkv.errors import ConfigError
from anchorkv.export import POLICY_FILE, SCORER_FILE
from anchorkv.scorers import scorer_file
from anchorkv.train.data import Blocks, check
from anchorkv.train.sources import Recipe
from anchorkv.train.student import Policies, Student

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = "settings.json"
Row = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What defines a run. A checkpoint is only resumed by the same settings."""

    model: str
    data: str
    policy: AnchorConfig
    tokens: int = 1_000_000
    """Tokens of text to train on, over all processes."""
    length: int = 1024
    rows: int = 1
    """Blocks a process reads at once …"""
    accumulation: int = 4
    """… and how often before each step."""
    rank: int = 32
    """Of the LoRA matrices; 0 trains all weights."""
    alpha: int = 64
    rate: float = 5e-4
    warmup: float = 0.05
    distil: float = 1.0
    next_token: float = 0.0
    hidden: float = 0.0
    """Weights of the three losses (objective.py)."""
    vocabulary: float = 0.125
    """Share of the vocabulary that the loss is computed over."""
    windows: tuple[int, ...] = (0, 1, 1, 2)
    reductions: tuple[float, float] = (4.0, 30.0)
    seed: int = 0
    targets: tuple[str, ...] = field(default=TARGETS)

    def __post_init__(self) -> None:
        for name in ("tokens", "length", "rows", "accumulation", "rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0 (got {getattr(self, name)}).")
        if self.rank < 0:
            raise ConfigError(f"rank must be 0 (all weights are trained) or more (got {self.rank}).")

    def steps(self, processes: int) -> int:
        """Optimiser steps of the run."""
        return max(1, self.tokens // (self.length * self.rows * self.accumulation * processes))

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "policy": self.policy.model_dump(mode="json")}, indent=2)


class BlockRows(IterableDataset[Row]):
    """Blocks as rows of tensors. Every process iterates over all of them; accelerate gives each its share."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self.settings, self.tokenizer, self.recipe = settings, tokenizer, recipe

    def __iter__(self) -> Iterator[Row]:
        blocks = Blocks(self.recipe, self.tokenizer, self.settings.length, self.settings.seed)
        for number, block in enumerate(blocks):
            digest = hashlib.sha256(f"{self.settings.seed} {number}".encode()).digest()
            ids = torch.tensor([token for document in block.documents for token in document])
            sizes = torch.tensor([len(document) for document in block.documents])
            yield {"input_ids": ids, "sizes": sizes, "seeds": torch.tensor(int.from_bytes(digest[:6], "little"))}


def collate(length: int) -> Callable[[list[Row]], Row]:
    """Rows padded with 0 to `length`, sizes to the row with the most documents."""

    def pad(rows: list[Row]) -> Row:
        most = max(len(row["sizes"]) for row in rows)
        wide = {"input_ids": length, "sizes": most}
        out = {
            name: torch.stack([torch.nn.functional.pad(row[name], (0, width - len(row[name]))) for row in rows])
            for name, width in wide.items()
        }
        return {**out, "seeds": torch.stack([row["seeds"] for row in rows])}

    return pad


class AnchorTrainer(Trainer):  # type: ignore[misc]
    """Saves the adapter (or, where all weights are trained, the model) instead of the wrapped module."""

    def __init__(self, student: Student, settings: Settings, **options: Any) -> None:
        super().__init__(model=student, data_collator=collate(settings.length), **options)
        self.settings = settings
        self.model_accepts_loss_kwargs = False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self.accelerator.unwrap_model(self.model).model.save_pretrained(folder)
        (folder / SETTINGS).write_text(self.settings.to_json() + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file

        folder, inner = Path(resume_from_checkpoint), self.accelerator.unwrap_model(model or self.model).model
        if hasattr(inner, "get_base_model"):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(inner, load_file(folder / "adapter_model.safetensors"))
        else:
            inner.load_state_dict(load_file(folder / "model.safetensors"), strict=False)


def with_adapter(model: Any, settings: Settings) -> Any:
    """The model with fresh LoRA matrices; the model itself, all weights trained, where `rank` is 0."""
    if not settings.rank:
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = [name for name in settings.targets if name in names] or "all-linear"
    return get_peft_model(model, LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM",
    ))


def train(
    settings: Settings, out: Path, *, engine: TorchEngine | None = None, callbacks: tuple[TrainerCallback, ...] = (),
    save_steps: int = 50, log_steps: int = 5, resume: bool = True, quiet: bool = True,
) -> Path:
    """Run, or go on with, the training that `settings` define; returns the adapter's folder, `out`.

    Raises DataError before the first step where data are bad, ConfigError where `out` holds another run.
    """
    recipe = Recipe.load(settings.data)
    engine = engine or TorchEngine.load(settings.model)
    check(recipe, engine.tokenizer, engine.info.vocabulary)
    last = _resumable(settings, out) if resume else None
    set_seed(settings.seed)  # the adapter's first weights are drawn
    student = Student(
        with_adapter(engine.model, settings), engine.tokenizer, engine.info,
        Policies(settings.policy, reductions=settings.reductions, windows=settings.windows), distil=settings.distil,
        next_token=settings.next_token, hidden=settings.hidden, vocabulary=settings.vocabulary,
    )
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=settings.rows,
        gradient_accumulation_steps=settings.accumulation, learning_rate=settings.rate,
        lr_scheduler_type="cosine", warmup_steps=settings.warmup, weight_decay=0.0, seed=settings.seed,
        logging_steps=log_steps, save_steps=save_steps, save_total_limit=2, report_to=[], disable_tqdm=quiet,
        remove_unused_columns=False, max_grad_norm=1.0, max_steps=1, use_cpu=engine.device.type == "cpu",
        bf16=engine.dtype == torch.bfloat16, dataloader_num_workers=0,
    )
    arguments.max_steps = settings.steps(max(1, arguments.world_size))
    trainer = AnchorTrainer(
        student, settings, args=arguments, callbacks=list(callbacks),
        train_dataset=BlockRows(settings, engine.tokenizer, recipe),
    )
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(out))
    _save_policy(settings.policy, engine.info, out)
    return out


def _save_policy(policy: AnchorConfig, info: ModelInfo, out: Path) -> None:
    """What the adapter is to be read with, beside it: the policy, and the scorer as the model's own "default" one."""
    scorer = scorer_file(policy.scorer, info) if "SEL" in policy.anchors else None
    if scorer is not None:
        shutil.copyfile(scorer, out / SCORER_FILE)
        policy = policy.replace(scorer="default")
    policy.save(out / POLICY_FILE)


def _resumable(settings: Settings, out: Path) -> str | None:
    """The newest checkpoint in `out`, if there is one. Raises ConfigError when it is of other settings."""
    last: str | None = get_last_checkpoint(str(out)) if out.is_dir() else None
    if last is not None:
        found = Path(last) / SETTINGS
        if not found.is_file() or found.read_text(encoding="utf-8").strip() != settings.to_json().strip():
            raise ConfigError(f"{out} holds checkpoints of other settings; choose another --out or the same settings.")
    return last
