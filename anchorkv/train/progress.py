"""What a training run shows while it goes: a bar, validation as it rises, a log, TensorBoard, curves, a model card."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from anchorkv.engines.base import Tokenizer
from anchorkv.train.card import CARD, FIGURES, base_name, card, number
from anchorkv.train.curves import save_curves
from anchorkv.train.data import Blocks
from anchorkv.train.sources import Recipe
from anchorkv.train.trainer import Settings
from anchorkv.train.validate import validate

LOG = "log.jsonl"
BOARD = "tensorboard"
DOCUMENTS = 8
"""Documents that validation reads: about a minute on two cores for a small model."""
LONGEST = 2048
"""Tokens of such a document at most."""


class Progress(TrainerCallback):  # type: ignore[misc]
    """Reports to `bar` (tokens done, tokens in all), `say` (what is being done, the newest figures) and `console`.

    Everything else is in OUT: every figure in log.jsonl and, where tensorboard is installed, in tensorboard/; curves
    and the model card, drawn anew at every checkpoint.
    """

    def __init__(
        self, settings: Settings, out: Path, validation: str | None, bar: Callable[[int, int], None],
        console: Console | None, say: Callable[[str, str], None] = lambda doing, figures: None,
    ) -> None:
        self.settings, self.out, self.bar, self.console, self.say = settings, out, bar, console, say
        self.validation = Recipe.load(validation) if validation else None
        self.documents: list[list[int]] = []
        self.last: dict[str, Any] = {}
        """The newest validation's figures."""
        self.tokens = self.planned = 0
        """Trained so far, and in all."""
        self._first = os.environ.get("RANK", "0") == "0"
        self._newest: dict[str, Any] = {}
        self._validated = -1
        self._board: Any = None
        self._mark = (0, 0.0)
        """Tokens and time at the last log, validation and checkpoints taken out."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._first = state.is_world_process_zero
        self._count(args, state)
        if not self._first:
            return
        self._board = _board(self.out / BOARD, state.global_step)
        for row in read_log(self.out / LOG) if state.global_step else ():
            self._remember(row)
        self.bar(self.tokens, self.planned)
        self._say("Training")
        if self.validation is not None:
            self.documents = _documents(self.validation, model.tokenizer, min(self.settings.length, LONGEST))
            self._print(f"Validation reads {self._validation_text()}.")
            if not state.global_step:
                self._validate(model, state)
        self._mark = (self.tokens, time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._count(args, state)
        self.bar(self.tokens, self.planned)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs and self._first:
            tokens, since = self._mark
            self._mark = (self.tokens, time.perf_counter())
            speed = (self.tokens - tokens) / (self._mark[1] - since)
            self._write("train", state, {
                "loss": logs["loss"], "rate": logs.get("learning_rate"), "tokens_per_second": round(speed, 1),
            })
            self._say("Training")

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        started = time.perf_counter()
        self._validate(model, state)
        self.report()
        self._mark = (self._mark[0], self._mark[1] + time.perf_counter() - started)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step != self._validated:
            self._validate(model, state)
            self.report()
        if self._board is not None:
            self._board.close()

    def report(self) -> None:
        """Draw the curves and write the model card. To be called again when the adapter has been saved, for PEFT saves
        a card of its own with it."""
        if not self._first:
            return
        rows, name = read_log(self.out / LOG), base_name(self.settings.model)
        if not self.planned:  # where a checkpoint holds the last step already, the trainer calls nobody
            for row in rows:
                self._remember(row)
                self.tokens = self.planned = row["tokens"]
        self.out.mkdir(parents=True, exist_ok=True)
        save_curves(rows, self.out, f"{name}, anchored")
        text = card(self.settings, rows, self._validation_text(), self.tokens, self.planned)
        (self.out / CARD).write_text(text, encoding="utf-8")

    def _validate(self, model: Any, state: Any) -> None:
        if not self.documents:
            return
        self._say(f"Validating on {len(self.documents)} documents")
        found = validate(model, self.documents, self.settings.policy)
        self._validated = state.global_step
        self._write("validation", state, {
            "perplexity_full": round(found.full, 3), "perplexity_anchored": round(found.anchored, 3),
            "perplexity_no_memory": round(found.none, 3), "ratio": round(found.ratio, 4),
            "context_recovered": round(found.recovered, 4), "reduction": round(found.reduction, 2),
        })
        self._print(
            f"step {state.global_step:,}: perplexity {found.full:.2f} full, {found.anchored:.2f} anchored, "
            f"{found.none:.2f} no memory; [bold]{number(self.last['context_recovered'], '{:.1%}')}[/] of the context "
            f"recovered at {found.reduction:.1f}×"
        )
        self._say("Training")

    def _validation_text(self) -> str:
        """Which documents validation reads; "" when it reads none."""
        if self.validation is None or not self.documents:
            return ""
        names = ", ".join(source.name for source in self.validation.sources)
        many = f"{len(self.documents)} documents" if len(self.documents) > 1 else "1 document"
        return f"{many} of {len(self.documents[0]):,} tokens from {names}"

    def _say(self, doing: str) -> None:
        """The bar's title, and its line of the newest figures."""
        shown = (
            ("loss", "loss {:.4f}"), ("tokens_per_second", "{:,.0f} tokens/s"), ("ratio", "ratio {:.3f}"),
            ("context_recovered", "{:.1%} of the context recovered"), ("reduction", "{:.1f}× fewer cells"),
        )
        values = [form.format(self._newest[name]) for name, form in shown if self._newest.get(name) is not None]
        self.say(doing, " · ".join(values))

    def _print(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text)

    def _count(self, args: Any, state: Any) -> None:
        each = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
        step = int(each * self.settings.length)
        self.tokens, self.planned = state.global_step * step, state.max_steps * step

    def _remember(self, row: dict[str, Any]) -> None:
        self._newest.update(row)
        if "ratio" in row:
            self.last = {name: row[name] for _, name, _ in FIGURES}

    def _write(self, kind: str, state: Any, figures: dict[str, float | None]) -> None:
        """kind: the group in TensorBoard. What is no number (a loss that diverged) is null in the log."""
        numbers = {n: value if value is not None and math.isfinite(value) else None for n, value in figures.items()}
        row = {"step": state.global_step, "tokens": self.tokens, **numbers}
        self._remember(row)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for name, value in numbers.items():
                if value is not None:
                    self._board.add_scalar(f"{kind}/{name}", value, state.global_step)
            self._board.flush()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The figures of a run by step, one row a step; [] when nothing has been logged.

    A run that was resumed goes back to its checkpoint: what had been logged after that is left out, and the later row
    of a step wins. So is a line that was cut off.
    """
    rows: dict[int, dict[str, Any]] = {}
    newest = 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] < newest:
            rows = {step: old for step, old in rows.items() if step <= row["step"]}
        newest = row["step"]
        rows[newest] = {**rows.get(newest, {}), **row}
    return [rows[step] for step in sorted(rows)]


def _documents(recipe: Recipe, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """DOCUMENTS different ones of `length` tokens each, or fewer where all of the text has no more."""
    blocks, found = Blocks(recipe, tokenizer, length, 0, min_tokens=length), list[list[int]]()
    while len(found) < DOCUMENTS and not (found and all(blocks.epochs)):
        document = next(blocks).documents[0]
        if document not in found:
            found.append(document)
    return found


def _board(folder: Path, step: int) -> Any:
    """A TensorBoard writer that goes on after `step`; None where tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
