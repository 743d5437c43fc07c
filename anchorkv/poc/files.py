"""What a run leaves in its folder beside its records: the report as data and as a page, the rollout plan, and a file a
document."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from anchorkv.errors import SavedStateError
from anchorkv.evaluate.run import Record, Store
from anchorkv.poc.report.html import write
from anchorkv.poc.results import DocumentResult, PocReport
from anchorkv.poc.rollout import rollout

REPORT, PAGE, ROLLOUT, DOCUMENTS = "report.json", "report.html", "rollout.yaml", "documents"
_NOT_NAME = re.compile(r"[^\w.-]+")


def save(report: PocReport, records: Sequence[Record], folder: Path) -> Path:
    """The page. A document's file has its records too, unless the report is redacted: they hold its text.

    Raises SavedStateError, one sentence, when a file cannot be written; each is whole or as it was before.
    """
    write_text(folder / REPORT, report.to_json())
    rollout(report).save(folder / ROLLOUT)
    for document in report.documents:
        content: dict[str, Any] = {"document": document.model_dump(mode="json")}
        if not report.redacted:
            content["records"] = [record for record in records if record["item"] == document.id]
        write_text(folder / DOCUMENTS / _file(document), json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return write(report, folder / PAGE)


def clear(folder: Path) -> None:
    """Forget an earlier run in `folder`, and nothing else that lies there. Raises SavedStateError when it stays."""
    try:
        Store.clear(folder)
        for path in (folder / REPORT, folder / PAGE, folder / ROLLOUT, *(folder / DOCUMENTS).glob("*.json")):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise SavedStateError(f"{folder} cannot be cleared ({error.strerror}); choose another --out.") from None


def write_text(path: Path, text: str) -> None:
    """Whole, or not at all. Raises SavedStateError."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise SavedStateError(
            f"{path} cannot be written ({error.strerror}); what was measured is kept: free some space and run the same "
            "command again."
        ) from None


def slug(name: str) -> str:
    """`name` as that of a file or folder."""
    return _NOT_NAME.sub("_", name).strip("._")[:60]


def _file(document: DocumentResult) -> str:
    digest = hashlib.sha256(document.id.encode()).hexdigest()[:6]
    return f"{slug(document.id)}-{digest}.json"
