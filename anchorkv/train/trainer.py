"""The training run: transformers' Trainer does steps, processes, checkpoints and resuming; here it learns what to do.

    Settings -> adapter and Student (student.py) -> blocks (data.py) -> Trainer -> adapter folder

`accelerate launch --no_python anchorkv train …` runs it on several GPUs or machines as it runs any Trainer
(docs/training.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import sort_checkpoints

from anchorkv.adapter import CONFIG as ADAPTER_CONFIG
from anchorkv.adapter import WEIGHTS as ADAPTER_WEIGHTS
from anchorkv.adapter import read_adapter
from anchorkv.config import AnchorConfig
from anchorkv.engines.anchor_token import AC
from anchorkv.engines.base import ModelInfo, Tokenizer
from anchorkv.engines.torch import TorchEngine
from anchorkv.engines.torch_tokenizer import TorchTokenizer
from anchorkv.errors import ConfigError, ModelError
from anchorkv.export import POLICY_FILE, SCORER_FILE
from anchorkv.scorers import scorer_file
from anchorkv.train.data import MIN_TOKENS, Blocks, check
from anchorkv.train.sources import Recipe
from anchorkv.train.student import Policies, Student

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS, STREAM, STATE = "settings.json", "stream.json", "trainer_state.json"
"""In each checkpoint: what the run is, where its data stand, how far it is. Written in this order, the last by Trainer
when all else is there."""
Row = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What defines a run. A checkpoint is only resumed by the same settings."""

    model: str
    data: str
    policy: AnchorConfig
    tokens: int = 1_000_000
    """Tokens of text to train on, over all processes."""
    length: int = 2048
    rows: int = 1
    """Blocks a process reads at once …"""
    accumulation: int = 1
    """… and how often before each step."""
    rank: int = 32
    """Of the LoRA matrices; 0 trains all weights."""
    alpha: int = 64
    rate: float = 5e-4
    warmup: float = 0.05
    distil: float = 1.0
    next_token: float = 0.0
    hidden: float = 1.0
    """Weights of the three losses (objective.py)."""
    vocabulary: float = 0.125
    """Share of the vocabulary that the loss is computed over."""
    windows: tuple[int, ...] = (0, 1, 1, 2)
    reductions: tuple[float, float] = (4.0, 30.0)
    full_documents: float = 0.1
    """What policies are drawn (student.Policies)."""
    start: str | None = None
    """Folder of an adapter to go on from, instead of fresh LoRA matrices."""
    seed: int = 0
    targets: tuple[str, ...] = field(default=TARGETS)

    def __post_init__(self) -> None:
        for name in ("tokens", "length", "rows", "accumulation", "rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0 (got {getattr(self, name)}).")
        if self.rank < 0:
            raise ConfigError(f"rank must be 0 (all weights are trained) or more (got {self.rank}).")
        if self.start is not None and not self.rank:
            raise ConfigError("start names an adapter, but rank 0 trains the model's own weights; choose one of them.")

    def blocks(self, processes: int) -> int:
        """Blocks of an optimiser step, those of all processes."""
        return self.rows * self.accumulation * processes

    def steps(self, processes: int) -> int:
        """Optimiser steps of the run."""
        return max(1, self.tokens // (self.length * self.blocks(processes)))

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "policy": self.policy.model_dump(mode="json")}, indent=2)


