"""Documents that were read go to disk on a thread of its own, beside the engine's work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor

from anchorkv.errors import AnchorKVError
from anchorkv.serve.documents import Documents, Snapshot
from anchorkv.serve.prefixes import Prefixes
from anchorkv.serve.requests import DocumentFacts
from anchorkv.serve.slots import Upload

log = logging.getLogger("anchorkv.serve")


class Keeping:
    """Called on the engine thread."""

    def __init__(
        self, documents: Documents, files: Executor, prefixes: Prefixes, later: Callable[[Callable[[], None]], None]
    ) -> None:
        """later: has something done on the engine thread."""
        self._documents, self._files, self._prefixes, self._later = documents, files, prefixes, later

    def keep(self, upload: Upload, facts: DocumentFacts, snapshot: Snapshot) -> None:
        """Write a document that was uploaded, and tell whoever waits for it."""
        self._files.submit(self._keep, upload, facts, snapshot)

    def mend(self, facts: DocumentFacts, snapshot: Snapshot) -> None:
        """Write a document again whose file was lost."""
        self._files.submit(self._mend, facts, snapshot)

    def _keep(self, upload: Upload, facts: DocumentFacts, snapshot: Snapshot) -> None:
        try:
            done = self._documents.add(facts, upload.text, snapshot)
        except Exception as error:  # whatever it was, somebody waits
            if not isinstance(error, AnchorKVError):
                log.exception("document %s could not be kept", facts.id)
            self._later(lambda: self._prefixes.remove_document(facts.id))
            if upload.done.set_running_or_notify_cancel():
                upload.done.set_exception(error)
            return
        if upload.done.set_running_or_notify_cancel():
            upload.done.set_result(done)
        else:
            self._documents.delete(done.tenant, done.id)

    def _mend(self, facts: DocumentFacts, snapshot: Snapshot) -> None:
        try:
            self._documents.mend(facts, snapshot)
        except AnchorKVError as error:
            log.error("document %s stays in memory only: %s", facts.id, error)
        except Exception:  # nobody waits for it
            log.exception("document %s stays in memory only", facts.id)
