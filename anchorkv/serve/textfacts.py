"""What rules may ask of a request's text: its length and its features (poc/features.py)."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Any

from anchorkv.engines.base import Tokenizer
from anchorkv.poc.features import SHARES, features
from anchorkv.serve.documents import Documents
from anchorkv.serve.requests import Ask

_KEPT = 256


class TextFacts:
    """Computed once for each text: a document is asked often, and counting over it takes a while. Thread-safe."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer) -> None:
        self._documents, self._tokenizer = documents, tokenizer
        self._known: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, ask: Ask, counts: bool = True) -> dict[str, Any]:
        """`tokens` and, with `counts`, `features.X` of the document, else of the prompt.

        Raises NotFound, SavedStateError.
        """
        if ask.document is not None and not counts:
            return {"tokens": self._documents.get(ask.tenant, ask.document).tokens}
        if not counts:
            return {"tokens": len(self._tokenizer.encode(self._prompt(ask)))}
        if ask.document is not None:
            key = f"{ask.tenant}\0{ask.document}"
            return self._remembered(key, lambda: self._documents.text(ask.tenant, str(ask.document)))
        text = self._prompt(ask)
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self._remembered(key, lambda: text)

    def _prompt(self, ask: Ask) -> str:
        if ask.messages:
            return "\n\n".join(message.content for message in ask.messages)
        return ask.text if ask.text is not None else self._tokenizer.decode(ask.tokens or ())

    def _remembered(self, key: str, text: Any) -> dict[str, Any]:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        found = features(text(), self._tokenizer)
        facts: dict[str, Any] = {f"features.{name}": getattr(found, name) for name in SHARES}
        facts["tokens"] = found.tokens
        with self._lock:
            self._known[key] = facts
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return facts
