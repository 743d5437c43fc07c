"""A GGUF's own tokenizer and chat template, through llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.sandbox
import llama_cpp

from anchorkv.engines.anchor_token import AC, stand_in
from anchorkv.errors import ModelError


class LlamaTokenizer:
    """Implements `engines.base.Tokenizer` over a loaded llama.cpp model."""

    def __init__(self, model: Any, template: str | None) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        if self.size <= 0:
            raise ModelError("The GGUF file holds no tokenizer; use one that does.")
        self.eos_ids = frozenset(t for t in range(self.size) if llama_cpp.llama_vocab_is_eog(self._vocab, t))
        self._template = template
        self._anchor: int | None = None
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, nothing added at its ends."""
        data = text.encode("utf-8", errors="replace")
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, room, False, special)
        if count < 0:
            raise ModelError("llama.cpp could not tokenize the text.")
        return list(buffer[:count])

    def piece(self, token: int) -> bytes:
        """The token's bytes; b"" for control tokens."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = b"" if self._is_control(token) else self._raw(token, special=False)
        return found

    def _raw(self, token: int, special: bool) -> bytes:
        room = 256
        buffer = ctypes.create_string_buffer(room)
        count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, -count, 0, special)
        return buffer.raw[:count]

    def _is_control(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_control(self._vocab, token))

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", errors="replace")

    def chat(self, messages: Sequence[dict[str, str]], generate: bool = True) -> str:
        """`messages` in the model's own template; one without a template gets plain "role: text" lines."""
        if self._template is None:
            lines = [f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages]
            return "".join(lines) + ("Assistant:" if generate else "")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        try:
            return environment.from_string(self._template).render(
                messages=list(messages), add_generation_prompt=generate,
                bos_token="", eos_token=self._special_text(llama_cpp.llama_vocab_eos(self._vocab)),
            )
        except jinja2.TemplateError as error:
            raise ModelError(f"The model's chat template cannot be used: {error}.") from None

    def _special_text(self, token: int) -> str:
        return self._raw(token, special=True).decode("utf-8", errors="replace") if token >= 0 else ""

    def start_ids(self) -> list[int]:
        """[bos] where the GGUF asks for it."""
        if llama_cpp.llama_vocab_get_add_bos(self._vocab):
            return [int(llama_cpp.llama_vocab_bos(self._vocab))]
        return []

    def anchor_id(self) -> int:
        """<AC> where the vocabulary has it, else a control token that never occurs in text."""
        if self._anchor is None:
            self._anchor = self._find_anchor()
        return self._anchor

    def _find_anchor(self) -> int:
        exact = self.encode(AC, special=True)
        if len(exact) == 1:
            return exact[0]
        named = (llama_cpp.llama_vocab_bos, llama_cpp.llama_vocab_pad)
        found = stand_in(self.control_tokens(), self.eos_ids | {int(of(self._vocab)) for of in named})
        if found is None:
            raise ModelError(
                "The model's vocabulary has no unused control token to serve as <AC>; use EP or SEL anchors."
            )
        return found

    def control_tokens(self) -> dict[str, int]:
        """Every control token by its text."""
        return {self._special_text(token): token for token in range(self.size) if self._is_control(token)}


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
