"""What is asked of the engine room and what comes back: the plain data that every part of the server shares.

Nothing here knows HTTP, keys, databases or engines. An `Ask` is one prompt and one answer; `n` answers are `n` asks.
"""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from anchorkv.config import AnchorConfig
from anchorkv.errors import AnchorKVError, CapacityError, ConfigError
from anchorkv.sampling import Sampling

Finish = Literal["stop", "length", "cancelled", "error"]


class Busy(AnchorKVError):
    """The queue is full or the server is draining (429 or 503): come back after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooLarge(CapacityError):
    """This request could never fit in the cells there are, however long it waited (400)."""


class NotFound(AnchorKVError):
    """This tenant has no document of that id (404)."""


def new_id(kind: str) -> str:
    """A random id that tells its kind and nothing else: "ask-…", "doc-…"."""
    return f"{kind}-{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Message:
    """One message of a chat. Control tokens written in `content` are read as text, never obeyed."""

    role: str
    content: str


@dataclass(frozen=True)
class Ask:
    """One request. Exactly one of `messages`, `text` and `tokens` is given.

    With `document`, the messages are read after that document, as questions about it.
    """

    tenant: str
    policy: AnchorConfig
    messages: tuple[Message, ...] = ()
    """A chat, in the model's own template; the last message is answered."""
    text: str | None = None
    """A plain text to be continued."""
    tokens: tuple[int, ...] | None = None
    """The same as ids."""
    document: str | None = None
    """Id of one of the tenant's documents."""
    id: str = field(default_factory=lambda: new_id("ask"))
    sampling: Sampling = field(default_factory=Sampling)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    ignore_end: bool = False
    """Write on until `max_tokens`, whatever the model says (load tests)."""
    logprobs: int | None = None
    """How many of the likeliest tokens each piece lists; 0: its own log-probability alone; None: none of them."""
    grammar: str | None = None
    """GBNF that the answer follows (llama.cpp engine)."""
    json_schema: str | None = None
    """JSON text of a schema that the answer follows, "{}" for any JSON object; excludes `grammar`."""
    given: tuple[int, ...] | None = None
    """Score these ids as the answer instead of writing one: `answer_logprob` and, with `logprobs`, every piece's."""
    recall_segments: tuple[int, ...] | None = None
    """Recall exactly these segments (numbers as in `Outcome.segments`) instead of what the policy would."""
    attention: bool = False
    """Say where the answer's attention went, if the engine tells; takes one more pass over the answer."""
    reuse: bool = True
    """May go on from what an earlier request of this tenant has read, and leave its own for later ones."""

    def __post_init__(self) -> None:
        forms = [bool(self.messages), self.text is not None, self.tokens is not None]
        if sum(forms) != 1:
            raise ConfigError("Give exactly one of messages, text and tokens.")
        if self.document is not None and not self.messages:
            raise ConfigError("A document is asked with messages, not with a plain text.")
        if self.text == "" or self.tokens == ():
            raise ConfigError("The prompt is empty; give some text.")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1 (got {self.max_tokens}).")
        if any(not text for text in self.stop):
            raise ConfigError("A stop sequence is empty; leave it out.")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ConfigError(f"logprobs must be between 0 and 20 (got {self.logprobs}).")
        if self.grammar is not None and self.json_schema is not None:
            raise ConfigError("Give a grammar or a JSON schema, not both.")
        if self.given == ():
            raise ConfigError("The given answer is empty; there is nothing to score.")


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it is written: one token, and the text that is certain by now ("" while it is not)."""

    text: str
    token: int
    """-1: no token, only the last of the text that had been held back."""
    token_text: str = ""
    """What this token alone stands for; broken characters are shown as such."""
    logprob: float | None = None
    """Natural logarithm of the model's own probability, before temperature, penalties and grammar."""
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens' texts and log-probabilities, best first."""


@dataclass(frozen=True)
class SegmentFacts:
    """One segment at the end of a request: how many of its tokens are where, and every reason in order."""

    number: int
    start: int
    """Position of its first token; `stop` is the position after its last."""
    stop: int
    tokens: int
    kept: int
    """Cells held: sinks, pinned, anchors, recalled and what is still whole."""
    dropped: int
    pinned: int
    recalled: int
    why: tuple[str, ...]
    text: str = field(default="", repr=False)
    anchors: tuple[str, ...] = field(default=(), repr=False)
    """Texts of the tokens that stayed, of a segment that is no longer whole."""
    anchor_positions: tuple[int, ...] = ()
    """Of the same tokens, in the whole stream."""
    anchor_spans: tuple[tuple[int, int], ...] = ()
    """Their first characters in `text` and the ones after their last; tokens that share a character overlap."""


