"""A session as one safetensors file: the engine's cells, the ledger, the policy, whose model it is, a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from anchorkv.config import AnchorConfig
from anchorkv.engines.base import Engine
from anchorkv.errors import AnchorKVError, SavedStateError
from anchorkv.session import Session

VERSION = 1
Arrays = dict[str, npt.NDArray[Any]]


def save_session(session: Session, path: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write `session` to `path`, whole or not at all. `extra`: JSON-able fields that `open_session` gives back.

    Raises SavedStateError when the file cannot be written.
    """
    arrays, fields = session.state()
    header = {
        "version": VERSION, "engine": session.engine.name, "model": session.engine.info.name,
        "fingerprint": session.engine.info.fingerprint, "policy": json.loads(session.config.to_json()),
        "session": fields, "extra": extra or {},
    }
    text = json.dumps(header, sort_keys=True)
    metadata = {"anchorkv": text, "sha256": _checksum(text, arrays)}
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        save_file(arrays, partial, metadata)
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise SavedStateError(f"{target} cannot be written: {error}.") from None


def open_session(engine: Engine, path: str | Path) -> tuple[Session, dict[str, Any]]:
    """The session that `save_session` wrote, on `engine`, and its `extra` fields.

    Raises SavedStateError when the file is missing, truncated, altered, of another version, engine or model.
    """
    header, arrays = _read(Path(path))
    if header.get("version") != VERSION:
        raise SavedStateError(
            f"{path} was written in format {header.get('version')}, this program reads {VERSION}; "
            "read the document again."
        )
    if header["fingerprint"] != engine.info.fingerprint or header["engine"] != engine.name:
        raise SavedStateError(
            f"{path} holds cells of {header['model']} ({header['engine']} engine), not of {engine.info.name} "
            f"({engine.name} engine); open it with the model that read it."
        )
    try:
        config = AnchorConfig(**header["policy"])
        return Session.restore(engine, config, arrays, header["session"]), dict(header["extra"])
    except (AnchorKVError, KeyError, TypeError, ValueError, IndexError) as error:
        raise SavedStateError(f"{path} does not fit together ({error}); read the document again.") from None


def _read(path: Path) -> tuple[dict[str, Any], Arrays]:
    if not path.is_file():
        raise SavedStateError(f"There is no saved document at {path}.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise SavedStateError(f"{path} is not a saved document, or it is truncated ({error}).") from None
    text = metadata.get("anchorkv")
    if text is None:
        raise SavedStateError(f"{path} is a safetensors file, but not a document that anchorkv saved.")
    if metadata.get("sha256") != _checksum(text, arrays):
        raise SavedStateError(f"{path} was altered after it was saved (checksum differs); read the document again.")
    header = json.loads(text)
    return header, arrays


def _checksum(text: str, arrays: Arrays) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
