"""Which dropped segments would an answer need? Rankers order them; `RecallPlan` spends the budget of cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import bm25s
import numpy as np
import numpy.typing as npt

from anchorkv.config import RecallMode
from anchorkv.ledger import State
from anchorkv.session import Session

_WORD = re.compile(r"[^\W\u3040-\u30ff\u4e00-\u9fff]+|[\u3040-\u30ff\u4e00-\u9fff]+")
_CJK = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
_STOP_WORDS = frozenset(
    (
        "a an and are as at be been by did do does for from had has have he her his how i in is it its many much of "
        "on or s she that the their there they this to was we were what when where which who whom whose why will "
        "with you your according document say says text about tell me"
    ).split()
)


def terms(text: str) -> list[str]:
    """Words for ranking: lower case, a light English plural stem, no stop words; Japanese as character pairs."""
    found: list[str] = []
    for word in _WORD.findall(text.lower()):
        if _CJK.match(word):
            found.extend(word[i : i + 2] for i in range(max(1, len(word) - 1)))
        elif word not in _STOP_WORDS:
            found.append(word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word)
    return found


class Ranker(Protocol):
    """Scores passages for a query; 0 means that nothing speaks for a passage."""

    def scores(self, passages: Sequence[str], query: str) -> npt.NDArray[np.float32]:
        """[len(passages)], higher is better."""

    def ceiling(self, passages: Sequence[str], query: str) -> float:
        """The score of a passage that answers the query in every word: what `auto` measures against."""


class BM25:
    """Okapi BM25 (Robertson et al. 1994) by the library bm25s."""

    def scores(self, passages: Sequence[str], query: str) -> npt.NDArray[np.float32]:
        asked = terms(query)
        corpus = [terms(passage) for passage in passages]
        if not asked or not any(corpus):
            return np.zeros(len(passages), dtype=np.float32)
        index = bm25s.BM25()
        index.index(corpus, show_progress=False)
        return np.asarray(index.get_scores(asked), dtype=np.float32)

    def ceiling(self, passages: Sequence[str], query: str) -> float:
        asked = set(terms(query))
        corpus = [set(terms(passage)) for passage in passages]
        found = [sum(term in words for words in corpus) for term in asked]
        total = len(passages)
        # bm25s' default idf (Lucene's); a term seen once in a passage of average length scores close to it.
        return float(sum(np.log(1 + (total - n + 0.5) / (n + 0.5)) for n in found))


class RecallPlan:
    """Keeps a session's recalled segments the best ones for what is being asked, within its budget of cells."""

    AUTO_SHARE = 0.1
    """`auto` recalls when the best segment reaches this share of the ranker's ceiling
    (benchmarks/recall_threshold.py: a needless recall costs some cells, a missed one the answer)."""

    def __init__(self, session: Session, ranker: Ranker | None = None) -> None:
        self.session = session
        self.ranker = ranker or BM25()
        self.brought: list[int] = []
        """Every segment brought back so far, in order."""

    def update(self, query: str) -> list[int]:
        """Recall for `query` what the budget allows, best first, releasing what ranks lower. Returns the new ones."""
        session = self.session
        found = self.worth(query, session.config.recall)
        if found is None:
            return []
        candidates, scores = found
        chosen = self._affordable(candidates, _with_neighbours(candidates, scores))
        for segment in session.recalled:
            if segment not in chosen:
                session.release(segment, "another segment answers better")
        new = sorted(chosen - set(session.recalled))
        for segment in new:
            session.recall(segment, "recalled for the question")
        self.brought.extend(new)
        return new

    def worth(self, query: str, mode: RecallMode) -> tuple[list[int], npt.NDArray[np.float32]] | None:
        """The segments that could be brought back and their scores for `query`; None where recall `mode` would leave
        it: nothing was dropped, nothing speaks for a segment, or too little for `auto`."""
        session = self.session
        if mode == "off" or session.config.recall_cells == 0:
            return None
        candidates = sorted({*session.ledger.dropped_segments(), *session.recalled})
        if not candidates:
            return None
        passages = [self.text_of(segment) for segment in candidates]
        scores = self.ranker.scores(passages, query)
        ceiling = self.ranker.ceiling(passages, query) if mode == "auto" else 0.0
        return (candidates, scores) if scores.any() and scores.max() >= self.AUTO_SHARE * ceiling else None

    def _affordable(self, candidates: Sequence[int], scores: npt.NDArray[np.float32]) -> set[int]:
        left, chosen = self.session.config.recall_cells, set()
        for index in np.argsort(-scores, kind="stable").tolist():
            if scores[index] <= 0:
                break
            cost = self._cost(candidates[index])
            if cost <= left:
                chosen.add(candidates[index])
                left -= cost
        return chosen

    def _cost(self, segment: int) -> int:
        state = self.session.ledger.column("state")[self.session.ledger.span(segment)]
        return int(((state == State.DROPPED) | (state == State.RECALLED)).sum())

    def text_of(self, segment: int) -> str:
        """What `segment` says."""
        ledger = self.session.ledger
        span = ledger.span(segment)
        span = span[~ledger.column("added")[span]]
        return self.session.engine.tokenizer.decode(ledger.tokens[span].tolist())


def _with_neighbours(candidates: Sequence[int], scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A segment beside a good one is likelier to matter: an answer often stands in the next sentence."""
    numbers = np.asarray(candidates)
    out = scores.copy()
    adjacent = np.flatnonzero(np.diff(numbers) == 1)
    np.maximum.at(out, adjacent + 1, 0.6 * scores[adjacent])
    np.maximum.at(out, adjacent, 0.3 * scores[adjacent + 1])
    return out
