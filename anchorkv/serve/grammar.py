"""Answers that follow a grammar: JSON schema to GBNF, and llama.cpp's grammar as a mask over logits."""

from __future__ import annotations

import ctypes
import json
import re
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from anchorkv.engines.base import Engine, Floats
from anchorkv.errors import ConfigError

if TYPE_CHECKING:
    from anchorkv.engines.llama import LlamaEngine

MOST_BYTES = 65536
"""A schema or grammar longer than this is refused."""
MOST_REPEATS = 10_000
"""Most that a schema may say of lengths and counts: the grammar is written out."""
MOST_DEPTH = 64
"""Most parentheses in parentheses: llama.cpp reads them on its own stack."""
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_LITERALS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*')


class Grammar(Protocol):
    """Which tokens may come next. It belongs to one answer."""

    def allows(self, token: int) -> bool:
        """Whether `token` may come next."""

    def mask(self, logits: Floats) -> Floats:
        """A copy of `logits` [vocabulary] with -inf where a token may not come next."""

    def accept(self, token: int) -> None:
        """`token` was written."""


def open_grammar(engine: Engine, gbnf: str | None, json_schema: str | None) -> Grammar | None:
    """The grammar of one answer, None where none is asked for.

    Raises ConfigError for one that cannot be used, or an engine that cannot follow grammars.
    """
    if json_schema is not None:
        gbnf = gbnf_of(json_schema)
    if gbnf is None:
        return None
    if len(gbnf.encode()) > 4 * MOST_BYTES:
        raise ConfigError(f"The grammar is longer than {4 * MOST_BYTES} bytes; make it smaller.")
    _check_depth(gbnf)
    from anchorkv.engines.llama import LlamaEngine

    if not isinstance(engine, LlamaEngine):
        raise ConfigError(f"The {engine.name} engine cannot follow a grammar; use a GGUF model.")
    return LlamaGrammar(engine, gbnf)


def gbnf_of(json_schema: str) -> str:
    """A JSON schema as llama.cpp's GBNF. Raises ConfigError where it cannot be expressed; nothing is fetched."""
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    if len(json_schema.encode()) > MOST_BYTES:
        raise ConfigError(f"The JSON schema is longer than {MOST_BYTES} bytes; make it smaller.")
    try:
        schema = json.loads(json_schema)
        if not isinstance(schema, dict):
            raise ConfigError("The JSON schema must be an object.")
        _check(schema)
        if "$ref" in schema:  # the converter does not look for references behind one at the top
            schema["anyOf"] = [{"$ref": schema.pop("$ref")}]
        return str(json_schema_to_gbnf(json.dumps(schema or {"type": "object"})))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"The JSON schema cannot be followed ({reason}); simplify it.") from None


def _check_depth(gbnf: str) -> None:
    depth = 0
    for sign in _LITERALS.sub("", gbnf):
        depth += (sign == "(") - (sign == ")")
        if depth > MOST_DEPTH:
            raise ConfigError(f"The grammar has more than {MOST_DEPTH} parentheses in each other; give them names.")


def _check(node: Any) -> None:
    """Nothing is fetched, and nothing may grow without bound."""
    if isinstance(node, dict):
        for name in _COUNTS:
            if isinstance(node.get(name), int) and node[name] > MOST_REPEATS:
                raise ConfigError(f"{name} in the JSON schema is {node[name]}; the most is {MOST_REPEATS}.")
        reference = node.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise ConfigError(f"The JSON schema refers to {reference!r}; only references within it (#/…) are followed.")
        for part in node.values():
            _check(part)
    elif isinstance(node, list):
        for part in node:
            _check(part)


class LlamaGrammar:
    """Implements `Grammar` by llama.cpp's own grammar sampler."""

    def __init__(self, engine: LlamaEngine, gbnf: str) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._sampler = llama_cpp.llama_sampler_init_grammar(engine.vocab, gbnf.encode(), b"root")
        if not self._sampler:
            raise ConfigError("The grammar is not valid GBNF, or has no rule named root.")

    def allows(self, token: int) -> bool:
        """As the protocol says."""
        return bool(np.isfinite(self._applied(np.asarray([token]), np.zeros(1, dtype=np.float32)))[0])

    def mask(self, logits: Floats) -> Floats:
        """As the protocol says."""
        return self._applied(np.arange(len(logits)), logits)

    def accept(self, token: int) -> None:
        """As the protocol says."""
        self._lib.llama_sampler_accept(self._sampler, token)

    def _applied(self, tokens: Any, logits: Floats) -> Floats:
        kind = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        candidates = np.zeros(len(tokens), dtype=kind)
        candidates["id"], candidates["logit"] = tokens, logits
        pointer = candidates.ctypes.data_as(ctypes.POINTER(self._lib.llama_token_data))
        array = self._lib.llama_token_data_array(pointer, len(tokens), -1, False)
        self._lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        masked: Floats = candidates["logit"].copy()
        return masked

    def close(self) -> None:
        if self._sampler:
            self._lib.llama_sampler_free(self._sampler)
            self._sampler = None

    def __del__(self) -> None:
        self.close()
