"""Training speed: what this package does against the obvious way, the same blocks, masks, weights and learning rate.

    python benchmarks/training.py                                # the shipped example text
    python benchmarks/training.py --data ../shared/data/lm/pg19.train.jsonl.gz

The obvious way: transformers' Trainer on a PEFT LoRA model, a dense boolean mask, logits of every token in fp32.
Here: the same Trainer, attention over what is seen only, the loss over candidates and without standing logits.
Both learn by next-token loss under the anchor rule, in turns, in one run. What they have learned is compared by the
same exact loss on a text that neither was trained on. Distillation, which reads every block once more
with the full cache, is timed beside them. Writes results/training.json.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference import ROOT, console, write_results
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import anchorkv
from anchorkv.engines.torch import TorchEngine
from anchorkv.models import builtin
from anchorkv.train.data import Blocks
from anchorkv.train.plan import PlanningEngine, plan
from anchorkv.train.sources import Recipe
from anchorkv.train.student import Policies, Student, reading
from anchorkv.train.trainer import AnchorTrainer, Settings, collate, with_adapter
from anchorkv.train.validate import token_losses

POLICY = anchorkv.preset("default").replace(scorer="landmarks", recall="off", cell_budget=None)
"""Chooses without asking the model, so that the obvious way needs no second forward for its masks either."""


class Rows(IterableDataset):  # type: ignore[type-arg]
    """The same blocks for both; `dense`: with the mask of the rule and labels, as a plain model takes them."""

    def __init__(self, engine: TorchEngine, data: str, length: int, dense: bool) -> None:
        self.engine, self.data, self.length, self.dense = engine, data, length, dense

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        blocks = Blocks(Recipe.load(self.data), self.engine.tokenizer, self.length, 0, min_tokens=self.length)
        for number, block in enumerate(blocks):
            tokens = block.documents[0]
            ids = torch.tensor(tokens)
            if not self.dense:
                yield {"input_ids": ids, "sizes": torch.tensor([len(tokens)]), "seeds": torch.tensor(number)}
                continue
            found = reading(plan(PlanningEngine(self.engine.tokenizer, self.engine.info), POLICY, tokens))
            labels = torch.full_like(ids, -100)
            labels[found.answers] = ids[found.answers]
            yield {"input_ids": ids, "attention_mask": torch.from_numpy(found.mask)[None], "labels": labels}


class Timer(TrainerCallback):  # type: ignore[misc]
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def run(way: str, options: argparse.Namespace, held: list[int]) -> dict[str, Any]:
    """Train `options.steps` steps the way that is named; the seconds of each and the exact loss afterwards."""
    engine = TorchEngine.load(builtin(), dtype="fp32")
    engine.model.is_quantized = False  # it was, in its GGUF file; a bare Trainer would refuse it
    settings = Settings(model=str(builtin()), data=options.data, policy=POLICY, length=options.length)
    set_seed(0)
    model = with_adapter(engine.model, settings)
    timer = Timer()
    student = Student(
        model, engine.tokenizer, engine.info, Policies.only(POLICY), distil=float(way == "distilled"),
        next_token=float(way != "distilled"), vocabulary=settings.vocabulary,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=1, learning_rate=settings.rate, max_steps=options.steps,
            lr_scheduler_type="constant", report_to=[], disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
            save_strategy="no", logging_strategy="no", weight_decay=0.0,
        )
        common: dict[str, Any] = {"args": arguments, "callbacks": [timer]}
        rows = Rows(engine, options.data, options.length, dense=way == "obvious")
        if way == "obvious":
            trainer = Trainer(model=model, train_dataset=rows, **common)
        else:
            trainer = AnchorTrainer(student, settings, train_dataset=rows, **common)
            trainer.data_collator = collate(options.length)
        trainer.train()
    out = {"way": way, "seconds": timer.seconds, "held_out_loss": exact_loss(student, held)}
    del engine, model, student, trainer
    gc.collect()
    return out


@torch.no_grad()
def exact_loss(student: Student, tokens: list[int]) -> float:
    """-log p a token under the anchor rule, over the whole vocabulary."""
    found = reading(plan(PlanningEngine(student.tokenizer, student.info), POLICY, tokens))
    return float(token_losses(student, found, tokens).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(ROOT / "examples" / "english.txt"))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1, help="turns that every way gets")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "training.json")
    options = parser.parse_args()
    engine = TorchEngine.load(builtin(), dtype="fp32")
    text = (ROOT / "examples" / "english.txt").read_text(encoding="utf-8")
    held = engine.tokenizer.encode(text)[-options.length :]
    del engine
    ways = ("obvious", "anchorkv", "distilled")
    turns = [way for _ in range(options.rounds) for way in ways]
    results = [run(way, options, held) for way in track(turns, "training", console=console, transient=True)]
    # The first step of a run warms up allocators and caches.
    per_way = {
        way: [s for result in results if result["way"] == way for s in result["seconds"][1:]] for way in ways
    }
    speeds = {way: options.length / statistics.median(seconds) for way, seconds in per_way.items()}
    losses = {way: float(np.mean([r["held_out_loss"] for r in results if r["way"] == way])) for way in ways}
    table = Table(title=f"{options.steps} steps of one block of {options.length:,} tokens")
    for heading in ("way", "tokens/s", "to the obvious way", "held-out perplexity after"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way in ways:
        ratio, perplexity = speeds[way] / speeds["obvious"], math.exp(losses[way])
        table.add_row(way, f"{speeds[way]:.0f}", f"{ratio:.2f}x", f"{perplexity:.2f}")
    Console().print(table)
    write_results(
        options.out, throughput_ratio=speeds["anchorkv"] / speeds["obvious"],
        throughput_ratio_distilled=speeds["distilled"] / speeds["obvious"], tokens_per_second=speeds,
        held_out_loss=losses, length=options.length, steps=options.steps, seconds=per_way,
    )


if __name__ == "__main__":
    main()
