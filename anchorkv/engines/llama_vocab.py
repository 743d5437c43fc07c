"""A GGUF's own tokenizer and chat template, through llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.sandbox
import llama_cpp

from anchorkv.errors import ModelError

_PREFERRED_ANCHORS = ("<AC>", "<|reserved", "<unused", "<reserved", "<extra_id", "<filename>", "<repo_name>", "<gh_stars>")


class LlamaTokenizer:
    """Implements `engines.base.Tokenizer` over a loaded llama.cpp model."""

    def __init__(self, model: Any, template: str | None) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        if self.size <= 0:
            raise ModelError("The GGUF file holds no tokenizer; use one that does.")
        self.eos_ids = frozenset(t for t in range(self.size) if llama_cpp.llama_vocab_is_eog(self._vocab, t))
        self._template = template
        self.piece = lru_cache(maxsize=None)(self._piece)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, nothing added at its ends."""
        data = text.encode("utf-8", errors="replace")
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, room, False, special)
        if count < 0:
            raise ModelError("llama.cpp could not tokenize the text.")
        return list(buffer[:count])

    def _piece(self, token: int) -> bytes:
        if self._is_control(token):
            return b""
        return self._raw(token, special=False)

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
        return _anchor_id(self)

    def control_tokens(self) -> dict[str, int]:
        """Every control token by its text."""
        return {self._special_text(token): token for token in range(self.size) if self._is_control(token)}


@lru_cache(maxsize=8)
def _anchor_id(tokenizer: LlamaTokenizer) -> int:
    exact = tokenizer.encode("<AC>", special=True)
    if len(exact) == 1:
        return exact[0]
    free = {text: token for text, token in tokenizer.control_tokens().items() if token not in tokenizer.eos_ids}
    for wanted in _PREFERRED_ANCHORS:
        for text, token in free.items():
            if text.startswith(wanted):
                return token
    raise ModelError("The model's vocabulary has no unused control token to serve as <AC>; use EP or SEL anchors.")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
