"""A conversation whose own turns are compressed as they age."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchorkv.config import AnchorConfig
from anchorkv.decode import decode
from anchorkv.document import TextWriter
from anchorkv.engines.base import Engine
from anchorkv.errors import ConfigError
from anchorkv.prompt import Prompt
from anchorkv.recall import RecallPlan
from anchorkv.sampling import Sampling
from anchorkv.savefile import open_session, save_session
from anchorkv.session import Session


@dataclass(frozen=True)
class Turn:
    """One exchange and what it cost."""

    user: str
    assistant: str
    tokens: int
    first_token_seconds: float
    tokens_per_second: float
    recalled: list[int]


class Conversation:
    """Turns over one session. An interrupted answer leaves what was written in place, and the next turn goes on."""

    def __init__(self, engine: Engine, config: AnchorConfig, system: str | None = None) -> None:
        self.prompt = Prompt.of(engine.tokenizer, system)
        self.session = Session(engine, config)
        self.turns: list[Turn] = []

    def say(self, message: str, *, max_tokens: int = 256, sampling: Sampling | None = None) -> Iterator[str]:
        """Yield the answer in pieces. The turn is entered in `turns` when the iteration ends, however it ends."""
        if not message.strip():
            raise ConfigError("The message is empty; say something.")
        session, tokenizer = self.session, self.session.engine.tokenizer
        started = time.perf_counter()
        plan = RecallPlan(session)
        plan.update(message)
        self._open_turn(message)
        first, count, pieces = 0.0, 0, []
        writer = TextWriter(tokenizer)
        try:
            for token in decode(session, max_tokens, sampling or Sampling(), plan=plan, question=message):
                count += 1
                first = first or time.perf_counter() - started
                pieces.append(writer.write(token))
                yield pieces[-1]
        finally:
            for segment in list(session.recalled):
                session.release(segment, "the turn ended")
            total = time.perf_counter() - started
            speed = (count - 1) / (total - first) if count > 1 else 0.0
            self.turns.append(Turn(message, "".join(pieces).strip(), count, first or total, speed, list(plan.brought)))

    def _open_turn(self, message: str) -> None:
        session, tokenizer, prompt = self.session, self.session.engine.tokenizer, self.prompt
        if not len(session.ledger):
            opening = tokenizer.start_ids() + tokenizer.encode(prompt.opening, special=True)
            session.read(opening, [session.config.pin_prompt] * len(opening), logits=False)
            session.end_segment()
            before, after = "", prompt.asking
        else:
            before, after = prompt.next_turn
        if before:
            session.read(tokenizer.encode(before, special=True), logits=False)
            session.end_segment()
        session.read(tokenizer.encode(message), logits=False)
        session.read(tokenizer.encode(after, special=True))

    def save(self, path: str | Path) -> None:
        """Raises SavedStateError if the file cannot be written."""
        extra: dict[str, Any] = {"kind": "conversation", "turns": [asdict(turn) for turn in self.turns]}
        save_session(self.session, path, {**extra, "prompt": asdict(self.prompt)})

    @classmethod
    def open(cls, engine: Engine, path: str | Path) -> Conversation:
        """Raises SavedStateError when the file is damaged or another model's."""
        session, extra = open_session(engine, path)
        conversation = object.__new__(cls)
        conversation.session = session
        conversation.turns = [Turn(**turn) for turn in extra.get("turns", [])]
        fields = extra.get("prompt")
        conversation.prompt = (
            Prompt(fields["opening"], fields["asking"], tuple(fields["next_turn"])) if fields
            else Prompt.of(engine.tokenizer)
        )
        return conversation

    def close(self) -> None:
        self.session.close()
