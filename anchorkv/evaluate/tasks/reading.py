"""Questions about a text that was read once: a passage alone, or hidden among others, beside the full cache.

The text is read as users read it (`Document`, the model's chat template and Document's own question), and every
question is asked of every recall mode on a fork of the same reading, greedily. The first line of the answer is scored.
Chat models answer in sentences, so token F1 with a short gold answer is low on both sides alike; `contains` and the
gold answer's loss, which no wording of the model's blurs, stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from anchorkv.config import RecallMode
from anchorkv.engines.base import Engine
from anchorkv.errors import ConfigError, DataError
from anchorkv.evaluate.asking import around, ask, compared, modes, with_full
from anchorkv.evaluate.metrics import ROUGE, contains, exact_match, f1, rouge, rouge_scorer
from anchorkv.evaluate.passages import SETS, Question, QuestionSet, question_file, question_set
from anchorkv.evaluate.run import Item, Models, Record, Row
from anchorkv.evaluate.ways import Way

SUMMARIES = ("qmsum",)
"""Sets whose answers are summaries: judged by ROUGE, and of texts that are cut where the model's window ends."""
NUMBERS = ("drop",)
"""Sets whose numbers are compared as numbers."""


@dataclass(frozen=True)
class Reading:
    """Questions of DATA/squad and others (see `passages.SETS`), and a user's own. One question an item.

    Raises ConfigError for options that fit nothing.
    """

    name: ClassVar[str] = "reading"

    data: Path | None = None
    """Folder with the files of `passages.SETS`."""
    limit: int = 20
    """Questions of each set, the same ones for every number of passages."""
    seed: int = 0
    """Of which questions, which other passages, and their order."""
    skip_bad_rows: bool = False
    sets: tuple[str, ...] = ("squad", "drop", "coqa")
    """Also jsquad (the built-in model knows little Japanese) and qmsum (long; needs rouge-score)."""
    passages: tuple[int, ...] = (1, 21)
    """In one text: 1 is the question's own passage alone. Meetings of qmsum stand alone whatever this is."""
    recalls: tuple[RecallMode, ...] = ("off", "auto", "on")
    max_tokens: int = 32
    """Of an answer."""
    summary_tokens: int = 128
    """Of an answer that is a summary."""
    files: tuple[Path, ...] = ()
    """The user's own jsonl with context, question, answers; read instead of `sets` where there is no `data`."""

    bad_rows: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    """What was wrong with the rows passed over."""
    _sets: list[QuestionSet] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.passages or not self.recalls or min(self.limit, self.max_tokens, self.summary_tokens) < 1:
            raise ConfigError("Reading needs a number of passages, a recall mode, and limits of at least 1.")
        if min(self.passages) < 1:
            raise ConfigError(f"{min(self.passages)} passages are no text; 1 is the question's own passage alone.")

    @property
    def columns(self) -> tuple[tuple[str, str, str], ...]:
        """Of the table of results."""
        sets = self.sets if self.data is not None else ()
        short = [("F1", "f1", ".3f"), ("exact", "exact_match", ".3f"), ("contains", "contains", ".3f")]
        scores = [] if sets and set(sets) <= set(SUMMARIES) and not self.files else short
        scores += [("ROUGE-L", "rougeL", ".3f")] if set(sets) & set(SUMMARIES) else []
        return (
            ("set", "set", ""), ("passages", "passages", ""), ("policy", "policy", ""), ("recall", "recall", ""),
            *scores, ("of full", "share", ".0%"), ("answer loss", "answer_loss", ".2f"),
            ("full / kept", "reduction", "{:.1f}×"), ("recalled", "recalled_cells", ".0f"),
            ("answer recalled", "answer_recalled", ".0%"),
        )

    # --- what is read ------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """More questions and more passages go on from fewer, so their numbers are not in it."""
        return {
            "questions": {part.name: part.digest for part in self._read()}, "seed": self.seed,
            "recalls": list(self.recalls), "max_tokens": self.max_tokens, "summary_tokens": self.summary_tokens,
        }

    def items(self) -> list[Item]:
        """One question in one text each; the same questions for every number of passages."""
        found = []
        for part in self._read():
            for passages in (1,) if part.name in SUMMARIES else dict.fromkeys(self.passages):
                for question in part.chosen(self.limit, self.seed):
                    fields = {"set": part.name, "passages": passages, "question": question, "part": part}
                    found.append(Item(f"{part.name}/{passages}/{question.id}", fields))
        return found

    def _read(self) -> list[QuestionSet]:
        """Raises DataError when there is nothing to read, ConfigError when it could not be told apart or judged."""
        if self._sets:
            return self._sets
        if self.data is None and not self.files:
            raise DataError(
                f"Reading needs questions: name the folder that holds {SETS['squad']} and its like with --data, or "
                "files in a plan (files: [mine.jsonl])."
            )
        sets = dict.fromkeys(self.sets) if self.data is not None else {}
        found = [question_set(name, cast(Path, self.data), self.skip_bad_rows) for name in sets]
        found += [question_file(path, self.skip_bad_rows) for path in self.files]
        if len({part.name for part in found}) < len(found):
            raise ConfigError("Two of the files have the name of the same set; results could not tell them apart.")
        if any(part.name in SUMMARIES for part in found):
            rouge_scorer()  # its absence should be told before hours of reading
        for part in found:
            if part.name not in SUMMARIES:
                part.hidden(part.questions[0], max(self.passages), self.seed)
        self.bad_rows.extend(bad for part in found for bad in part.bad)
        self._sets.extend(found)
        return self._sets

    # --- measuring ---------------------------------------------------------------------------------------------

    def ways(self, ways: Sequence[Way]) -> list[Way]:
        return with_full(ways)

    def measure(self, models: Models, way: Way, item: Item) -> Record:
        """`answers`: {recall mode: what `ask` gave, and its scores}. `stated`: whether an accepted answer stands in the
        text; only then can it be recalled. `truncated`: the text was cut where the model's window ends."""
        model, question = models.of(way), cast(Question, item.fields["question"])
        kind, passages = str(item.fields["set"]), int(item.fields["passages"])
        most = self.summary_tokens if kind in SUMMARIES else self.max_tokens
        text = whole = cast(QuestionSet, item.fields["part"]).hidden(question, passages, self.seed)
        if kind in SUMMARIES:
            text = _cut(model.engine, whole, question.text, most)
        with model.read_text(text) as document:
            length = around(model.engine.tokenizer, question.text) + len(model.engine.tokenizer.encode(text)) + most
            answers = {
                mode: _scored(kind, ask(document, question.text, question.answers, mode, most), question.answers)
                for mode in modes(way.policy, self.recalls)
            }
        return {
            "set": kind, "passages": passages, "tokens": document.reading.tokens, "answers": answers,
            "stated": contains(text, question.answers), "truncated": text != whole,
            "beyond_window": length > model.engine.info.window,
        }

    # --- results -----------------------------------------------------------------------------------------------

    def rows(self, records: Sequence[Record], ways: Sequence[Way]) -> list[Row]:
        """By set, passages, policy and recall; see `compared`. All ways of a group are judged by the questions that all
        of them could answer. `answer_recalled`: of the questions whose answer stands in the text, how often an
        accepted one stood in what was recalled (a short one may do so by chance)."""
        found = []
        for kind, passages in dict.fromkeys((r["set"], r["passages"]) for r in records if "answers" in r):
            group = [r for r in records if r["item"].startswith(f"{kind}/{passages}/")]
            summaries = kind in SUMMARIES
            for row, mine in compared(
                group, ways, "rougeL" if summaries else "f1", ROUGE[:2] if summaries else ("exact_match", "contains")
            ):
                more = {name: any(r[name] for r in mine) for name in ("truncated", "beyond_window")}
                found.append({"set": kind, "passages": passages, **row, **more})
        return found


def _scored(kind: str, given: Record, accepted: Sequence[str]) -> Record:
    """What `ask` gave, and its scores."""
    if kind in SUMMARIES:
        return {**given, **rouge(given["answer"], accepted[0])}
    first, numbers = given["answer"].partition("\n")[0], kind in NUMBERS
    return {
        **given, "f1": f1(first, accepted, numbers=numbers),
        "exact_match": exact_match(first, accepted, numbers=numbers),
        "contains": float(contains(first, accepted, numbers=numbers)),
    }


def _cut(engine: Engine, text: str, question: str, answer_tokens: int) -> str:
    """As much of the beginning of `text` as the model's window takes with the question and its answer."""
    tokens = engine.tokenizer.encode(text)
    room = engine.info.window - around(engine.tokenizer, question) - answer_tokens
    return text if len(tokens) <= room else engine.tokenizer.decode(tokens[:room]).rstrip("\ufffd")
