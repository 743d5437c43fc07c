"""What the engine thread has done so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Figures:
    """Totals since the start, and running means."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    low_seconds: float = 0.0
    sent_away: int = 0
    """How often a running request had to give up its cells for a while."""
    step_seconds: float = 0.0
    """Mean of late."""
    read_rate: float = 0.0
    """Tokens a second, mean of late; 0 until the first slice was read."""
    request_seconds: float = 5.0
    """From admission to end, mean of late."""


def mean(so_far: float, new: float) -> float:
    """A running mean that forgets; the first value counts whole."""
    return so_far + 0.2 * (new - so_far) if so_far else new
