"""How far training has come: perplexity with the full cache, anchors and no memory, the same weights thrice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from anchorkv.config import AnchorConfig, preset
from anchorkv.engines.base import Cells
from anchorkv.evaluate.losses import context_recovered
from anchorkv.train.plan import PlanningEngine, plan
from anchorkv.train.student import Reading, Student, cells_of, reading

UNSCORED = 256
"""Tokens at a document's beginning that are read but not scored: older context hardly exists there."""


@dataclass(frozen=True)
class Validation:
    """Perplexities on the same tokens, and the cells kept at a document's end."""

    full: float
    anchored: float
    none: float
    reduction: float

    @property
    def ratio(self) -> float:
        return self.anchored / self.full

    @property
    def recovered(self) -> float:
        """Context recovered: 1 is the full cache, 0 is nothing but sinks and the recent window."""
        return context_recovered(self.none, self.anchored, self.full)


@torch.no_grad()
def validate(student: Student, documents: Sequence[list[int]], policy: AnchorConfig) -> Validation:
    """Read `documents` (token ids) three ways with the adapter on, in masked forwards.

    A scorer that reads cells is shown those of the full cache: the anchors' own differ a little in the engines.
    """
    was = student.training
    student.eval()
    policy = policy.replace(recall="off", cell_budget=None)
    losses: dict[str, list[torch.Tensor]] = {"full": [], "anchored": [], "none": []}
    kept = full = 0
    for tokens in documents:
        cells = _full_cells(student, tokens) if student.reads_cells else None
        ways = {"full": preset("full"), "anchored": policy, "none": policy.replace(anchors=())}
        for name, config in ways.items():
            found, held = _reading(student, tokens, config, cells)
            losses[name].append(token_losses(student, found, tokens, UNSCORED))
            if name == "anchored":
                kept, full = kept + held, full + len(tokens)
    student.train(was)
    means = {name: math.exp(float(torch.cat(parts).mean())) for name, parts in losses.items()}
    return Validation(means["full"], means["anchored"], means["none"], full / max(1, kept))


def _full_cells(student: Student, tokens: list[int]) -> Cells:
    from transformers import DynamicCache

    cache = DynamicCache()
    ids = torch.tensor([tokens])
    student.states(ids, torch.arange(len(tokens))[None], None, cache)
    return cells_of(cache, 0)


def _reading(student: Student, tokens: list[int], config: AnchorConfig, cells: Cells | None) -> tuple[Reading, int]:
    ledger = plan(PlanningEngine(student.tokenizer, student.info, cells=cells), config, tokens)
    return reading(ledger, every=True), int(ledger.held().sum())


def token_losses(student: Student, found: Reading, tokens: list[int], first: int = 0) -> torch.Tensor:
    """-log p [scored] of the scored tokens from `first` on, over the whole vocabulary."""
    hidden = student.read([found])[0][0]
    scored = found.answers >= first
    rows, answers = torch.from_numpy(found.asks[scored]), torch.from_numpy(found.answers[scored])
    targets, head = torch.tensor(tokens)[answers], student.bare.get_output_embeddings()
    parts = [
        nn.functional.cross_entropy(head(hidden[r.to(hidden.device)]).float().cpu(), t, reduction="none")
        for r, t in zip(rows.split(256), targets.split(256), strict=True)
    ]
    return torch.cat(parts)
