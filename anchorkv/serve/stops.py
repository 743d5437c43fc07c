"""Stop sequences over a text that comes in pieces: what may begin one is held back until it is certain."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Feed it pieces of text; it gives out what is certain to come before any stop sequence."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit: str | None = None
        """The stop sequence that was found; nothing is given out after it."""

    def feed(self, text: str) -> str:
        """What of the text so far may be shown and was not yet. Of several sequences the first to begin wins, of those
        that begin together the longest."""
        if self.hit is not None:
            return ""
        held = self._held + text
        found = [(at, -len(stop), stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            at, _, self.hit = min(found)
            self._held = ""
            return held[:at]
        keep = self._possible(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The text is over: what was held back and was no stop sequence after all."""
        held, self._held = self._held, ""
        return held

    def _possible(self, held: str) -> int:
        """Length of the longest end of `held` that a stop sequence begins with."""
        return max(
            (n for stop in self._stops for n in range(1, min(len(stop), len(held) + 1)) if held.endswith(stop[:n])),
            default=0,
        )
