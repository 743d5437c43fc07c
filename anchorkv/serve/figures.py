"""What the engine thread has done so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

MOST_SAVED = 1.0
"""Seconds of its share that low priority may save up: that it left some unused an hour ago is no reason to hold up
answers now."""


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


class Share:
    """Time that low priority may take while others run."""

    def __init__(self, part: float) -> None:
        """part: of the others' time."""
        self._part = part
        self._credit = self._others = 0.0

    def left(self, others: float) -> bool:
        """Whether some is left. others: seconds that the others have taken since the start."""
        self._credit = min(MOST_SAVED, self._credit + self._part * (others - self._others))
        self._others = others
        return self._credit >= 0

    def take(self, seconds: float) -> None:
        """It took so long; what ran over is waited for."""
        self._credit -= seconds


def mean(so_far: float, new: float) -> float:
    """A running mean that forgets; the first value counts whole."""
    return so_far + 0.2 * (new - so_far) if so_far else new
