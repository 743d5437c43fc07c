"""A recorded request run again, by the engine room that answered it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from anchorkv.config import AnchorConfig
from anchorkv.errors import AnchorKVError, ConfigError, DocumentError
from anchorkv.models import Model
from anchorkv.serve.audit.record import digest
from anchorkv.serve.audit.replay import Replayed
from anchorkv.serve.requests import Ask, new_id
from anchorkv.serve.scheduler import Scheduler

_TENANT = "audit"


class ServeReplayer:
    """Runs requests, as `serve.recording.request_of` makes them, on a scheduler that has nothing else to do."""

    def __init__(self, model: Model, documents: Sequence[str] = ()) -> None:
        """documents: what may be the text that the request is about; its recorded hash decides."""
        self._model, self._documents = model, documents

    def replay(self, request: Mapping[str, Any], policy: Mapping[str, Any]) -> Replayed:
        """Raises ConfigError for a request that is no `Ask`, DocumentError for a missing or another document."""
        config = AnchorConfig(**policy)
        text = self._text_for(request)
        scheduler = Scheduler(self._model.engine, cells=self._cells(), max_sessions=1, max_waiting=4)
        scheduler.start()
        try:
            document = None
            if text is not None:
                title = str(request.get("document_title") or "")
                document = scheduler.add_document(_TENANT, text, config, title).result().id
            outcome = scheduler.submit(_ask(request, config, document)).result()
        finally:
            scheduler.stop(drain=False)
        if outcome.finish == "error":
            raise AnchorKVError(f"The request could not be run again: {outcome.error}")
        return Replayed(
            model_fingerprint=self._model.engine.info.fingerprint, adapter=self._model.adapter,
            policy_config=outcome.policy.model_dump(mode="json"), text=outcome.text, tokens=outcome.tokens,
            figures=outcome.as_dict(),
        )

    def _cells(self) -> int:
        """Enough for any one request: the engine grows its memory when it must."""
        return max(self._model.engine.info.window, 32768)

    def _text_for(self, request: Mapping[str, Any]) -> str | None:
        if request.get("document") is None:
            return None
        wanted = f"{request.get('document_title') or request['document']}"
        if not self._documents:
            raise DocumentError(f"The request is about the document '{wanted}'; give its file with --document.")
        for text in self._documents:
            if request.get("document_hash") in (None, digest(text)):
                return text
        raise DocumentError(f"The file given with --document is not the document '{wanted}' as it was then.")


def _ask(request: Mapping[str, Any], policy: AnchorConfig, document: str | None) -> Ask:
    unlike = {"id": new_id("ask"), "tenant": _TENANT, "policy": policy, "document": document, "reuse": False}
    try:
        return TypeAdapter(Ask).validate_python({**request, **unlike})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"The recorded request cannot be run here ({where}: {first['msg'].lower()}).") from None
