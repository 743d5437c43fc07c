"""Several continuations of one session's text in one batch of llama.cpp's, each in a sequence of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from anchorkv.engines.base import SURPRISE, Floats, surprise_of
from anchorkv.engines.llama_memory import LlamaMemory

if TYPE_CHECKING:
    from anchorkv.engines.llama import LlamaEngine

AT_ONCE = 16
"""Texts in a batch, at most: an engine has few sequences."""


def score_together(
    engine: LlamaEngine, memory: LlamaMemory, start: int, texts: Sequence[Sequence[int]]
) -> list[Floats]:
    """As `ScoresTogether.score_together` says."""
    before = memory.last_logits
    if before is None:
        before = np.zeros(engine.info.vocabulary, dtype=np.float32)
    found = [np.full(len(text), surprise_of(before, text[0]), dtype=np.float32) for text in texts]
    longer = [index for index, text in enumerate(texts) if len(text) > 1]
    together = memory.continues_at(start)
    for indices in _batches(longer, texts, engine.batch if together else 0):
        with ExitStack() as stack:
            forks = [memory.fork() for _ in indices]
            for fork in forks:
                stack.callback(fork.close)
            if len(forks) == 1:
                out = forks[0].decode(texts[indices[0]], start, needs=frozenset({SURPRISE}), logits=False)
                found[indices[0]] = out.surprise if out.surprise is not None else found[indices[0]]
                continue
            rows = [
                (token, start + at, fork.sequence, True)
                for index, fork in zip(indices, forks, strict=True) for at, token in enumerate(texts[index][:-1])
            ]
            engine._run(rows)
            logits = iter(engine._all_logits(len(rows)))
            for index in indices:
                found[index][1:] = [surprise_of(next(logits), token) for token in texts[index][1:]]
    return found


def _batches(indices: Sequence[int], texts: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """`indices` of texts in parts of at most `most` tokens and AT_ONCE texts; at least one each."""
    part: list[int] = []
    size = 0
    for index in indices:
        tokens = len(texts[index]) - 1
        if part and (size + tokens > most or len(part) == AT_ONCE):
            yield part
            part, size = [], 0
        part.append(index)
        size += tokens
    if part:
        yield part
