"""Documents of tenants on disk: a text, and the anchors that it left, written whole or not at all.

    folder/<digest of the tenant>/doc-….json                    title, text, policy, figures
    folder/<digest of the tenant>/doc-….<model>.anchors         kept cells (anchorkv.savefile), one for each model

A document is there when its .json is. The anchors can be made again from it: a damaged file is set aside as .damaged
and reported, and the text is read again when it is next asked. The text stays beside the anchors, for they hold its
tokens anyway. Without a folder everything is in memory and ends with the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Engine
from anchorkv.errors import AnchorKVError, SavedStateError
from anchorkv.savefile import Arrays, open_session, save_session
from anchorkv.serve.prompts import Script, document_script
from anchorkv.serve.requests import DocumentFacts, NotFound
from anchorkv.session import Session

log = logging.getLogger("anchorkv.serve")
_NUMBER = re.compile(r"doc-[0-9a-f]{1,64}")
_SCRIPTS = 32
"""Scripts kept ready, so that asking a document again does not tokenise it again."""


@dataclass(frozen=True)
class Snapshot:
    """A session's state as `save_session` takes it, so that writing it to disk need not hold up the engine."""

    engine: Engine
    config: AnchorConfig
    parts: tuple[Arrays, dict[str, Any]]

    @classmethod
    def of(cls, session: Session) -> Snapshot:
        return cls(session.engine, session.config, session.state())

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        return self.parts


