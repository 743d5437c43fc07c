"""Fit the scorer: from what a token's cell holds to how much later tokens will look at it. Minutes, not hours.

Texts are read once with the full cache (`usefulness.py`); a small head is then fitted to the logarithm of what was
seen. Only ranks within a text matter to the budget, so each text's mean is taken out of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Cells, Floats
from anchorkv.engines.torch import TorchEngine
from anchorkv.errors import ConfigError
from anchorkv.ledger import Ledger
from anchorkv.scorers import Learned, SegmentView, cell_features
from anchorkv.train.plan import PlanningEngine, plan
from anchorkv.train.usefulness import watch_text

QUERIES = 256
"""A token counts when at least so many later ones could have looked at it from afar: the end of a text says little."""
BATCH, PATIENCE = 2048, 4


@dataclass(frozen=True)
class Sample:
    """One text's tokens: features [n, d] as float16, target [n]."""

    features: np.ndarray[tuple[int, int], np.dtype[np.float16]]
    target: Floats


@dataclass(frozen=True)
class Fit:
    """A fitted head and how it does on texts that it was not fitted to."""

    scorer: Learned
    correlation: float
    """Of scores and targets."""
    captured: float
    """Share of the truly most useful twelfth of each text that is among the scorer's own twelfth."""


def sample(engine: TorchEngine, config: AnchorConfig, tokens: list[int]) -> Sample:
    """Read one text with the full cache: features and targets of the tokens that later ones could look at from afar."""
    ledger = plan(PlanningEngine(engine.tokenizer, engine.info), config.replace(anchors=()), tokens)
    segment = ledger.column("segment")
    far = segment[:, None] - segment[None, :] > config.recent_window
    useful, cells = watch_text(engine, tokens, far)
    counts = (far.sum(axis=0) >= QUERIES) & (np.arange(len(tokens)) >= config.sinks)
    features = features_of(engine, ledger, cells)[counts]
    return Sample(features.astype(np.float16), useful[counts] - useful[counts].mean())


def features_of(engine: TorchEngine, ledger: Ledger, cells: Cells) -> Floats:
    """`cell_features` of every token [n, d], segment by segment, as the session hands them to a scorer."""
    rows = []
    for number in range(ledger.segments):
        span = ledger.span(number)
        tokens = ledger.tokens[span].tolist()
        rows.append(cell_features(SegmentView(
            tokens=tokens, pieces=[engine.tokenizer.piece(token) for token in tokens], start=int(span[0]),
            surprise=None, cells=Cells(cells.values[span], cells.key_norms[span]), vocabulary=engine.info.vocabulary,
        )))
    return np.concatenate(rows)


def collect(
    engine: TorchEngine, config: AnchorConfig, texts: Iterable[list[int]], most: int,
    progress: Callable[[int], None] | None = None,
) -> list[Sample]:
    """Samples of at least `most` tokens in all. progress: called with the tokens read so far."""
    samples: list[Sample] = []
    done = 0
    for tokens in texts:
        samples.append(sample(engine, config, tokens))
        done += len(tokens)
        if progress:
            progress(done)
        if done >= most:
            break
    return samples


def fit(
    samples: Sequence[Sample], *, hidden: int = 128, epochs: int = 30, rate: float = 1e-3, seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Fit:
    """Fit a head with `hidden` ReLU units (0: linear) to nine tenths of the texts, stopping by the last tenth.

    progress: called with the number of epochs done. Raises ConfigError for fewer than ten texts.
    """
    if len(samples) < 10:
        raise ConfigError(f"A scorer needs at least 10 texts to be fitted and tested; {len(samples)} were given.")
    held = max(1, len(samples) // 10)
    train, test = samples[:-held], samples[-held:]
    x = torch.from_numpy(np.concatenate([s.features for s in train]))
    y = torch.from_numpy(np.concatenate([s.target for s in train]))
    mean, std = _moments(x)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = _head(x.shape[1], hidden)
        best = _descend(head, (x, y), test, (mean, std), epochs, rate, progress)
    learned = _learned(best, mean, std)
    scores = [learned.score_features(s.features.astype(np.float32)) for s in test]
    return Fit(learned, _correlation(scores, test), _captured(scores, test))


def _head(width: int, hidden: int) -> nn.Sequential:
    if not hidden:
        return nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 1))
    return nn.Sequential(nn.Dropout(0.1), nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, 1))


def _descend(
    head: nn.Sequential, train: tuple[torch.Tensor, torch.Tensor], test: Sequence[Sample],
    moments: tuple[torch.Tensor, torch.Tensor], epochs: int, rate: float, progress: Callable[[int], None] | None,
) -> nn.Sequential:
    """The head at its best epoch on `test`."""
    (x, y), (mean, std) = train, moments
    optimiser = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    kept, least, waited = {k: v.clone() for k, v in head.state_dict().items()}, float("inf"), 0
    for epoch in range(epochs):
        head.train()
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.mse_loss(head((x[rows].float() - mean) / std)[:, 0], y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        found = _test_loss(head, test, mean, std)
        if progress:
            progress(epoch + 1)
        waited = 0 if found < least else waited + 1
        if found < least:
            kept, least = {k: v.clone() for k, v in head.state_dict().items()}, found
        if waited >= PATIENCE:
            break
    head.load_state_dict(kept)
    return head.eval()


@torch.no_grad()
def _test_loss(head: nn.Sequential, test: Sequence[Sample], mean: torch.Tensor, std: torch.Tensor) -> float:
    head.eval()
    losses = [
        float(nn.functional.mse_loss(head((torch.from_numpy(s.features).float() - mean) / std)[:, 0],
                                     torch.from_numpy(s.target)))
        for s in test
    ]
    return float(np.mean(losses))


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [d], in parts that fit the memory."""
    total, squares = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], dtype=torch.float64)
    for part in x.split(8192):
        wide = part.double()
        total += wide.sum(dim=0)
        squares += wide.square().sum(dim=0)
    mean = total / len(x)
    std = (squares / len(x) - mean.square()).clamp_min(0).sqrt().clamp_min(1e-3)
    return mean.float(), std.float()


def _learned(head: nn.Sequential, mean: torch.Tensor, std: torch.Tensor) -> Learned:
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    arrays = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]
    (weight, bias), last = arrays[0], arrays[-1]
    if len(arrays) == 1:
        return Learned(mean.numpy(), std.numpy(), weight[0], bias[0])
    return Learned(mean.numpy(), std.numpy(), weight, bias, last[0][0], float(last[1][0]))


def _correlation(scores: Sequence[Floats], test: Sequence[Sample]) -> float:
    return float(np.mean([np.corrcoef(found, s.target)[0, 1] for found, s in zip(scores, test, strict=True)]))


def _captured(scores: Sequence[Floats], test: Sequence[Sample]) -> float:
    shares = []
    for found, s in zip(scores, test, strict=True):
        most = max(1, len(found) // 12)
        shares.append(len(np.intersect1d(np.argsort(-found)[:most], np.argsort(-s.target)[:most])) / most)
    return float(np.mean(shares))