class BlockRows(IterableDataset[Row]):
    """Blocks as rows of tensors. Only the main process iterates over them; accelerate hands every process its share."""

    def __init__(
        self, settings: Settings, tokenizer: Tokenizer, recipe: Recipe, processes: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        """state: where to go on, as `Blocks.state` said it."""
        self.settings, self.tokenizer, self.recipe = settings, tokenizer, recipe
        self.step, self.state = settings.blocks(processes), state
        # accelerate is a batch ahead of what has been trained on: at most one step's beginning.
        self._states: deque[dict[str, Any]] = deque(maxlen=2)

    def __iter__(self) -> Iterator[Row]:
        blocks = Blocks(self.recipe, self.tokenizer, self.settings.length, self.settings.seed)
        if self.state is not None:
            blocks.resume(self.state)
        while True:
            if blocks.blocks % self.step == 0:
                self._states.append(blocks.state())
            digest = hashlib.sha256(f"{self.settings.seed} {blocks.blocks}".encode()).digest()
            documents = next(blocks).documents
            ids = torch.tensor([token for document in documents for token in document])
            sizes = torch.tensor([len(document) for document in documents])
            yield {"input_ids": ids, "sizes": sizes, "seeds": torch.tensor(int.from_bytes(digest[:6], "little"))}

    def state_after(self, steps: int) -> dict[str, Any]:
        """Where the stream stood when the blocks of so many steps had been given out."""
        return next(state for state in self._states if state["blocks"] == steps * self.step)


def collate(length: int) -> Callable[[list[Row]], Row]:
    """Rows padded with 0 to `length`, sizes to as many documents as a block can hold: every batch has one shape, which
    accelerate needs to hand it out."""
    wide = {"input_ids": length, "sizes": max(1, length // MIN_TOKENS)}

    def pad(rows: list[Row]) -> Row:
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
        self.remove_callback(PrinterCallback)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """state_dict: the student's, where FSDP has gathered it from all processes."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(self.settings.to_json() + "\n", encoding="utf-8")
        if folder != Path(self.args.output_dir):
            state = self.train_dataset.state_after(self.state.global_step)
            (folder / STREAM).write_text(json.dumps(state), encoding="utf-8")
        student = self.accelerator.unwrap_model(self.model)
        if state_dict is not None:
            state_dict = {name.removeprefix("model."): value for name, value in state_dict.items()}
        # The embedding is the model's own; of a new <AC> the adapter holds the row.
        extra = {"save_embedding_layers": False} if self.settings.rank else {}
        student.model.save_pretrained(folder, state_dict=state_dict, **extra)
        if not self.settings.rank or AC in student.tokenizer.hf.get_vocab():
            student.tokenizer.hf.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled and model is not None:
            return  # `train` has loaded it before it was shared out: torch cannot load tied weights into shares
        folder, inner = Path(resume_from_checkpoint), self.accelerator.unwrap_model(model or self.model).model
        if self.settings.rank:
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            set_peft_model_state_dict(inner, load_file(folder / ADAPTER_WEIGHTS))
        else:
            inner.load_state_dict(type(inner).from_pretrained(folder, dtype="auto").state_dict())


def with_adapter(model: Any, settings: Settings, anchor: int | None = None) -> Any:
    """The model with fresh LoRA matrices, or those of `settings.start`; the model itself, all weights trained, where
    `rank` is 0.

    anchor: the <AC> token, whose embedding is trained too. Raises ConfigError when `start` cannot be gone on from.
    """
    if not settings.rank:
        return model.float().requires_grad_(True)  # 16 bits would swallow small steps; the forward may still use them
    from peft import LoraConfig, PeftModel, get_peft_model

    if settings.start is not None:
        _check_start(settings.start, settings.rank)
        try:
            return PeftModel.from_pretrained(model, settings.start, is_trainable=True)
        except (RuntimeError, ValueError):  # shapes, or modules that are not there
            raise ConfigError(f"The adapter {settings.start} does not fit the model {settings.model}.") from None
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = [name for name in settings.targets if name in names] or "all-linear"
    return get_peft_model(model, LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM", trainable_token_indices=None if anchor is None else [anchor],
    ))


def _check_start(start: str, rank: int) -> None:
    try:
        read_adapter(Path(start))
    except ModelError as error:
        raise ConfigError(f"The training cannot start from {start}: {error}") from None
    found = json.loads((Path(start) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"]
    if found != rank:
        raise ConfigError(f"The adapter {start} is of rank {found}, not {rank}; train it with rank {found}.")


def give_anchor(engine: TorchEngine) -> int:
    """The token that is <AC>. Where nothing in the vocabulary can be, `engine` gets one: in its tokenizer and, where
    that has no row to spare, in its model."""
    tokenizer: Any = engine.tokenizer
    hf, anchor = tokenizer.hf, None
    with suppress(ModelError):
        anchor = int(tokenizer.anchor_id())
    # What ends or begins a text has a row that must stay as it is.
    if anchor is None or anchor in tokenizer.eos_ids | {hf.bos_token_id, hf.unk_token_id}:
        hf.add_tokens([AC], special_tokens=True)
        if len(hf) > engine.info.vocabulary:
            engine.model.resize_token_embeddings(len(hf))
            engine.info = replace(engine.info, vocabulary=len(hf))
        engine.tokenizer = TorchTokenizer(hf, tokenizer.eos_ids)
        anchor = engine.tokenizer.anchor_id()
    return anchor


@torch.no_grad()
def begin_as(model: Any, anchor: int, token: int) -> None:
    """Give <AC> the embedding of `token` before it is trained: after a full stop models gather a sentence of
    themselves, while a spare token's own row reads worse than no memory at all (docs/research-log.md, 10)."""
    rows = model.get_input_embeddings()
    like = getattr(rows, "base_layer", rows).weight[token].clone()
    trained = [row for name, row in model.named_parameters() if "trainable_tokens_delta" in name]
    for row in trained or [rows.weight[anchor : anchor + 1]]:
        row.copy_(like)


def train(
    settings: Settings, out: Path, *, engine: TorchEngine | None = None, callbacks: tuple[TrainerCallback, ...] = (),
    save_steps: int = 50, log_steps: int = 5, resume: bool = True, quiet: bool = True,
) -> Path:
    """Run, or go on with, the training that `settings` define; returns the adapter's folder, `out`.

    Raises DataError before the first step where data are bad, ConfigError where `out` holds another run.
    """
    recipe = Recipe.load(settings.data)
    engine = engine or _load(settings.model, all_weights=not settings.rank)
    check(recipe, engine.tokenizer, engine.info.vocabulary)
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=settings.rows,
        gradient_accumulation_steps=settings.accumulation, learning_rate=settings.rate,
        lr_scheduler_type="cosine", warmup_steps=settings.warmup, weight_decay=0.0, seed=settings.seed,
        logging_steps=log_steps, save_steps=save_steps, save_total_limit=2, report_to=[], disable_tqdm=quiet,
        remove_unused_columns=False, max_grad_norm=1.0, max_steps=1,
        use_cpu=engine.device.type == "cpu" and not _sharded(), bf16=engine.dtype == torch.bfloat16,
        dataloader_num_workers=0, accelerator_config={"dispatch_batches": True}, ignore_data_skip=True,
        ddp_find_unused_parameters=not settings.rank,  # an output matrix, by a step that scores no token
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process drives one GPU; more are the launcher's
    processes = max(1, arguments.world_size)
    arguments.max_steps = settings.steps(processes)
    with arguments.main_process_first(local=False):
        last = _resumable(settings, out, processes) if resume else None
    set_seed(settings.seed)  # the adapter's first weights are drawn
    tokenizer: Any = engine.tokenizer
    knows_anchor = AC in tokenizer.hf.get_vocab()
    anchor = give_anchor(engine) if _needs_anchor(settings) else None
    model = with_adapter(engine.model, settings, anchor)
    if anchor is not None and settings.start is None and not knows_anchor:
        begin_as(model, anchor, engine.tokenizer.encode(".")[-1])
    student = Student(
        model, engine.tokenizer, engine.info,
        Policies(
            settings.policy, reductions=settings.reductions, windows=settings.windows,
            full_documents=settings.full_documents,
        ),
        distil=settings.distil, next_token=settings.next_token, hidden=settings.hidden, vocabulary=settings.vocabulary,
    )
    state = json.loads((last / STREAM).read_text(encoding="utf-8")) if last else None
    trainer = AnchorTrainer(
        student, settings, args=arguments, callbacks=list(callbacks),
        train_dataset=BlockRows(settings, engine.tokenizer, recipe, processes, state),
    )
    finished = last is not None and _steps_done(last) >= arguments.max_steps
    if last is not None and (finished or trainer.is_fsdp_enabled):
        trainer._load_from_checkpoint(str(last))
    if finished:
        trainer._save(str(out))
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        trainer.save_model(str(out))
    if arguments.should_save:
        _save_policy(settings.policy, engine.info, out)
    return out


def _sharded() -> bool:
    """Whether `accelerate launch` was told to use FSDP, and has GPUs for it."""
    return fsdp_asked() and torch.cuda.is_available()


def fsdp_asked() -> bool:
    """Whether `accelerate launch` was told to use FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _load(model: str, all_weights: bool = False) -> TorchEngine:
    """The engine on this process's own GPU; in main memory where FSDP is to share it out among the GPUs.

    all_weights: they are trained, not an adapter beside them: on a CPU in fp32, for bf16 would lose the small steps.
    """
    if not torch.cuda.is_available():
        return TorchEngine.load(model, dtype="fp32" if all_weights else None)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if _sharded():
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return TorchEngine.load(model, device="cpu", dtype="bf16" if able else "fp32")
    return TorchEngine.load(model)


def _needs_anchor(settings: Settings) -> bool:
    """Whether <AC> is read, or the adapter to go on from was given one."""
    return "AC" in settings.policy.anchors or (
        settings.start is not None and (Path(settings.start) / "tokenizer_config.json").is_file()
    )


def _save_policy(policy: AnchorConfig, info: ModelInfo, out: Path) -> None:
    """What the adapter is to be read with, beside it: the policy, and the scorer as the model's own "default" one."""
    scorer = scorer_file(policy.scorer, info) if "SEL" in policy.anchors else None
    if scorer is not None:
        shutil.copyfile(scorer, out / SCORER_FILE)
        policy = policy.replace(scorer="default")
    policy.save(out / POLICY_FILE)


def _resumable(settings: Settings, out: Path, processes: int) -> Path | None:
    """The newest whole checkpoint in `out`, None where there is none. Newer ones, which a killed process left half
    written, are removed, or transformers would keep them in place of whole ones.

    Raises ConfigError when a checkpoint is of other settings.
    """
    for folder in map(Path, reversed(sort_checkpoints(str(out)))):
        if not _is_own(settings, folder):
            raise ConfigError(f"{out} holds checkpoints of other settings; choose another --out or the same settings.")
        if _is_whole(folder):
            _check_step(settings, folder, processes)
            return folder
        shutil.rmtree(folder)
    return None


def _is_own(settings: Settings, folder: Path) -> bool:
    """Whether this run wrote the checkpoint. The number of processes, and with it rows and accumulation, may change."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:  # another process began with its random state, before the main one wrote anything
        return all(file.name.startswith("rng_state") for file in folder.iterdir())
    except (OSError, ValueError):
        return False
    free = {"rows": None, "accumulation": None}
    return isinstance(found, dict) and {**found, **free} == {**json.loads(settings.to_json()), **free}


def _check_step(settings: Settings, folder: Path, processes: int) -> None:
    """Raises ConfigError where a step would read more or fewer blocks than the steps before it."""
    blocks = json.loads((folder / STREAM).read_text(encoding="utf-8"))["blocks"] // _steps_done(folder)
    if blocks != settings.blocks(processes):
        raise ConfigError(
            f"The run read {blocks} blocks a step and would now read {settings.blocks(processes)}; choose rows and "
            "accumulation so that rows * accumulation * processes stays the same."
        )


def _steps_done(folder: Path) -> int:
    return int(TrainerState.load_from_json(str(folder / STATE)).global_step)


def _is_whole(folder: Path) -> bool:
    """Whether everything that resuming needs is there and can be opened."""
    try:
        for file in (STATE, STREAM):
            json.loads((folder / file).read_text(encoding="utf-8"))
        weights = [*folder.glob("adapter_model*.safetensors"), *folder.glob("model*.safetensors")]
        for path in weights:
            with safe_open(str(path), framework="numpy"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    optimizers = [path for path in folder.glob("optimizer*") if path.is_dir() or zipfile.is_zipfile(path)]
    return bool(weights and optimizers)
