"""An ask becomes a script: the tokens to read, which are pinned, where segments are ended by force, where recall looks.

A chat is read as `anchorkv.chat.Conversation` reads it, questions about a document as `anchorkv.document.Document`
does. The script depends on the ask alone, so a conversation that is sent again, longer by a turn, begins with the same
tokens. Only the template's own text is read for control tokens; what people wrote is text, whatever it looks like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from anchorkv.config import AnchorConfig
from anchorkv.document import QUESTION, pinned_tokens
from anchorkv.engines.base import Bools, Ints, Tokenizer
from anchorkv.errors import ConfigError, DocumentError, ModelError
from anchorkv.prompt import Prompt
from anchorkv.serve.requests import Ask, Message

ALL_QUESTION = 256
"""Tokens; a last message up to this long is all question. In a longer one, the question stands at its end …"""
QUESTION_TOKENS = 96
"""… which is its last paragraph, or this many tokens of it."""

_MARK = "\u2402{}\u2403"
_MARKS = re.compile("\u2402(\\d+)\u2403")
_PINNED, _ENDS = 40, 41


@dataclass(frozen=True)
class Script:
    """tokens, pinned, ends: [n]; `ends`: a segment is ended by force after this token."""

    tokens: Ints
    pinned: Bools
    ends: Bools
    recall_at: int = 0
    """Recall looks before this token is read …"""
    question: str = ""
    """… for what this text needs; "" for nothing."""
    head: int = 0
    """Tokens of the opening, which conversations with the same system prompt share."""

    def __len__(self) -> int:
        return len(self.tokens)

    def stream(self) -> Ints:
        """[n] numbers that say all there is about each token: two scripts that begin alike are read alike."""
        return stream(self.tokens, self.pinned, self.ends)


def stream(tokens: Ints, pinned: Bools, ends: Bools) -> Ints:
    """As `Script.stream`."""
    numbers: Ints = tokens | pinned.astype(np.int64) << _PINNED | ends.astype(np.int64) << _ENDS
    return numbers


class _Writer:
    """Puts a script together."""

    def __init__(self, tokenizer: Tokenizer, config: AnchorConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.tokens: list[int] = []
        self.pinned: list[bool] = []
        self.ends: set[int] = set()
        self.head = 0

    def template(self, text: str, pinned: bool = False) -> None:
        self._add(self.tokenizer.encode(text, special=True), pinned)

    def start(self) -> None:
        self._add(self.tokenizer.start_ids(), self.config.pin_prompt)

    def content(self, text: str, pinned: bool = False) -> None:
        tokens = self.tokenizer.encode(text)
        spans = [span for span in self.config.pinned if span in text]
        self.tokens += tokens
        self.pinned += [True] * len(tokens) if pinned else pinned_tokens(text, spans, tokens, self.tokenizer)

    def _add(self, tokens: Sequence[int], pinned: bool) -> None:
        self.tokens += tokens
        self.pinned += [pinned] * len(tokens)

    def end_segment(self) -> None:
        if self.tokens:
            self.ends.add(len(self.tokens) - 1)

    def script(self, recall_at: int, question: str) -> Script:
        ends = np.zeros(len(self.tokens), dtype=np.bool_)
        ends[sorted(self.ends)] = True
        tokens, pinned = np.asarray(self.tokens, dtype=np.int64), np.asarray(self.pinned, dtype=np.bool_)
        return Script(tokens, pinned, ends, recall_at, question, self.head)


def script_of(ask: Ask, tokenizer: Tokenizer, document: Script | None = None) -> Script:
    """How `ask` is read; `document`: the script of the document that it is about.

    Raises ConfigError when the model's template refuses the messages, or there is nothing to read.
    """
    writer = _Writer(tokenizer, ask.policy)
    if ask.messages:
        script = _chat(writer, ask.messages) if document is None else _questions(writer, ask.messages, document)
    else:
        if ask.text is not None:
            writer.start()
            writer.content(ask.text)
        else:
            writer._add(ask.tokens or (), False)
        at, question = _question_in(writer.tokens, tokenizer)
        script = writer.script(at, question)
    if not len(script):
        raise ConfigError("The prompt holds no token; give some text.")
    return script


def document_script(title: str, text: str, config: AnchorConfig, tokenizer: Tokenizer, strict: bool = False) -> Script:
    """A document after the template's opening, as `Document.read` reads it.

    strict: raise ConfigError for a pinned span that does not occur. Raises DocumentError for an empty text.
    """
    if not text.strip():
        raise DocumentError(f"{title or 'The document'} has no text in it; give a document with words.")
    missing = [span for span in config.pinned if span not in text]
    if strict and missing:
        raise ConfigError(f"The pinned span {missing[0]!r} does not occur in the document; check its spelling.")
    writer = _Writer(tokenizer, config)
    writer.start()
    writer.template(Prompt.of(tokenizer).opening, pinned=config.pin_prompt)
    writer.content(text)
    return writer.script(len(writer.tokens), "")


def _chat(writer: _Writer, messages: Sequence[Message]) -> Script:
    config, tokenizer = writer.config, writer.tokenizer
    writer.start()
    last, opened = _last_user(messages), False
    recall_at, question = 0, ""
    for before, index in _around(messages, tokenizer):
        if index is not None and index == last:
            recall_at, question = len(writer.tokens), messages[index].content
        writer.template(before, pinned=config.pin_prompt and not opened)
        if index is None:
            break
        message = messages[index]
        starts_turn = message.role not in ("assistant", "system", "developer")
        if starts_turn:
            writer.end_segment()
            writer.head = writer.head or len(writer.tokens)
        opened = opened or message.role not in ("system", "developer")
        begun = len(writer.tokens)
        writer.content(message.content, pinned=config.pin_prompt and not opened)
        if index == last:
            at, asked = _question_in(writer.tokens[begun:], tokenizer)
            if at:
                recall_at, question = begun + at, asked
    return writer.script(recall_at, question)


def _questions(writer: _Writer, messages: Sequence[Message], document: Script) -> Script:
    """Messages about a document, which stands where the first question begins. A system prompt joins that question."""
    writer.tokens, writer.pinned = document.tokens.tolist(), document.pinned.tolist()
    system = [message.content for message in messages if message.role in ("system", "developer")]
    turns = [message for message in messages if message.role not in ("system", "developer")]
    if not turns or turns[0].role == "assistant":
        raise ConfigError("A question about a document begins with a user's message; give one.")
    last, recall_at = _last_user(turns), len(document)
    for before, index in _around(turns, writer.tokenizer):
        if index == 0:
            asked = "\n\n".join([*system, turns[0].content.strip()])
            writer.content(QUESTION.format(question=asked))
            continue
        if index == last:
            recall_at = len(writer.tokens)
        writer.template(before)
        if index is None:
            break
        if turns[index].role != "assistant":
            writer.end_segment()
        writer.content(turns[index].content)
    return writer.script(recall_at, "" if last is None else turns[last].content)


def _around(messages: Sequence[Message], tokenizer: Tokenizer) -> Iterator[tuple[str, int | None]]:
    """(the template's text before message i, i) for each message, and (its text after the last one, None)."""
    marked = [{"role": message.role, "content": _MARK.format(i)} for i, message in enumerate(messages)]
    try:
        text = tokenizer.chat(marked)
    except ModelError as error:
        raise ConfigError(f"The model's chat template refuses these messages. {error}") from None
    parts = _MARKS.split(text)
    if [int(found) for found in parts[1::2]] != list(range(len(messages))):
        raise ConfigError("The model's chat template does not keep all of these messages; check their roles.")
    for index, before in enumerate(parts[:-1:2]):
        yield before, index
    yield parts[-1], None


def _last_user(messages: Sequence[Message]) -> int | None:
    return next((i for i in reversed(range(len(messages))) if messages[i].role == "user"), None)


def _question_in(tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[int, str]:
    """Where in a long text the question at its end begins, and what is asked: that end, and the text's first line,
    where an instruction may stand. (0, text) for a short one."""
    if len(tokens) <= ALL_QUESTION:
        return 0, tokenizer.decode(tokens)
    end = tokenizer.decode(tokens[-QUESTION_TOKENS:]).rstrip()
    _, broken, paragraph = end.rpartition("\n\n")
    count = min(QUESTION_TOKENS, len(tokenizer.encode(paragraph)) + 1) if broken and paragraph else QUESTION_TOKENS
    first = tokenizer.decode(tokens[:QUESTION_TOKENS]).lstrip().partition("\n")[0]
    return len(tokens) - count, f"{first} {tokenizer.decode(tokens[-count:])}".strip()
