"""One training step's forward: the teacher reads with the full cache, the student under the anchor rule.

Which token sees which comes from `plan.py`, so a block is read exactly as inference reads it: true positions, added
anchors, chosen anchors, and whatever the drawn policy frees.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from anchorkv.config import AnchorConfig, preset
from anchorkv.engines.base import CELLS, Bools, Cells, Ints, ModelInfo, Tokenizer
from anchorkv.engines.torch_memory import floats
from anchorkv.engines.torch_model import cache_argument, check_arguments, layer_kinds
from anchorkv.errors import ConfigError
from anchorkv.ledger import Ledger
from anchorkv.scorers import scorer
from anchorkv.train.attention import is_plain, masked
from anchorkv.train.objective import apartness, candidates, loss
from anchorkv.train.plan import PlanningEngine, plan
from anchorkv.visibility import NEVER, Recalled, dense_mask


class Drawn(NamedTuple):
    """How one document is read: the policy, the share of its segments to recall, and whether every token is scored or
    those alone whose prediction has lost sight of something."""

    policy: AnchorConfig
    recalled: float
    every: bool


@dataclass(frozen=True)
class Policies:
    """Policies are drawn anew for every document, so that one adapter serves every budget and takes recall well."""

    base: AnchorConfig
    reductions: tuple[float, float] = (4.0, 30.0)
    """Drawn evenly on a logarithmic scale (SEL)."""
    windows: tuple[int, ...] = (0, 1, 1, 2)
    agings: tuple[float, ...] = (0.0, 2.0, 4.0, 5.5)
    recall_share: float = 0.1
    """Share of the segments that are left visible, as if recalled …"""
    recall_documents: float = 0.3
    """… in this share of the documents."""
    full_documents: float = 0.0
    """Share of the documents that are read with nothing dropped and every token scored, so that the full cache stays
    what it was."""

    @classmethod
    def only(cls, policy: AnchorConfig) -> Policies:
        """Draws nothing but `policy`."""
        same = (policy.reduction, policy.reduction)
        return cls(policy, same, (policy.recent_window,), (policy.aging,), recall_documents=0.0)

    def draw(self, random: np.random.Generator) -> Drawn:
        """How one document is read."""
        if random.random() < self.full_documents:
            return Drawn(preset("full"), 0.0, every=True)
        low, high = np.log(self.reductions)
        window = int(random.choice(self.windows))
        changes: dict[str, Any] = {"recall": "off", "cell_budget": None, "recent_window": window}
        if "SEL" in self.base.anchors:
            changes["reduction"] = float(np.exp(random.uniform(low, high)))
            changes["aging"] = float(random.choice(self.agings))
        recalled = self.recall_share if random.random() < self.recall_documents else 0.0
        return Drawn(self.base.replace(**changes), recalled, every=False)


@dataclass(frozen=True)
class Reading:
    """How the student reads a block of n real tokens, one document or several beside each other."""

    tokens: Ints
    """With added anchors, [m]."""
    positions: Ints
    """[m]; every document starts at 0."""
    mask: Bools
    """[m, m]."""
    asks: Ints
    """For each scored token: the student's row that predicts it."""
    answers: Ints
    """For each scored token: its index among the real tokens; the teacher predicts it from the one before."""


def recall_some(ledger: Ledger, share: float, random: np.random.Generator) -> None:
    """Leave a share of the segments visible to everything that follows them."""
    numbers = np.flatnonzero(random.random(ledger.segments) < share)
    ledger.recalls.extend(Recalled(int(number), 0, NEVER) for number in numbers)


def reading(ledger: Ledger, *, every: bool = False) -> Reading:
    """The mask and the scored tokens of a planned document: those whose prediction has lost sight of something, or
    `every` one."""
    mask = dense_mask(ledger.layout())
    real = np.flatnonzero(~ledger.column("added"))
    asks = real[1:] - 1
    thinned = np.ones(len(asks), dtype=bool) if every else mask[asks].sum(axis=1) < asks + 1
    return Reading(ledger.tokens.copy(), np.arange(len(mask)), mask, asks[thinned], np.arange(1, len(real))[thinned])