class Documents:
    """The catalogue. Thread-safe; only `open` touches the engine and belongs to its thread."""

    def __init__(self, engine: Engine, folder: str | Path | None = None) -> None:
        """Raises SavedStateError when the folder cannot be used."""
        self._engine = engine
        self.folder = None if folder is None else Path(folder)
        self._lock = threading.RLock()
        self._facts: dict[tuple[str, str], DocumentFacts] = {}
        self._texts: dict[tuple[str, str], str] = {}
        """Where there is no folder."""
        self._scripts: OrderedDict[tuple[str, str, str], Script] = OrderedDict()
        name = f"{engine.name}|{engine.info.fingerprint}"
        self._model = hashlib.sha256(name.encode()).hexdigest()[:16]
        if self.folder is not None:
            self._scan(self.folder)

    # --- the catalogue -----------------------------------------------------------------------------------------

    def list(self, tenant: str) -> list[DocumentFacts]:
        """A tenant's documents, oldest first."""
        if self.folder is not None:
            for path in self._place(tenant).glob("doc-*.json"):
                if (tenant, path.stem) not in self._facts:
                    self._look_up(tenant, path.stem)
        with self._lock:
            found = [facts for (who, _), facts in self._facts.items() if who == tenant]
        if self.folder is not None:
            found = [facts for facts in found if self._path(facts).is_file()]
        return sorted(found, key=lambda facts: facts.created)

    def get(self, tenant: str, number: str) -> DocumentFacts:
        """Raises NotFound, for another tenant's document as for none at all."""
        with self._lock:
            found = self._facts.get((tenant, number))
        if self.folder is not None and (found is None or not self._path(found).is_file()):
            found = self._look_up(tenant, number)
        if found is None:
            raise NotFound(f"There is no document {number[:64]!r}; upload it first.")
        return found

    def _look_up(self, tenant: str, number: str) -> DocumentFacts | None:
        """What another process that uses this folder has written, or deleted, since this one looked."""
        found = None
        if _NUMBER.fullmatch(number):
            with contextlib.suppress(AnchorKVError, KeyError, TypeError, ValueError, OSError):
                found = _facts_of(_record(self._place(tenant) / f"{number}.json"))
        with self._lock:
            if found is None or found.tenant != tenant:
                self._facts.pop((tenant, number), None)
                return None
            return self._facts.setdefault((tenant, number), found)

    def text(self, tenant: str, number: str) -> str:
        """Raises NotFound; SavedStateError when the file cannot be read any more."""
        facts = self.get(tenant, number)
        if self.folder is None:
            return self._texts[tenant, number]
        try:
            return str(_record(self._path(facts))["text"])
        except FileNotFoundError:
            raise NotFound(f"There is no document {number!r}; it was deleted.") from None

    def script(self, tenant: str, number: str, policy: AnchorConfig) -> Script:
        """How the document is read under `policy`. Raises NotFound, SavedStateError."""
        key = (tenant, number, policy.model_dump_json())
        with self._lock:
            ready = self._scripts.get(key)
            if ready is not None:
                self._scripts.move_to_end(key)
                return ready
        facts = self.get(tenant, number)
        script = document_script(facts.title, self.text(tenant, number), policy, self._engine.tokenizer)
        with self._lock:
            self._scripts[key] = script
            while len(self._scripts) > _SCRIPTS:
                self._scripts.popitem(last=False)
        return script

    # --- writing -----------------------------------------------------------------------------------------------

    def add(self, facts: DocumentFacts, text: str, snapshot: Snapshot) -> DocumentFacts:
        """Write the anchors, then the record that makes the document exist; both are on disk when this returns.

        Raises SavedStateError, and leaves nothing, when they cannot be written.
        """
        size = 0
        if self.folder is not None:
            self._folder_of(facts.tenant)
            size = self._write_anchors(facts, snapshot)
            record = {**replace(facts, file_bytes=size).as_dict(), "text": text}
            try:
                _write(self._path(facts), _sealed(record))
            except OSError as error:
                self._anchors(facts).unlink(missing_ok=True)
                raise SavedStateError(f"The document cannot be written: {error.strerror or error}.") from None
        facts = replace(facts, file_bytes=size)
        with self._lock:
            self._facts[facts.tenant, facts.id] = facts
            if self.folder is None:
                self._texts[facts.tenant, facts.id] = text
        return facts

    def _write_anchors(self, facts: DocumentFacts, snapshot: Snapshot) -> int:
        """Bytes written. Raises SavedStateError."""
        target = self._anchors(facts)
        partial = target.with_suffix(".writing")
        try:
            save_session(cast(Session, snapshot), partial, {"kind": "document", "title": facts.title})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            size = partial.stat().st_size
            os.replace(partial, target)
            _sync_folder(target.parent)
        except SavedStateError as error:  # it names the file, which is no caller's business
            raise SavedStateError(str(error).replace(str(partial), "The document")) from None
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise SavedStateError(f"The document cannot be written: {error.strerror or error}.") from None
        return size

    def delete(self, tenant: str, number: str) -> None:
        """Raises NotFound; SavedStateError when its files cannot be removed."""
        facts = self.get(tenant, number)
        with self._lock:
            if self.folder is not None:
                try:
                    path = self._path(facts)
                    path.unlink(missing_ok=True)
                    _sync_folder(path.parent)
                    for rest in path.parent.glob(f"{facts.id}.*"):
                        rest.unlink(missing_ok=True)
                except OSError as error:
                    raise SavedStateError(f"The document cannot be deleted: {error.strerror or error}.") from None
            self._facts.pop((tenant, number), None)
            self._texts.pop((tenant, number), None)
            for key in [key for key in self._scripts if key[:2] == (tenant, number)]:
                del self._scripts[key]

    def lacks(self, facts: DocumentFacts) -> bool:
        """Whether there ought to be a file of its anchors for this model, and is none."""
        return self.folder is not None and not self._anchors(facts).is_file()

    # --- opening -----------------------------------------------------------------------------------------------

    def open(self, facts: DocumentFacts, engine: Engine) -> Session | None:
        """The session that stands at its end, from disk; None where there is no usable file for this model.

        A damaged file is set aside and reported. Raises CapacityError when the engine has no room for it.
        """
        if self.folder is None or not self._anchors(facts).is_file():
            return None
        try:
            return open_session(engine, self._anchors(facts))[0]
        except SavedStateError as error:
            self.set_aside(facts, str(error))
            return None

    def set_aside(self, facts: DocumentFacts, reason: str) -> None:
        """Report a damaged file and move it out of the way; the text is read again when it is next asked."""
        path = self._anchors(facts)
        log.error("document %s is damaged and will be read again: %s", facts.id, reason)
        with contextlib.suppress(OSError):
            os.replace(path, path.with_suffix(".damaged"))
        self._note(facts, damage=reason)

    def mend(self, facts: DocumentFacts, snapshot: Snapshot) -> None:
        """Write anchors that were lost once more. Raises SavedStateError."""
        self._note(facts, file_bytes=self._write_anchors(facts, snapshot))

    def _note(self, facts: DocumentFacts, **changes: Any) -> None:
        with self._lock:
            known = self._facts.get((facts.tenant, facts.id))
            if known is not None:
                self._facts[facts.tenant, facts.id] = replace(known, **changes)

    # --- files -------------------------------------------------------------------------------------------------

    def _scan(self, folder: Path) -> None:
        """Read the catalogue; remove what a killed process left half written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in [*folder.glob("*/*.writing"), *folder.glob("*/*.partial")]:
                path.unlink(missing_ok=True)
            records = sorted(folder.glob("*/doc-*.json"))
        except OSError as error:
            raise SavedStateError(f"The folder for documents cannot be used: {error.strerror or error}.") from None
        for path in records:
            try:
                facts = _facts_of(_record(path))
            except (AnchorKVError, KeyError, TypeError, ValueError, OSError) as error:
                log.error("the document %s is damaged and was set aside: %s", path.stem, error)
                with contextlib.suppress(OSError):
                    os.replace(path, path.with_suffix(".json.damaged"))
                continue
            self._facts[facts.tenant, facts.id] = facts
        for path in folder.glob("*/doc-*.anchors"):
            # Anchors without a record belong to an upload that was never acknowledged.
            record = path.with_name(path.name.split(".")[0] + ".json")
            if not record.is_file() and not record.with_suffix(".json.damaged").is_file():
                path.unlink(missing_ok=True)

    def _place(self, tenant: str) -> Path:
        return cast(Path, self.folder) / hashlib.sha256(tenant.encode()).hexdigest()[:32]

    def _folder_of(self, tenant: str) -> Path:
        folder = self._place(tenant)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SavedStateError(f"The document cannot be written: {error.strerror or error}.") from None
        return folder

    def _path(self, facts: DocumentFacts) -> Path:
        return self._place(facts.tenant) / f"{facts.id}.json"

    def _anchors(self, facts: DocumentFacts) -> Path:
        return self._place(facts.tenant) / f"{facts.id}.{self._model}.anchors"


def _facts_of(record: dict[str, Any]) -> DocumentFacts:
    fields = {name: record[name] for name in DocumentFacts.__dataclass_fields__ if name in record}
    return DocumentFacts(**{**fields, "policy": AnchorConfig(**record["policy"]), "resident": False})


def _sealed(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "document": text}).encode()


def _record(path: Path) -> dict[str, Any]:
    """Raises SavedStateError when the file is truncated or was altered, FileNotFoundError when there is none."""
    try:
        outer = json.loads(path.read_bytes())
        text = outer["document"]
        intact = outer["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SavedStateError(f"The record {path.name} is truncated; upload the document again.") from None
    if not intact:
        raise SavedStateError(f"The record {path.name} was altered after it was saved; upload the document again.")
    record: dict[str, Any] = json.loads(text)
    return record


def _write(path: Path, data: bytes) -> None:
    """The whole file or none of it, on disk when this returns."""
    partial = path.with_suffix(".writing")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
