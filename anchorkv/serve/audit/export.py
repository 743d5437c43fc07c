"""Records as a file for other programs: CSV, JSON lines, Parquet. A file appears whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any

from anchorkv.optional import library
from anchorkv.serve.audit.chain import Entry
from anchorkv.serve.audit.errors import AuditError
from anchorkv.serve.audit.record import canonical, moment

TEXTS = (
    "id", "tenant", "kind", "key", "model", "model_fingerprint", "adapter", "adapter_fingerprint", "policy",
    "request_hash", "answer_hash", "answer",
)
FIGURES = (
    "prompt_tokens", "cached_tokens", "completion_tokens", "kept_cells", "peak_cells", "full_cells", "kv_bytes",
    "queue_seconds", "prefill_seconds", "first_token_seconds", "decode_seconds", "answer_logprob",
)
"""Figures that get a column each; the column `figures` has all of them."""
NESTED = ("policy_config", "request", "answer_tokens", "segments", "recalled", "fallback", "figures", "details")
"""JSON text in one column."""
CHAIN = ("content_hash", "previous", "hash")
COLUMNS = ("sequence", "time", *TEXTS, "fallback_steps", "retired", *FIGURES, *NESTED, *CHAIN)
_BATCH = 500
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def flat(entry: Entry) -> dict[str, Any]:
    """One value a column, in the order of COLUMNS; None for what the record does not say."""
    found = entry.as_dict()
    figures = found.get("figures") or {}
    row = {
        **found, "time": moment(entry.time), **{name: _number(figures.get(name)) for name in FIGURES},
        **{name: canonical(found[name]) if found.get(name) else None for name in NESTED},
    }
    return {name: row.get(name) for name in COLUMNS}


def export(entries: Iterable[Entry], path: str | Path, form: str | None = None) -> int:
    """Write `entries` and return how many. form: csv, jsonl or parquet; None: as the path ends. "-" is standard output.

    Raises AuditError for another form, or a file that cannot be written.
    """
    form = form or Path(path).suffix.lstrip(".").lower()
    if form not in FORMS:
        raise AuditError(f"Records are exported as {', '.join(FORMS)}, not as '{form}'; name one with --format.")
    write = FORMS[form]
    if str(path) == "-":
        count = write(entries, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return count
    target = Path(path).expanduser()
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with open(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
            count = write(entries, file)
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise AuditError(f"{target} cannot be written ({error.strerror}); choose another place.") from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return count


def _csv(entries: Iterable[Entry], file: IO[bytes]) -> int:
    """With a byte order mark, by which spreadsheets know UTF-8. A text that a spreadsheet would run as a formula gets
    an apostrophe in front; the other forms have it as it is."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="backslashreplace", newline="")
    writer, count = csv.writer(text), 0
    writer.writerow(COLUMNS)
    for count, entry in enumerate(entries, start=1):  # noqa: B007
        writer.writerow([_cell(value) for value in flat(entry).values()])
    text.flush()
    text.detach()
    return count


def _cell(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds")
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _jsonl(entries: Iterable[Entry], file: IO[bytes]) -> int:
    """Everything as it is stored, `content` too, so that the chain can be checked from the file alone."""
    count = 0
    for count, entry in enumerate(entries, start=1):  # noqa: B007
        file.write((canonical({**entry.as_dict(), "content": entry.content}) + "\n").encode())
    return count


def _parquet(entries: Iterable[Entry], file: IO[bytes]) -> int:
    arrow, parquet = library("pyarrow", "Parquet"), library("pyarrow.parquet", "Parquet")
    kinds = {
        "sequence": arrow.int64(), "time": arrow.timestamp("us", tz="UTC"), "fallback_steps": arrow.int32(),
        "retired": arrow.bool_(), **dict.fromkeys(FIGURES, arrow.float64()),
    }
    schema = arrow.schema([(name, kinds.get(name, arrow.string())) for name in COLUMNS])
    count, rest = 0, iter(entries)
    with parquet.ParquetWriter(file, schema) as writer:
        while batch := [flat(entry) for entry in islice(rest, _BATCH)]:
            writer.write_table(arrow.Table.from_pylist([_sound(row) for row in batch], schema=schema))
            count += len(batch)
    return count


def _sound(row: dict[str, Any]) -> dict[str, Any]:
    """Without halves of surrogate pairs, which UTF-8 cannot hold."""
    return {
        name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for name, value in row.items()
    }


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


FORMS: dict[str, Callable[[Iterable[Entry], IO[bytes]], int]] = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}
