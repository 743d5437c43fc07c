"""What an anchored model is taught: to say through its anchors what it says with its full cache.

Next-token loss under the anchor rule is the paper's objective (AnLLM, section 3.3). On small budgets it teaches the
books rather than the anchors, so the default is self-distillation: the divergence from the same model's own full-cache
predictions, adapter off. Most tokens need no far context; their divergence is small anyway, so they weigh little.

The output matrix is a third of a small model's work and most of its rows are never likely, so the divergence is taken
over `Candidates`: every token of the text, and a sample of the others that stands for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

CHUNK = 256
"""Tokens whose logits exist at once: [CHUNK, vocabulary] floats, four times over."""


@dataclass(frozen=True)
class Candidates:
    """The tokens that the loss is computed over."""

    ids: torch.Tensor
    """[c], ascending."""
    weights: torch.Tensor
    """log of how many tokens each stands for [c]; added to its logit, so that sums over c estimate those over all."""


def candidates(text: torch.Tensor, vocabulary: int, share: float, random: np.random.Generator) -> Candidates:
    """All tokens of `text` [n] and `share` of the rest of the vocabulary; a share of 1 is exact.

    The sampled softmax with its correction (Jean et al., arXiv 1412.2007, section 3.2), here for both distributions
    of a divergence.
    """
    inside = np.unique(text.cpu().numpy())
    outside = np.setdiff1d(np.arange(vocabulary), inside)
    drawn = outside if share >= 1 else random.choice(outside, size=max(1, round(share * len(outside))), replace=False)
    ids = np.concatenate([inside, drawn])
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[len(inside) :] = np.log(max(1, len(outside)) / max(1, len(drawn)))
    order = np.argsort(ids)
    return Candidates(torch.from_numpy(ids[order]), torch.from_numpy(weights[order]))


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum over tokens of `distil` * KL(teacher || student) + `next_token` * -log p, through a frozen output matrix.

    The gradient with respect to the hidden states is computed in the forward, chunk by chunk, so that logits never
    outlive their chunk; the output matrix gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
        targets: torch.Tensor, distil: float, next_token: float,
    ) -> torch.Tensor:
        """student, teacher [n, d]; weight [c, d] and bias [c] of the candidates; targets [n]: which of them."""
        total = student.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(student)
        for first in range(0, len(student), CHUNK):
            part = slice(first, first + CHUNK)
            logs = torch.addmm(bias, student[part], weight.T).float().log_softmax(dim=-1)
            wanted = torch.zeros_like(logs)
            if distil:
                told = torch.addmm(bias, teacher[part], weight.T).float().log_softmax(dim=-1)
                shares = told.exp()
                total += distil * (shares * (told - logs)).sum()
                wanted.add_(shares, alpha=distil)
            if next_token:
                total += next_token * nn.functional.nll_loss(logs, targets[part], reduction="sum")
                wanted[torch.arange(len(logs)), targets[part]] += next_token
            gradient[part] = (logs.exp_().mul_(distil + next_token).sub_(wanted)).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None, None, None


def loss(
    student: torch.Tensor, teacher: torch.Tensor | None, head: nn.Linear, targets: torch.Tensor, *,
    distil: float = 1.0, next_token: float = 0.0, over: Candidates | None = None,
) -> torch.Tensor:
    """Mean over the n scored tokens. student, teacher: final hidden states [n, d]; targets: the tokens that follow [n].

    over: None, or the only tokens that are computed; `targets` must be among them. A head that is trained itself takes
    the plain way, with all logits at once.
    """
    told = student.detach() if teacher is None else teacher
    if not head.weight.requires_grad and head.bias is None:
        weight, bias = head.weight, head.weight.new_zeros(len(head.weight))
        if over is not None:
            ids = over.ids.to(weight.device)
            weight, bias = weight[ids], over.weights.to(weight)
            targets = torch.searchsorted(ids, targets)
        total = _FrozenHeadLoss.apply(student, told, weight, bias, targets, distil, next_token)
        return total / len(student)
    logs = head(student).float().log_softmax(dim=-1)
    value = next_token * nn.functional.nll_loss(logs, targets)
    if distil:
        with torch.no_grad():
            shares = head(told).float().log_softmax(dim=-1)
        value = value + distil * nn.functional.kl_div(logs, shares, reduction="batchmean", log_target=True)
    return value


def apartness(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far hidden states [n, d] of some layers are apart: squared distance over the teacher's squared length, mean.

    A signal from every layer's every direction, where the logits say one thing a token.
    """
    parts = [
        ((said - heard).square().sum(dim=-1) / heard.square().sum(dim=-1)).mean()
        for said, heard in zip(student, teacher, strict=True)
    ]
    return torch.stack(parts).mean()
