"""A Hugging Face tokenizer behind the protocol `anchorkv.engines.base.Tokenizer`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2

from anchorkv.engines.anchor_token import AC, stand_in
from anchorkv.errors import ModelError

TURN_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<turn|>", "<|end|>",
    "</s>", "<eos>",
)
"""Control tokens that end a turn or a text in one template or another; only those the vocabulary has count."""


class TorchTokenizer:
    """Wraps a transformers tokenizer (fast ones exactly; slow ones are read as SentencePiece)."""

    def __init__(self, tokenizer: Any, eos_ids: int | Iterable[int] | None = None) -> None:
        """eos_ids: what the model's generation configuration adds to the tokenizer's own ends."""
        if AC in tokenizer.get_added_vocab():  # an ordinary added token in the paper's models: text must not make it
            tokenizer.add_tokens([AC], special_tokens=True)
        self.hf = tokenizer
        self._added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        self._control = {i for i, token in self._added.items() if token.special} | set(tokenizer.all_special_ids)
        self._bytes = _byte_of_character() if _is_byte_level(tokenizer) else None
        self._pieces: dict[int, bytes] = {}
        own = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids or [])
        ends = {i for i, token in self._added.items() if token.content in TURN_ENDS}
        self.eos_ids = frozenset(i for i in (*own, tokenizer.eos_token_id, *ends) if i is not None)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, nothing added at its ends. `special`: control tokens written in it become their ids."""
        ids: list[int] = self.hf(text, add_special_tokens=False, split_special_tokens=not special, verbose=False)[
            "input_ids"
        ]
        return ids

    def piece(self, token: int) -> bytes:
        """The bytes of `token`, which may be part of a character; b"" for control tokens and unused ids."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._piece(token)
        return found

    def _piece(self, token: int) -> bytes:
        if token in self._control:
            return b""
        if token in self._added:  # stands for its own text, whatever the vocabulary's encoding
            return str(self._added[token].content).encode()
        text: str | None = self.hf.convert_ids_to_tokens(int(token)) if token < len(self.hf) else None
        if text is None:
            return b""
        if self._bytes is not None and all(character in self._bytes for character in text):
            return bytes(self._bytes[character] for character in text)
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, control tokens left out."""
        return str(self.hf.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def chat(self, messages: Sequence[dict[str, str]], generate: bool = True) -> str:
        """`messages` in the model's template, without the <bos> that `start_ids` gives; plain "role: text" lines when
        the tokenizer has none. A template that refuses a system message gets it in front of the first user's.
        Raises ModelError when the template refuses the messages.
        """
        if not self.hf.chat_template:
            lines = [f"{message['role']}: {message['content']}\n" for message in messages]
            return "".join(lines) + ("assistant:" if generate else "")
        try:
            text = self._apply(messages, generate)
        except jinja2.TemplateError as error:
            if len(messages) < 2 or messages[0]["role"] != "system":
                raise ModelError(f"The model's chat template refuses these messages: {error}.") from None
            system, user, *rest = messages
            merged = {"role": user["role"], "content": f"{system['content']}\n\n{user['content']}"}
            return self.chat([merged, *rest], generate)
        return text.removeprefix(self.hf.bos_token) if self.start_ids() else text

    def _apply(self, messages: Sequence[dict[str, str]], generate: bool) -> str:
        text: str = self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
        return text

    def start_ids(self) -> list[int]:
        """[bos] when the tokenizer puts it before a text by default."""
        bos = self.hf.bos_token_id
        return [bos] if bos is not None and self.hf("a")["input_ids"][:1] == [bos] else []

    def anchor_id(self) -> int:
        """`<AC>` when the vocabulary has it. Else a stand-in that text never contains: a control token whose name says
        that it is reserved or belongs to code repositories, else padding or unknown, else the end of the text."""
        names = {token.content: i for i, token in self._added.items()}
        if AC in names:
            return names[AC]
        used = self.eos_ids | {self.hf.bos_token_id, self.hf.pad_token_id, self.hf.unk_token_id}
        found = stand_in({name: i for name, i in names.items() if i in self._control}, used)
        if found is not None:
            return found
        for last in (self.hf.pad_token_id, self.hf.unk_token_id, self.hf.eos_token_id):
            if last is not None:
                return int(last)
        raise ModelError("The tokenizer has no <AC> token and none to stand in for it: use EP or SEL anchors.")


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the vocabulary spells bytes as GPT-2 does: the fast tokenizer's decoder says so."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    description = json.loads(backend.to_str())
    decoder, before = description.get("decoder") or {}, description.get("pre_tokenizer") or {}
    return '"ByteLevel"' in json.dumps(decoder if decoder else before)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling: printable Latin-1 characters are themselves, the other bytes U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(256 + n): byte for n, byte in enumerate(others)}