@dataclass(frozen=True)
class RecalledSegment:
    """A segment that recall brought back for this answer."""

    number: int
    cells: int
    start: int
    stop: int
    text: str = field(default="", repr=False)


@dataclass(frozen=True)
class AttentionFacts:
    """Where the attention went while the answer was written: shares that sum to 1, as means over layers, heads and the
    tokens that the answer's were drawn after."""

    sinks: float
    pinned: float
    anchors: float
    recalled: float
    recent: float
    """What is still whole, or was while the answer was written."""
    answer: float
    """The answer itself."""
    segments: tuple[float, ...]
    """Of each segment in `Outcome.segments`; the answer's own are among them."""


@dataclass(frozen=True)
class Outcome:
    """How a request ended, what it gave and what it cost. Cells and bytes are the engine's own count."""

    id: str
    tenant: str
    finish: Finish
    text: str
    policy: AnchorConfig
    document: str | None = None
    error: str = ""
    """One sentence when `finish` is "error"."""
    stop: str | None = None
    """The stop sequence that ended it, if one did."""
    prompt_tokens: int = 0
    """Tokens of the whole prompt, the document's included."""
    cached_tokens: int = 0
    """Those of them that an earlier request (or the document) had read already."""
    completion_tokens: int = 0
    tokens: tuple[int, ...] = ()
    """Ids written, the one that ended the turn not included."""
    answer_logprob: float | None = None
    """Mean natural log-probability a token, under the model's own distribution."""
    lowest_logprob: float | None = None
    kept_cells: int = 0
    peak_cells: int = 0
    full_cells: int = 0
    """Cells that a full cache would hold at the end."""
    kv_bytes: int = 0
    recalled: tuple[RecalledSegment, ...] = ()
    segments: tuple[SegmentFacts, ...] = ()
    attention: AttentionFacts | None = None
    """Where it was asked for and the engine tells."""
    queue_seconds: float = 0.0
    """From asking until the first token of the prompt was read."""
    prefill_seconds: float = 0.0
    first_token_seconds: float = 0.0
    """From asking until the first token was written."""
    decode_seconds: float = 0.0
    """From the first token written to the last."""

    @property
    def reduction(self) -> float:
        """Full cells per kept cell."""
        return self.full_cells / max(1, self.kept_cells)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; the policy as its options."""
        return {**asdict(self), "policy": self.policy.model_dump(mode="json"), "reduction": round(self.reduction, 3)}


@dataclass(frozen=True)
class DocumentFacts:
    """One document of one tenant. Its cells are in memory, or on disk until it is asked."""

    id: str
    tenant: str
    title: str
    tokens: int
    policy: AnchorConfig
    created: float
    """Seconds since 1970 (UTC)."""
    kept_cells: int
    kv_bytes: int
    file_bytes: int = 0
    """Size of its anchors on disk, 0 where none are."""
    reading_seconds: float = 0.0
    resident: bool = False
    """Whether its cells are in memory now."""
    damage: str = ""
    """What was wrong with its file when it was last opened, "" if nothing was; it has been read again since, or is
    read again when it is next asked."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; the policy as its options."""
        return {**asdict(self), "policy": self.policy.model_dump(mode="json")}


@dataclass(frozen=True)
class Load:
    """How full the engine room is now."""

    cells: int
    """KV cells there are in all."""
    used_cells: int
    """Cells held now: requests, documents and kept prefixes."""
    reserved_cells: int
    """Cells promised to running requests and not held yet."""
    prefix_cells: int
    document_cells: int
    reading: int
    writing: int
    waiting: int
    max_waiting: int
    sessions: int
    """Requests running now; at most `max_sessions`."""
    max_sessions: int
    prompt_tokens_total: int
    completion_tokens_total: int
    cached_tokens_total: int
    prefill_seconds_total: float
    decode_seconds_total: float
    steps_total: int
    sent_away_total: int
    """How often a running request had to give up its cells for a while."""
    prefixes: int
    documents: int
    draining: bool
    last_step_age: float
    """Seconds since the engine thread last finished a round; large while there is work means that it hangs."""
