"""What a training run shows while it goes: a bar, validation as it rises, and a log that plots are drawn from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from anchorkv.train.data import Blocks
from anchorkv.train.sources import Recipe
from anchorkv.train.trainer import Settings
from anchorkv.train.validate import validate

LOG = "log.jsonl"
DOCUMENTS = 8
"""Documents of a block's length that validation reads: about a minute on two cores for a small model."""


class Progress(TrainerCallback):  # type: ignore[misc]
    """Reports to `bar` (tokens done, tokens in all) and `console`, and appends every figure to OUT/log.jsonl."""

    def __init__(
        self, settings: Settings, out: Path, validation: str | None, bar: Callable[[int, int], None],
        console: Console | None,
    ) -> None:
        self.settings, self.out, self.bar, self.console = settings, out, bar, console
        self.validation = Recipe.load(validation) if validation else None
        self.documents: list[list[int]] = []
        self.last: dict[str, Any] = {}
        self._started = time.perf_counter()
        self._from = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._started, self._from = time.perf_counter(), state.global_step
        if self.validation is not None and state.is_world_process_zero:
            blocks = Blocks(self.validation, model.tokenizer, self.settings.length, 0, min_tokens=self.settings.length)
            self.documents = [next(blocks).documents[0] for _ in range(DOCUMENTS)]
            if not state.global_step:
                self._validate(model, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar(state.global_step * self._tokens(args), state.max_steps * self._tokens(args))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            done = (state.global_step - self._from) * self._tokens(args)
            speed = done / (time.perf_counter() - self._started)
            self._write({
                "step": state.global_step, "tokens": state.global_step * self._tokens(args), "loss": logs["loss"],
                "rate": logs.get("learning_rate"), "tokens_per_second": round(speed, 1),
            })

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.documents and state.is_world_process_zero:
            self._validate(model, state)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.documents and state.is_world_process_zero:
            self._validate(model, state)

    def _validate(self, model: Any, state: Any) -> None:
        found = validate(model, self.documents, self.settings.policy)
        self.last = {
            "perplexity_full": round(found.full, 3), "perplexity_anchored": round(found.anchored, 3),
            "perplexity_no_memory": round(found.none, 3), "ratio": round(found.ratio, 4),
            "context_recovered": round(found.recovered, 4), "reduction": round(found.reduction, 2),
        }
        self._write({"step": state.global_step, **self.last})
        if self.console:
            self.console.print(
                f"step {state.global_step:,}: perplexity {found.full:.2f} full, {found.anchored:.2f} anchored, "
                f"{found.none:.2f} no memory; [bold]{found.recovered:.1%}[/] of the context recovered at "
                f"{found.reduction:.1f}x"
            )

    def _tokens(self, args: Any) -> int:
        each = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
        return int(each * self.settings.length)

    def _write(self, row: dict[str, Any]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
