"""What an anchored model is taught: to say through its anchors what it says with its full cache.

Next-token loss under the anchor rule is the paper's objective (AnLLM, section 3.3). On small budgets it teaches the
books rather than the anchors, so the default is self-distillation: the divergence from the same model's own full-cache
predictions, adapter off. Most tokens need no far context; their divergence is small anyway, so they weigh little.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CHUNK = 256
"""Tokens whose logits exist at once: [CHUNK, vocabulary] floats, four times over."""


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum over tokens of `distil` * KL(teacher || student) + `next_token` * -log p, through a frozen output matrix.

    The gradient with respect to the hidden states is computed in the forward, chunk by chunk, so that logits never
    outlive their chunk; the output matrix gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
        distil: float, next_token: float,
    ) -> torch.Tensor:
        """student, teacher [n, d]; weight [vocabulary, d]; targets [n] ids."""
        total = student.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(student)
        for first in range(0, len(student), CHUNK):
            part = slice(first, first + CHUNK)
            logs = (student[part] @ weight.T).float().log_softmax(dim=-1)
            wanted = torch.zeros_like(logs)
            if distil:
                told = (teacher[part] @ weight.T).float().log_softmax(dim=-1)
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
        return gradient * grads[0], None, None, None, None, None


def loss(
    student: torch.Tensor, teacher: torch.Tensor | None, head: nn.Linear, targets: torch.Tensor, *,
    distil: float = 1.0, next_token: float = 0.0,
) -> torch.Tensor:
    """Mean over the n scored tokens. student, teacher: final hidden states [n, d]; targets: the tokens that follow [n].

    A head that is trained itself takes the plain way, with all logits at once.
    """
    told = student.detach() if teacher is None else teacher
    if not head.weight.requires_grad and head.bias is None:
        total = _FrozenHeadLoss.apply(student, told, head.weight, targets, distil, next_token)
        return total / len(student)
    logs = head(student).float().log_softmax(dim=-1)
    value = next_token * nn.functional.nll_loss(logs, targets)
    if distil:
        with torch.no_grad():
            shares = head(told).float().log_softmax(dim=-1)
        value = value + distil * nn.functional.kl_div(logs, shares, reduction="batchmean", log_target=True)
    return value
