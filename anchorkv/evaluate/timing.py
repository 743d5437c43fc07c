"""Two sides of a comparison timed in turns, in one process: what slows the machine slows both.

A *side* reads one stream of tokens and writes on. `SessionSide` is what users of this package run; `Whole` is the same
weights with everything kept, as their own library runs them, at the settings that are fastest on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Engine, Ints, Memory
from anchorkv.errors import ModelError
from anchorkv.evaluate.run import Models
from anchorkv.evaluate.statistics import Estimate, Numbers, bootstrap
from anchorkv.evaluate.ways import Way
from anchorkv.ledger import Accounting
from anchorkv.models import DEFAULT
from anchorkv.recall import RecallPlan
from anchorkv.session import Session, next_logits

if TYPE_CHECKING:
    from anchorkv.engines.llama import LlamaEngine

SLICE = 512
"""Tokens read in one turn: llama.cpp's own default batch, so that the full side is not fed smaller ones."""
Act = Callable[[int], object]
"""What one side does in turn number n."""


# --- turns and what follows from them ------------------------------------------------------------------------------


def in_turns(acts: Sequence[Act], turns: int, warm_up: int = 0) -> list[list[float]]:
    """Seconds [act][turn]. Who begins changes every turn; `warm_up` turns come first and are not counted."""
    spent: list[list[float]] = [[] for _ in acts]
    for turn in range(warm_up + turns):
        order = list(enumerate(acts))
        for index, act in reversed(order) if turn % 2 else order:
            started = time.perf_counter()
            act(turn)
            if turn >= warm_up:
                spent[index].append(time.perf_counter() - started)
    return spent


def fastest(samples: Sequence[Sequence[float]]) -> int:
    """Index of the samples with the smallest median."""
    return min(range(len(samples)), key=lambda index: median(samples[index]))


def rate(seconds: Sequence[float], at: Sequence[float] | None = None) -> Estimate:
    """Turns a second, by the median turn; its standard error by the bootstrap, `at` as `ratio_of_medians` takes it."""
    redrawn = _redrawn(seconds, at)

    def figure(drawn: Ints) -> float:
        return float(1 / np.median(redrawn(drawn)))

    return Estimate(float(1 / np.median(seconds)), bootstrap(figure, len(seconds)), len(seconds))


def ratio_of_medians(full: Sequence[float], way: Sequence[float], at: Sequence[float] | None = None) -> Estimate:
    """How many times as fast as the full side: the seconds' medians, full / way (design.md, "speed").

    The bootstrap draws turns, both sides of a turn together. at: where in its document each turn was, if later ones
    cost more: that is no noise, so only distances from a line are drawn. Raises ValueError when the sides differ in
    length.
    """
    if len(full) != len(way):
        raise ValueError(f"{len(full)} turns of one side cannot be paired with {len(way)} of the other")
    theirs, ours = _redrawn(full, at), _redrawn(way, at)

    def figure(drawn: Ints) -> float:
        return float(np.median(theirs(drawn)) / np.median(ours(drawn)))

    return Estimate(float(np.median(full) / np.median(way)), bootstrap(figure, len(way)), len(way))


def _redrawn(seconds: Sequence[float], at: Sequence[float] | None) -> Callable[[Ints], Numbers]:
    values = np.asarray(seconds, dtype=np.float64)
    if at is None or len(set(at)) < 2:
        return lambda drawn: values[drawn]
    line: Numbers = np.polyval(np.polyfit(at, values, 1), at).astype(np.float64)
    rest = values - line
    return lambda drawn: line + rest[drawn]


# --- engines -------------------------------------------------------------------------------------------------------


@contextmanager
def own_engine(models: Models, way: Way, **options: Any) -> Iterator[Engine]:
    """An engine of its own over the weights that `way` runs on: sessions of one llama.cpp context pay for each other's
    cells, and so do those that ran in it before.

    options: of LlamaEngine (cells, sessions, batch, flash_attention, kv_type); the others need none.
    Raises ModelError or CapacityError as loading does.
    """
    loaded = models.of(way).engine
    if loaded.name == "llama":
        from anchorkv.engines.llama import LlamaEngine

        engine: Engine = LlamaEngine(weights_file(models, way), threads=models.threads, **options)
        if engine.info.fingerprint != loaded.info.fingerprint:
            engine.close()
            raise ModelError(f"The weights of {loaded.info.name} were changed while they were measured; start again.")
        engine.info = replace(engine.info, name=loaded.info.name, scorer=loaded.info.scorer)
    elif loaded.name == "torch":
        from anchorkv.engines.torch import TorchEngine

        engine = TorchEngine(loaded.model, loaded.tokenizer, batch=loaded.batch)  # type: ignore[attr-defined]
        engine.info = loaded.info
    else:
        yield loaded
        return
    try:
        yield engine
    finally:
        engine.close()


def weights_file(models: Models, way: Way) -> Path:
    """The GGUF file that `way` runs on. Raises ModelError for an engine that has none."""
    path = getattr(models.of(way).engine, "path", None)
    if path is None:
        raise ModelError(f"{models.name or DEFAULT} does not run from a GGUF file.")
    return Path(path)


# --- sides ---------------------------------------------------------------------------------------------------------


