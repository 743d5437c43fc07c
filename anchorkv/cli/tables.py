"""The tables of figures: what reading and answering cost, alone or beside the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from anchorkv.cli.screen import count, middle, seconds, size, speed, times
from anchorkv.document import Answer, Document
from anchorkv.ledger import Accounting


def figures(document: Document, answers: Sequence[Answer]) -> Table:
    """Kept against full, speeds, recall. Full figures are what the same text takes with nothing dropped."""
    cells = document.accounting()
    top = _peak(document, answers)
    table = _table("", "kept", "full cache", "reduction")
    for name, kept, full, show in (
        ("Cells now", cells.kept_cells, cells.full_cells, count),
        ("Cells at the peak", top.peak_cells, cells.full_cells, count),
        ("Memory now", cells.kept_bytes, cells.full_bytes, size),
        ("Memory at the peak", top.peak_bytes, cells.full_bytes, size),
    ):
        table.add_row(name, show(kept), show(full), _ratio(full, kept))
    table.add_section()
    table.add_row("Prefill, tokens", _reading(document), "", "")
    if answers:
        table.add_row("Decode, tokens", _writing(answers), "", "")
        table.add_row("Time to first token", _first(answers), "", "")
        recalled = sum(len(answer.recalled) for answer in answers)
        table.add_row("Segments recalled", count(recalled), "", "")
    return table


def comparison(
    document: Document, answers: Sequence[Answer], full: Document, full_answers: Sequence[Answer]
) -> Table:
    """The same figures for anchors and for the full cache, both measured; a gain above 1 is for anchors."""
    table = _table("", "anchors", "full cache", "gain")
    kept, whole = document.accounting(), full.accounting()
    top, whole_top = _peak(document, answers), _peak(full, full_answers)
    for name, ours, theirs, show in (
        ("Cells kept", kept.kept_cells, whole.kept_cells, count),
        ("Cells at the peak", top.peak_cells, whole_top.peak_cells, count),
        ("Memory kept", kept.kept_bytes, whole.kept_bytes, size),
        ("Memory at the peak", top.peak_bytes, whole_top.peak_bytes, size),
    ):
        table.add_row(name, show(ours), show(theirs), _ratio(theirs, ours))
    table.add_section()
    a, b = document.reading.tokens_per_second, full.reading.tokens_per_second
    table.add_row("Prefill, tokens", _reading(document), _reading(full), _ratio(a, b))
    if answers and full_answers:
        a, b = (middle([x.tokens_per_second for x in side]) for side in (answers, full_answers))
        table.add_row("Decode, tokens", _writing(answers), _writing(full_answers), _ratio(a, b))
        a, b = (middle([x.first_token_seconds for x in side]) for side in (answers, full_answers))
        table.add_row("Time to first token", _first(answers), _first(full_answers), _ratio(b, a))
        table.add_row("Segments recalled", count(sum(len(answer.recalled) for answer in answers)), "–", "")
    return table


def answer_line(answer: Answer) -> str:
    """One line under an answer."""
    cells = answer.accounting
    parts = [
        f"first token {seconds(answer.first_token_seconds)}", f"{speed(answer.tokens_per_second)}"
        if answer.tokens_per_second else "", f"{count(cells.kept_cells)} of {count(cells.full_cells)} cells",
        f"recalled segments {', '.join(map(str, answer.recalled))}" if answer.recalled else "",
    ]
    return " · ".join(part for part in parts if part)


def accounting_dict(document: Document) -> dict[str, Any]:
    """For --json."""
    reading = document.reading
    return {
        "reading": {
            "tokens": reading.tokens, "seconds": round(reading.seconds, 3),
            "tokens_per_second": round(reading.tokens_per_second, 2),
        },
        "accounting": document.accounting().as_dict(),
    }


def _peak(document: Document, answers: Sequence[Answer]) -> Accounting:
    """The accounting with the highest peak: answers hold recalled cells beside the document's."""
    return max(
        (document.accounting(), *(answer.accounting for answer in answers)), key=lambda cells: cells.peak_cells
    )


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right", style="dim" if not heading else "")
    return table


def _ratio(numerator: float, denominator: float) -> str:
    return times(numerator / denominator) if numerator and denominator else "–"


def _reading(document: Document) -> str:
    return speed(document.reading.tokens_per_second) if document.reading.seconds else "–"


def _writing(answers: Sequence[Answer]) -> str:
    value = middle([answer.tokens_per_second for answer in answers])
    return speed(value) if value else "–"


def _first(answers: Sequence[Answer]) -> str:
    return seconds(middle([answer.first_token_seconds for answer in answers]))
