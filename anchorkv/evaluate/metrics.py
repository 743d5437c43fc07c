"""How good is an answer: exact match, token F1, whether it contains the gold one, and ROUGE.

Exact match and F1 are SQuAD's (Rajpurkar et al., arXiv 1606.05250, section 6.1, and its official script); with
`numbers` DROP's (Dua et al., arXiv 1903.00161, section 5, and its official script). Japanese is compared character by
character, as CJK text is in MLQA (Lewis et al., arXiv 1910.07475). All are 0 to 1, the best over the accepted answers.
"""

from __future__ import annotations

import importlib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from anchorkv.errors import ConfigError

ROUGE = ("rouge1", "rouge2", "rougeL")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation + "‘’“”")
"""SQuAD's own removes ASCII's alone; quotation marks as word processors write them are none of the answer either."""
_JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")


def exact_match(answer: str, accepted: Sequence[str], *, numbers: bool = False) -> float:
    """1 when `answer` is an accepted one after normalisation, else 0. numbers: DROP's, where "15" is "15.0"."""
    return _best(answer, accepted, numbers, lambda said, wanted: float(said == wanted))


def f1(answer: str, accepted: Sequence[str], *, numbers: bool = False) -> float:
    """The harmonic mean of the precision and recall of tokens.

    numbers: DROP's, which compares sets of tokens, and gives 0 when the gold answer has numbers and none of them is in
    `answer`. DROP aligns the spans of an answer of several; here such an answer is one text.
    """
    return _best(answer, accepted, numbers, _number_f1 if numbers else _token_f1)


def contains(answer: str, accepted: Sequence[str], *, numbers: bool = False) -> bool:
    """Whether an accepted answer stands in `answer`, token for token: fair to models that answer in sentences, easy on
    those that say a lot."""
    return _best(answer, accepted, numbers, lambda said, wanted: float(bool(wanted) and _stands_in(wanted, said))) > 0


def rouge(answer: str, reference: str) -> dict[str, float]:
    """F-measures of ROUGE-1, -2 and -L (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"), words
    stemmed, by the library rouge-score, which knows no Japanese. Raises ConfigError when it is not installed."""
    scores = rouge_scorer().score(reference, answer)
    return {name: float(scores[name].fmeasure) for name in ROUGE}


@cache
def rouge_scorer() -> Any:
    """The library's scorer. Raises ConfigError when it is not installed."""
    try:
        library = importlib.import_module("rouge_score.rouge_scorer")
    except ImportError:
        raise ConfigError("ROUGE needs rouge-score, which is not installed: pip install 'anchorkv[eval]'.") from None
    return library.RougeScorer(list(ROUGE), use_stemmer=True)


def tokens(text: str, *, numbers: bool = False) -> list[str]:
    """`text` normalised: without case, punctuation and articles. Where it has Japanese in it, its characters."""
    if _JAPANESE.search(text):
        return _characters(text)
    return _number_tokens(text) if numbers else _words(text)


def _best(
    answer: str, accepted: Sequence[str], numbers: bool, score: Callable[[list[str], list[str]], float]
) -> float:
    scores = []
    for gold in accepted:
        # Both sides are cut alike, or "1972" would share nothing with "1972年".
        if _JAPANESE.search(answer + gold):
            scores.append(score(_characters(answer), _characters(gold)))
        else:
            scores.append(score(tokens(answer, numbers=numbers), tokens(gold, numbers=numbers)))
    return max(scores, default=0.0)


def _words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return _ARTICLES.sub(" ", kept).split()


def _characters(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).lower()
    return [c for c in text if not c.isspace() and not unicodedata.category(c).startswith("P")]


def _number_tokens(text: str) -> list[str]:
    """DROP's: hyphens part words, and a token that is a number is written as a float."""
    found: list[str] = []
    for part in re.split(r"[ -]", text.lower()):
        kept = part if _is_number(part) else "".join(c for c in part if c not in _PUNCTUATION)
        kept = str(float(kept)) if _is_number(kept) else kept
        found += _ARTICLES.sub(" ", kept).split()
    return found


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _token_f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def _number_f1(said: list[str], wanted: list[str]) -> float:
    needed = {token for token in wanted if _is_number(token)}
    if needed and not needed & set(said):
        return 0.0
    return _token_f1(sorted(set(said)), sorted(set(wanted)))


def _stands_in(wanted: list[str], said: list[str]) -> bool:
    return any(said[at : at + len(wanted)] == wanted for at in range(len(said) - len(wanted) + 1))