def join(readings: Sequence[Reading], sizes: Sequence[int]) -> Reading:
    """Documents of `sizes` real tokens beside each other; none sees another."""
    width = sum(len(found.tokens) for found in readings)
    mask, asks, answers, at, real = np.zeros((width, width), dtype=bool), [], [], 0, 0
    for found, size in zip(readings, sizes, strict=True):
        end = at + len(found.tokens)
        mask[at:end, at:end] = found.mask
        asks.append(found.asks + at)
        answers.append(found.answers + real)
        at, real = end, real + size
    tokens, positions = (np.concatenate([getattr(r, name) for r in readings]) for name in ("tokens", "positions"))
    return Reading(tokens, positions, mask, np.concatenate(asks), np.concatenate(answers))


class Student(nn.Module):
    """Wraps a causal language model (with its adapter) so that a forward gives the loss of a batch of documents."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, info: ModelInfo, policies: Policies, *, distil: float = 1.0,
        next_token: float = 0.0, vocabulary: float = 1.0, hidden: float = 0.0,
    ) -> None:
        """model: a transformers or PEFT model. vocabulary: see `candidates`.

        Raises ConfigError when there is nothing to learn from.
        """
        super().__init__()
        if distil < 0 or next_token < 0 or not distil + next_token:
            raise ConfigError("The weights of distillation and next-token loss must not be negative, nor both 0.")
        self.model, self.tokenizer, self.info, self.policies = model, tokenizer, info, policies
        self.distil, self.next_token, self.vocabulary, self.hidden = distil, next_token, vocabulary, hidden
        self._no_split_modules = self.bare._no_split_modules  # the layers that FSDP shares out one by one
        self.plain = is_plain(self.bare, layer_kinds(self.bare.config))
        self.cache_name = cache_argument(check_arguments(self.bare))
        self.reads_cells = "SEL" in policies.base.anchors and CELLS in scorer(policies.base.scorer, info).needs

    @property
    def bare(self) -> Any:
        """The transformers model, its adapter's layers in place."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def head(self) -> Any:
        """The output layer. Where it is tied to an embedding in which <AC> is trained, without that: <AC> is never
        predicted, and a frozen matrix is what makes the loss fast."""
        head = self.bare.get_output_embeddings()
        return getattr(head, "original_module", head)

    def forward(self, input_ids: torch.Tensor, sizes: torch.Tensor, seeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """input_ids [rows, n]: a block a row, padded at the end. sizes [rows, d]: tokens of its documents, padded with
        0. seeds [rows]. Returns {"loss": a mean over rows * n, so that means over processes are the same}."""
        lengths = [[size for size in row if size] for row in sizes.tolist()]
        told, cells = self._teach(input_ids, lengths)
        readings = [
            self._read(input_ids[row].tolist(), lengths[row], None if cells is None else cells[row], int(seeds[row]))
            for row in range(len(lengths))
        ]
        states = self.read(readings, middle=self.hidden > 0)
        total = states[0].sum() * 0  # documents too short for anything to be dropped have a gradient too: none
        for row, found in enumerate(readings):
            if len(found.asks):
                asks, answers = self._indices(found.asks), self._indices(found.answers)
                random = np.random.default_rng(int(seeds[row]) + 1)
                value = loss(
                    states[0][row, asks], told[0][row, answers - 1], self.head,
                    input_ids[row, answers], distil=self.distil, next_token=self.next_token,
                    over=candidates(input_ids[row], self.info.vocabulary, self.vocabulary, random),
                )
                if self.hidden:
                    value = value + self.hidden * apartness(
                        [said[row, asks] for said in states[1:]], [heard[row, answers - 1] for heard in told[1:]]
                    )
                total = total + len(found.asks) * value
        return {"loss": total / input_ids.numel()}

    def read(self, readings: Sequence[Reading], middle: bool = False) -> list[torch.Tensor]:
        """Hidden states [rows, m, d] of blocks read under their masks, as `states` gives them."""
        width = max(len(found.tokens) for found in readings)
        ids, positions = (torch.zeros(len(readings), width, dtype=torch.long) for _ in range(2))
        masks = [np.eye(width, dtype=bool) for _ in readings]  # padding sees itself: no empty row
        for row, found in enumerate(readings):
            size = len(found.tokens)
            ids[row, :size], positions[row, :size] = torch.from_numpy(found.tokens), torch.from_numpy(found.positions)
            masks[row][:size, :size] = found.mask
        return self.states(ids, positions, masks, middle=middle)

    def states(
        self, ids: torch.Tensor, positions: torch.Tensor, masks: Sequence[Bools] | None, cache: Any = None, *,
        middle: bool = False,
    ) -> list[torch.Tensor]:
        """ids, positions [rows, m]; masks: [m, m] a row, None: causal. The final hidden states [rows, m, d] and, if
        `middle`, those of some layers of the upper two thirds."""
        with masked(self.bare, masks, self.plain) as mask:
            found = self.bare.base_model(
                input_ids=ids.to(self.bare.device), position_ids=positions.to(self.bare.device),
                use_cache=cache is not None, attention_mask=mask, output_hidden_states=middle,
                **{self.cache_name: cache},
            )
        layers = len(found.hidden_states) - 1 if middle else 0
        some = found.hidden_states[layers // 3 : layers : max(1, layers // 6)] if middle else ()
        return [found.last_hidden_state, *some]

    @torch.no_grad()
    def _teach(
        self, input_ids: torch.Tensor, lengths: Sequence[Sequence[int]]
    ) -> tuple[list[torch.Tensor], list[Cells] | None]:
        """Hidden states [rows, n, d] of the full cache, adapter off, and each row's cells if a scorer asks."""
        from transformers import DynamicCache

        cache = DynamicCache() if self.reads_cells else None
        off: AbstractContextManager[Any] = nullcontext()
        if hasattr(self.model, "disable_adapter"):
            off = self.model.disable_adapter()
        positions, masks = apart(lengths, input_ids.shape[1])
        with off:
            states = self.states(input_ids, positions, masks, cache, middle=self.hidden > 0)
        return states, None if cache is None else [cells_of(cache, row) for row in range(len(lengths))]

    def _read(self, tokens: list[int], sizes: Sequence[int], cells: Cells | None, seed: int) -> Reading:
        """Every document of a block, each under a policy of its own."""
        random, found, at = np.random.default_rng(seed), [], 0
        for size in sizes:
            policy, recalled, every = self.policies.draw(random)
            own = None if cells is None else Cells(cells.values[at : at + size], cells.key_norms[at : at + size])
            engine = PlanningEngine(self.tokenizer, self.info, cells=own)
            ledger = plan(engine, policy, tokens[at : at + size])
            recall_some(ledger, recalled, random)
            found.append(reading(ledger, every=every))
            at += size
        return join(found, sizes)

    def _indices(self, positions: Ints) -> torch.Tensor:
        return torch.from_numpy(positions).to(self.bare.device)


def apart(lengths: Sequence[Sequence[int]], width: int) -> tuple[torch.Tensor, list[Bools] | None]:
    """Positions [rows, width] and causal masks of documents beside each other; no masks where each row holds one."""
    positions = torch.zeros(len(lengths), width, dtype=torch.long)
    masks = [np.eye(width, dtype=bool) for _ in lengths] if any(len(row) > 1 for row in lengths) else None
    for row, sizes in enumerate(lengths):
        at = 0
        for size in sizes:
            positions[row, at : at + size] = torch.arange(size)
            if masks is not None:
                masks[row][at : at + size, at : at + size] = np.tri(size, dtype=bool)
            at += size
    return positions, masks


def cells_of(cache: Any, row: int) -> Cells:
    """What the cells of one row hold, from a transformers cache."""
    values = torch.cat([layer.values[row].transpose(0, 1).flatten(1) for layer in cache.layers], dim=1)
    norms = [layer.keys[row].square().sum(dim=(0, 2)).sqrt() for layer in cache.layers]
    return Cells(floats(values), floats(torch.stack(norms, dim=1)))
