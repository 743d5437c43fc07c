"""The model's own chat template, cut at the places where a document, a question or a turn goes."""

from __future__ import annotations

from dataclasses import dataclass

from anchorkv.engines.base import Tokenizer
from anchorkv.errors import ModelError

_TEXT, _REPLY, _NEXT = "\u2402text\u2403", "\u2402reply\u2403", "\u2402next\u2403"


@dataclass(frozen=True)
class Prompt:
    """Text around a user's message. `opening` + message + `asking` is what the model sees before it answers;
    `next_turn[0]` + message + `next_turn[1]` follows its answer."""

    opening: str
    asking: str
    next_turn: tuple[str, str]

    @classmethod
    def of(cls, tokenizer: Tokenizer, system: str | None = None) -> Prompt:
        """Raises ModelError when the template loses or rewrites the message."""
        head = [{"role": "system", "content": system}] if system else []
        first = [*head, {"role": "user", "content": _TEXT}]
        opening, found, asking = tokenizer.chat(first).partition(_TEXT)
        turns = [*first, {"role": "assistant", "content": _REPLY}, {"role": "user", "content": _NEXT}]
        between, found_next, closing = tokenizer.chat(turns).partition(_REPLY)[2].partition(_NEXT)
        if not found or not found_next:
            raise ModelError("The model's chat template does not keep a user's message as it is; it cannot be used.")
        return cls(opening, asking, (between, closing))