class Side(Protocol):
    """One stream. `label` says what runs it."""

    label: str

    def restart(self) -> None:
        """Forget what was read."""

    def read(self, tokens: Sequence[int]) -> None:
        """Read on; nobody asks yet what comes next."""

    def write(self, tokens: Sequence[int]) -> None:
        """Take one token at a time, each with the logits of the next, as generation does."""

    def ask(self, question: Sequence[int]) -> int:
        """The first token of the answer to a question after what was read. The stream is then as before."""

    def accounting(self) -> Accounting: ...

    def close(self) -> None: ...


class SessionSide:
    """The package's own session: a question is answered on a fork, after the recall that the policy asks for."""

    def __init__(self, engine: Engine, policy: AnchorConfig, label: str) -> None:
        self.engine, self.policy, self.label = engine, policy, label
        self.session = Session(engine, policy)
        self.peak_cells, self.recalled_cells = 0, 0

    def restart(self) -> None:
        self.session.close()
        self.session, self.peak_cells = Session(self.engine, self.policy), 0

    def read(self, tokens: Sequence[int]) -> None:
        self.session.read(tokens, logits=False)

    def write(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.session.read([token])

    def ask(self, question: Sequence[int]) -> int:
        with self.session.fork() as session:
            RecallPlan(session).update(self.engine.tokenizer.decode(question))
            self.recalled_cells = sum(session.recalled.values())
            session.read(question)
            self.peak_cells = max(self.peak_cells, session.peak_cells)
            return int(next_logits(session).argmax())

    def accounting(self) -> Accounting:
        found = self.session.accounting()
        peak = max(self.peak_cells, found.peak_cells)
        return replace(found, peak_cells=peak, peak_bytes=peak * self.engine.info.cell_bytes)

    def close(self) -> None:
        self.session.close()


class Whole:
    """An engine's memory with everything kept and nothing of this package above it. On llama.cpp: one sequence."""

    def __init__(self, engine: Engine, label: str) -> None:
        self.engine, self.label = engine, label
        self.memory: Memory = engine.open()
        self.at = self.peak_cells = 0

    def restart(self) -> None:
        self.memory.close()
        self.memory, self.at, self.peak_cells = self.engine.open(), 0, 0

    def read(self, tokens: Sequence[int]) -> None:
        self._decode(tokens, False)

    def write(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._decode([token], True)

    def ask(self, question: Sequence[int]) -> int:
        first = int(self._decode(question, True).argmax())
        self.forget(self.at - len(question))
        return first

    def _decode(self, tokens: Sequence[int], logits: bool) -> Any:
        batch = self.engine.batch
        for start in range(0, len(tokens), batch):
            part = tokens[start : start + batch]
            out = self.memory.decode(part, self.at, logits=logits and start + len(part) == len(tokens))
            self.at += len(part)
        self.peak_cells = max(self.peak_cells, self.at)
        return out.logits

    def forget(self, count: int) -> None:
        """All but the first `count` tokens."""
        self.memory.drop(np.arange(count, self.at))
        self.at = min(count, self.at)

    def accounting(self) -> Accounting:
        cell, held = self.engine.info.cell_bytes, len(self.memory.positions())
        return Accounting(held, self.peak_cells, self.at, self.memory.nbytes(), self.peak_cells * cell, self.at * cell)

    def close(self) -> None:
        self.memory.close()


class WholeLlama(Whole):
    """llama.cpp as it is."""

    engine: LlamaEngine

    def hold(self, count: int) -> None:
        """Hold `count` cells without reading as many: those held are copied to the positions that follow. Speed asks
        how many there are, not what they say. Raises ValueError when nothing was read yet."""
        from anchorkv.engines.llama_state import metas

        if not self.at:
            raise ValueError("there is nothing to copy")
        self.forget(count)
        while self.at < count:
            part = self.memory.fork()
            part.drop(np.arange(count - self.at, self.at))
            state = part.state()
            part.close()
            state["positions"] = state["positions"] + self.at
            metas(state["cells"])["position"] += self.at
            copied = len(state["positions"])
            self.engine.merge(self.engine.restore(state), self.memory)  # type: ignore[arg-type]
            self.at += copied


class WholeTorch(Whole):
    """transformers with its own DynamicCache."""

    def __init__(self, engine: Engine, label: str) -> None:
        from anchorkv.engines.torch_model import cache_argument, check_arguments

        self.engine, self.label = engine, label
        self.model: Any = engine.model  # type: ignore[attr-defined]
        accepted = check_arguments(self.model)
        self.argument = cache_argument(accepted)
        self.options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.restart()

    def restart(self) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache()
        self.at = self.peak_cells = 0

    def _decode(self, tokens: Sequence[int], logits: bool) -> Any:
        import torch

        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=self.model.device)
            out = self.model(input_ids=ids, use_cache=True, **{self.argument: self.cache}, **self.options)
        self.at += len(tokens)
        self.peak_cells = max(self.peak_cells, self.at)
        return out.logits[0, -1]

    def forget(self, count: int) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[..., :count, :], layer.values[..., :count, :]
        self.at = min(count, self.at)

    def accounting(self) -> Accounting:
        cell = self.engine.info.cell_bytes
        held = sum(t.numel() * t.element_size() for layer in self.cache.layers for t in (layer.keys, layer.values))
        return Accounting(self.at, self.peak_cells, self.at, held, self.peak_cells * cell, self.at * cell)

    def close(self) -> None:
        self.restart()
