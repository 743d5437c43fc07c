"""One answer while it is written: which token comes next, what text it makes, and when it is over."""

from __future__ import annotations

from collections import Counter

import numpy as np

from anchorkv.document import TextWriter
from anchorkv.engines.base import Floats, Tokenizer
from anchorkv.sampling import Sampler
from anchorkv.serve.grammar import Grammar
from anchorkv.serve.requests import Ask, Finish, Piece
from anchorkv.serve.stops import Stops


class Writing:
    """Draws tokens for one ask. `draw` gives the next, or None when the answer is over; `finish` then says why."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer, grammar: Grammar | None) -> None:
        self._ask, self._tokenizer, self._grammar = ask, tokenizer, grammar
        never = tokenizer.anchor_id() if "AC" in ask.policy.anchors else None
        self._sampler: Sampler = ask.sampling.sampler(never)
        self._text = TextWriter(tokenizer)
        self._stops = Stops(ask.stop)
        self._bias = dict(ask.logit_bias)
        self._counts: Counter[int] = Counter()
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.pieces: list[str] = []
        self.finish: Finish | None = None

    @property
    def stop(self) -> str | None:
        """The stop sequence that ended it."""
        return self._stops.hit

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def draw(self, logits: Floats) -> Piece | None:
        """The next token by `logits` [vocabulary], as a piece; None when the model ends its turn."""
        given = self._ask.given
        token = given[len(self.tokens)] if given is not None else self._drawn(logits)
        if token in self._tokenizer.eos_ids and given is None:
            self.finish = "stop"
            return None
        return self._take(token, logits)

    def _drawn(self, logits: Floats) -> int:
        scores = self._adjusted(logits)
        token = self._sampler.draw(scores)
        if self._grammar is None:
            return token
        if not self._grammar.allows(token):  # looking at one token first saves looking at all of them most times
            masked = self._grammar.mask(scores)
            if not np.isfinite(masked).any():
                return next(iter(self._tokenizer.eos_ids))
            token = self._sampler.draw(masked)
        self._grammar.accept(token)
        return token

    def _adjusted(self, logits: Floats) -> Floats:
        ask = self._ask
        penalised = self._counts and (ask.presence_penalty or ask.frequency_penalty)
        if not (penalised or self._bias or ask.ignore_end):
            return logits
        scores = logits.copy()
        if penalised:
            seen = np.fromiter(self._counts, dtype=np.int64)
            often = np.fromiter(self._counts.values(), dtype=np.float32)
            scores[seen] -= ask.presence_penalty + ask.frequency_penalty * often
        for token, bias in self._bias.items():
            if 0 <= token < len(scores):
                scores[token] += bias
        if ask.ignore_end:
            scores[list(self._tokenizer.eos_ids)] = -np.inf
        return scores

    def _take(self, token: int, logits: Floats) -> Piece:
        ask = self._ask
        total = _log_sum_exp(logits)
        self.tokens.append(token)
        self.logprobs.append(float(logits[token] - total))
        self._counts[token] += 1
        shown = self._stops.feed(self._text.write(token))
        if self._stops.hit is not None and ask.given is None:
            self.finish = "stop"
        elif len(self.tokens) >= (len(ask.given) if ask.given is not None else ask.max_tokens):
            self.finish = "length" if ask.given is None else "stop"
        self.pieces.append(shown)
        if ask.logprobs is None:
            return Piece(shown, token)
        return Piece(shown, token, self._name(token), self.logprobs[-1], self._top(logits - total, ask.logprobs))

    def flush(self) -> Piece | None:
        """What was held back, once the answer is over."""
        held = self._stops.flush()
        if not held:
            return None
        self.pieces.append(held)
        return Piece(held, -1)

    def _top(self, spread: Floats, count: int) -> tuple[tuple[str, float], ...]:
        if not count:
            return ()
        best = np.argpartition(-spread, count - 1)[:count]
        best = best[np.argsort(-spread[best], kind="stable")]
        return tuple((self._name(int(token)), float(spread[token])) for token in best)

    def _name(self, token: int) -> str:
        return self._tokenizer.piece(token).decode("utf-8", errors="replace")


def _log_sum_exp(logits: Floats) -> np.float32:
    top = logits.max()
    total: np.float32 = top + np.log(np.exp(logits - top).sum())
    return total
