"""A few questions that make a plan, each explained. Whatever is left empty stays as it is by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorkv.errors import AnchorKVError
from anchorkv.poc.documents import collect
from anchorkv.poc.plan import THRESHOLDS, Plan

Ask = Callable[[str, str, str], str]
"""(explanation, question, default) -> the answer; the default where nothing was answered."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """One question. name: an option of the plan, one of its parts behind a dot."""

    name: str
    explanation: str
    question: str
    default: str = ""


STEPS = (
    Step(
        "folder", "Your documents: text, Markdown, HTML, PDF or Word. Each sub-folder is judged as a business area of "
        "its own. Nothing leaves this machine. Empty: the samples that come with anchorkv.", "Folder of documents"),
    Step(
        "questions", "Your own questions tell most about your work: a file (.jsonl, .csv, .yaml) with question, answer "
        "and document. Empty: they are made from the numbers, dates and names in each document.", "File of questions"),
    Step(
        "model", "The model that reads them: a hub id, a folder, or a GGUF file. Empty: the small built-in one, which "
        "shows memory and speed well, but knows little.", "Model"),
    Step("lang", "The language of the report: en or ja.", "Language", "en"),
    Step(
        "budget_minutes", "How long it may measure. What does not fit is left out and named. Empty: until all is done.",
        "Minutes"),
    Step(
        "thresholds.memory_reduction", "What an area must reach to be adopted. First memory: how many times fewer "
        "cells than the full cache, at least.", "Memory, times less", f"{THRESHOLDS.memory_reduction:g}"),
    Step(
        "thresholds.quality_share", "Then quality: right answers as a share of the full cache's, at least.",
        "Share of right answers", f"{THRESHOLDS.quality_share:g}"),
    Step(
        "thresholds.speed_ratio", "And speed: tokens a second while writing against the full cache, at least.",
        "Speed, times", f"{THRESHOLDS.speed_ratio:g}"),
    Step(
        "capacity.memory", "The machine that you would run on, for sessions and costs: memory of all its GPUs "
        "together, or of the server.", "Memory", "24GB"),
    Step("capacity.context", "Tokens of one conversation with its documents; a page has about 500.", "Tokens", "8192"),
    Step("capacity.users", "How many conversations are live at the same time.", "Users", "50"),
    Step("capacity.price", "What such a machine costs a month. 0: no costs are shown.", "Price a month", "0"),
    Step("capacity.currency", "The currency of that price, by its three letters.", "Currency", "USD"),
    Step(
        "redact", "The report shows text of the documents, in worst cases and views. Say yes to have lengths and "
        "hashes instead.", "Hide the text (yes or no)", "no"),
)
_NUMBERS = ("budget_minutes", "capacity.context", "capacity.users", "capacity.price")


def ask_for_plan(ask: Ask, say: Say) -> Plan:
    """Every step in turn; an answer that does not fit is explained by `say`, and asked for again."""
    given: dict[str, Any] = {}
    for step in STEPS:
        while True:
            try:
                value = _value(step, ask(step.explanation, step.question, step.default).strip())
                changed = _with(given, step.name, value)
                Plan(**changed)
            except AnchorKVError as error:
                say(str(error))
                continue
            given = changed
            break
    return Plan(**given)


def _value(step: Step, text: str) -> Any:
    """Raises AnchorKVError for a folder or file that cannot be used."""
    if not text:
        return None
    if step.name == "folder":
        collect(Path(text))
    if step.name == "questions" and not Path(text).expanduser().is_file():
        raise AnchorKVError(f"There is no file {text}; check the path, or leave it empty.")
    if step.name == "redact":
        return text.lower() in ("y", "yes", "true", "1", "はい")
    return text.replace(",", "") if step.name in _NUMBERS else text


def _with(given: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """`given` with one more option, if it has a value."""
    if value is None:
        return given
    part, dot, option = name.partition(".")
    if not dot:
        return {**given, name: value}
    return {**given, part: {**given.get(part, {}), option: value}}
