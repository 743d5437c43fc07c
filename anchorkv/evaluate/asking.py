"""What tasks that ask questions have in common: asking on a fork, and setting what came of it beside the full cache."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from anchorkv.config import AnchorConfig, RecallMode, preset
from anchorkv.document import QUESTION, Document
from anchorkv.engines.base import Floats, Ints, Tokenizer
from anchorkv.evaluate.losses import answer_losses
from anchorkv.evaluate.metrics import contains
from anchorkv.evaluate.run import Record, Row, good
from anchorkv.evaluate.statistics import Estimate, bootstrap, difference, mean, verdict
from anchorkv.evaluate.ways import FULL, Way
from anchorkv.prompt import Prompt
from anchorkv.recall import RecallPlan

_COSTS = ("answer_loss", "reduction", "kept_cells", "kv_bytes", "recalled_cells", "seconds")


def modes(policy: AnchorConfig, wanted: Sequence[RecallMode]) -> list[RecallMode]:
    """The recall modes to try: where nothing is ever dropped, or recall has no cells, there is nothing to recall."""
    idle = policy == preset(FULL) or policy.recall_cells == 0
    return ["off"] if idle else list(dict.fromkeys(wanted))


def asking(prompt: Prompt, tokenizer: Tokenizer, question: str) -> list[int]:
    """What `Document` reads to have `question` answered."""
    return tokenizer.encode(QUESTION.format(question=question.strip()) + prompt.asking, special=True)


def around(tokenizer: Tokenizer, question: str) -> int:
    """Tokens that `Document` reads besides the text."""
    prompt = Prompt.of(tokenizer)
    opening = tokenizer.start_ids() + tokenizer.encode(prompt.opening, special=True)
    return len(opening) + len(asking(prompt, tokenizer, question))


def ask(
    document: Document, question: str, accepted: Sequence[str], mode: RecallMode, max_tokens: int, lead: str = ""
) -> Record:
    """One question on a fork of `document` with recall `mode`: the greedy answer, and what it cost.

    lead: what an answer says before the gold one; it is read, and its loss is not counted.
    Cells and bytes are those held when the answer ends, recalled ones counted. `answer_loss`: mean -log p a token of
    accepted[0], in nats. `answer_recalled`: whether an accepted answer stands in what was recalled for the question.
    """
    with document.fork() as fork:
        fork.session.config = fork.session.config.replace(recall=mode)
        started = time.perf_counter()
        answer = fork.ask(question, max_tokens=max_tokens)
        seconds = time.perf_counter() - started
        losses, recalled = gold_losses(fork, question, accepted[0], lead)
    cells = answer.accounting
    return {
        "answer": answer.text, "answer_tokens": answer.tokens, "answer_loss": float(losses.mean()),
        "recalled_cells": answer.recalled_cells, "answer_recalled": contains(recalled, accepted),
        "kept_cells": cells.kept_cells, "full_cells": cells.full_cells, "kv_bytes": cells.kept_bytes,
        "reduction": cells.reduction, "seconds": round(seconds, 3),
    }


def gold_losses(document: Document, question: str, answer: str, lead: str = "") -> tuple[Floats, str]:
    """-log p of each token of `answer` where the one to `question` begins, after `lead`, and what was recalled for it.

    On a fork of the document's session; recall is as its policy says.
    """
    tokenizer = document.session.engine.tokenizer
    with document.session.fork() as session:
        plan = RecallPlan(session, document.ranker)
        plan.update(question)
        recalled = "".join(plan.text_of(segment) for segment in sorted(session.recalled))
        session.read([*asking(document.prompt, tokenizer, question), *tokenizer.encode(lead)])
        return answer_losses(session, tokenizer.encode(answer)), recalled


def with_full(ways: Sequence[Way]) -> list[Way]:
    """`ways`, and the full caches of their weights where those are missing."""
    names = {way.name for way in ways}
    missing = {way.full: Way(way.full, preset(FULL), way.adapter) for way in ways}
    return [*ways, *(way for name, way in missing.items() if name not in names)]


def compared(
    records: Sequence[Record], ways: Sequence[Way], score: str, more: Sequence[str] = ()
) -> list[tuple[Row, list[Record]]]:
    """A row a way and recall mode, with the records behind it, of the items that all ways could answer.

    score: the field of an answer that is compared, more is better. `full_…`: the full cache's, of the same weights;
    `difference`: from it, paired, with its `verdict`; `share`: the mean as a share of it; `failed`: measurements.
    """
    by_way = {way.name: found for way in with_full(ways) if (found := good(records, way))}
    items = sorted(set.intersection(*map(set, by_way.values()))) if by_way else []
    rows = []
    for way in ways if items else ():
        mine, full = ([by_way[name][item] for item in items if name in by_way] for name in (way.name, way.full))
        for mode in mine[0]["answers"] if mine else ():
            answers = [record["answers"][mode] for record in mine]
            row: Row = {"policy": way.name, "recall": mode, "n": len(answers)}
            for name in (score, *more, *_COSTS):
                row |= _figure(name, mean([answer[name] for answer in answers]))
            stated = [a["answer_recalled"] for a, record in zip(answers, mine, strict=True) if record["stated"]]
            row |= _figure("answer_recalled", mean(stated if mode != "off" else []))
            if full:
                theirs = [record["answers"]["off"] for record in full]
                row |= _against(score, [answer[score] for answer in answers], [answer[score] for answer in theirs])
            row["failed"] = sum(record["way"] == way.name and "error" in record for record in records)
            rows.append((row, mine))
    return rows


def _against(score: str, mine: Sequence[float], full: Sequence[float]) -> Row:
    ours, theirs = np.asarray(mine, dtype=np.float64), np.asarray(full, dtype=np.float64)

    def share(drawn: Ints) -> float:
        return float(ours[drawn].sum() / theirs[drawn].sum()) if theirs[drawn].any() else math.nan

    whole = share(np.arange(len(mine)))
    error = bootstrap(share, len(mine)) if math.isfinite(whole) else math.nan
    gain = difference(mine, full)
    return {
        **_figure(f"full_{score}", mean(full)), **_figure("difference", gain), "verdict": verdict(gain),
        "share": whole, "share_stderr": error,
    }


def _figure(name: str, estimate: Estimate) -> Row:
    return {name: estimate.value, f"{name}_stderr": estimate.stderr}
