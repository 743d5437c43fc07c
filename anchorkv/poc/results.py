"""What a proof of concept found: the content of report.json, and all that a report shows.

Bytes are bytes, times are seconds, speeds are tokens/s, ratios are anchored to full cache unless a name says otherwise.
Nothing here computes: `measure.py` and `summary.py` fill it, `verdict.py` judges it, `report/` shows it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from anchorkv.config import AnchorConfig, RecallMode
from anchorkv.errors import SavedStateError

SCHEMA = 1
Lang = Literal["en", "ja"]
Kpi = Literal["memory", "speed", "quality", "perplexity", "agreement"]
VerdictKind = Literal["adopt", "adopt_with_recall", "do_not_use", "not_enough_data"]


class Part(BaseModel):
    """Immutable, and strict about its fields: a report.json of another version is refused, not misread."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Figure(Part):
    """A mean of `n` measurements with its standard error; None where it is unknown."""

    value: float | None = None
    stderr: float | None = None
    n: int = 0


class ModelFacts(Part):
    name: str
    weights: str = Field(description="type of the weights, such as Q8_0")
    engine: str
    adapter: str | None = Field(None, description="name of the adapter that is merged into the weights")
    architecture: str
    layers: int
    window: int = Field(description="tokens that the model was trained for at once")
    cell_bytes: int = Field(description="keys and values of one token in all layers")
    fingerprint: str


class Thresholds(Part):
    """What an area must reach to be adopted. Each KPI is compared with its one limit."""

    memory_reduction: float = Field(3.0, gt=1, description="cells of the full cache per cell kept at the end, at least")
    speed_ratio: float = Field(0.9, gt=0, description="tokens/s while writing against the full cache, at least")
    quality_share: float = Field(0.95, gt=0, le=1, description="right answers as a share of the full cache's, at least")
    perplexity_ratio: float = Field(1.25, ge=1, description="perplexity against the full cache, at most")
    agreement: float = Field(0.6, ge=0, le=1, description="answers that equal the full cache's, at least")
    min_questions: int = Field(5, ge=1, description="questions below which quality is not judged")


class Cells(Part):
    """Memory of one side, of one document or an area's mean."""

    end_cells: Figure
    peak_cells: Figure
    end_bytes: Figure
    peak_bytes: Figure


class Speed(Part):
    """One side's times; each with its ratio to the full cache in turns (above 1: faster than the full cache)."""

    prefill: Figure
    decode: Figure
    first_token: Figure = Field(description="seconds from a question to the first token of its answer")
    prefill_ratio: Figure
    decode_ratio: Figure
    first_token_ratio: Figure
    length: int = Field(default=0, description="tokens read when it was timed, the mean of documents; 0: not timed")


class Answering(Part):
    """One side's answers to the questions of a document or an area."""

    correct: Figure = Field(description="share of questions answered rightly")
    share_of_full: Figure = Field(description="`correct` as a share of the full cache's")
    agreement: Figure = Field(description="share of answers that say the same as the full cache's")
    answer_loss: Figure = Field(description="-log p a token of the right answer, in nats")
    recalled_cells: Figure


class WayResult(Part):
    """A policy with a recall mode, on one document or area. The first of a list is the full cache."""

    policy: str = Field(description='name of the policy; "full" is the yardstick')
    recall: RecallMode
    cells: Cells
    reduction: Figure = Field(description="cells of the full cache per cell kept at the end, recalled ones counted")
    speed: Speed
    perplexity: Figure
    perplexity_ratio: Figure
    context_recovered: Figure
    answering: Answering


class Reason(Part):
    """One comparison behind a verdict. `limit`: the threshold; `passed`: None where there was too little to judge."""

    kpi: Kpi
    value: float | None
    stderr: float | None = None
    limit: float
    passed: bool | None
    part: Literal["", "prefill", "first_token"] = Field(
        default="", description="of speed: what besides writing is below the limit; told, and not part of the verdict"
    )


class Verdict(Part):
    kind: VerdictKind
    policy: str = Field(description="the policy that it is about: the best that passes, else the best there is")
    recall: RecallMode
    reasons: tuple[Reason, ...]


class Features(Part):
    """What a text is like; shares are of tokens unless they say otherwise (features.py)."""

    tokens: int
    segment_tokens: float = Field(description="mean tokens of a sentence")
    numbers: float = Field(description="share of words that hold a digit")
    names: float = Field(description="share of words that are names: capitals within a sentence")
    code: float = Field(description="share of lines that look like code")
    tables: float = Field(description="share of lines that look like rows of a table")
    redundancy: float = Field(description="share of the text that compression removes")
    repeated_names: float = Field(description="share of names and numbers that occurred before in the text")
    rare_words: float = Field(description="share of words that the tokenizer cuts into three pieces or more")
    returning_terms: float = Field(
        default=0.0, description="share of words that are no common ones and stood before, but not lately"
    )
    returning_phrases: float = Field(
        default=0.0, description="share of words and marks that end a run of five which stood before, but not lately"
    )
    japanese: float = Field(description="share of letters that are kana or kanji")
    language: str


class Suitability(Part):
    """What the project's own benchmarks let expect of a text before anything is measured."""

    expected_ratio: float = Field(description="perplexity ratio to the full cache with the default policy")
    error: float = Field(description="standard error of the prediction, as a factor's logarithm")
    level: Literal["good", "fair", "poor"]
    drivers: tuple[str, ...] = Field(description="the features that speak most for or against, strongest first")
    effects: tuple[float, ...] = Field(
        default=(), description="what each driver multiplies the expected ratio by; above 1 speaks against anchors"
    )
    outside: bool = Field(False, description="the text is unlike all that the model was fitted on")


class AreaResult(Part):
    name: str
    documents: int
    questions: int
    tokens: int
    ways: tuple[WayResult, ...]
    verdict: Verdict
    features: Features
    suitability: Suitability


class AnchorToken(Part):
    """A token of an anchor view. kind: whole (sink, pinned, recent window), anchor, recalled or dropped."""

    text: str
    kind: Literal["whole", "anchor", "recalled", "dropped"]


class DocumentResult(Part):
    id: str
    area: str
    title: str
    tokens: int
    sha256: str
    ways: tuple[WayResult, ...]
    memory_curve: tuple[tuple[int, int, int], ...] = Field((), description="(tokens read, full cells, cells kept)")
    view: tuple[AnchorToken, ...] = Field((), description="the document's beginning, token by token; empty: not shown")


class WorstCase(Part):
    """A question on which the chosen policy differs most from the full cache."""

    area: str
    document: str
    question: str
    expected: str
    full_answer: str
    answers: dict[RecallMode, str]
    correct: dict[str, bool] = Field(description='right or not, by "full" and by recall mode')
    lost: str = Field(description="the passage that holds the answer, as it stands in the text")
    kept: str = Field(description="what of that passage stayed in the cache; the rest as …")
    recalled: str = Field("", description="what recall brought back for the question")


class CapacityRow(Part):
    """One model on the named machine. All follow from `capacity.py`'s formulas."""

    model: str
    kv_bytes_token: int
    full_bytes_session: int
    anchored_bytes_session: int
    sessions_full: int
    sessions_anchored: int
    machines_full: int
    machines_anchored: int
    cost_full: float
    cost_anchored: float


class Capacity(Part):
    inputs: dict[str, Any] = Field(description="fields of capacity.CapacityInputs")
    models: tuple[dict[str, Any], ...] = Field(description="fields of capacity.ModelShape: the page's choice")
    rows: tuple[CapacityRow, ...]


class FallbackRule(Part):
    """A rule proposed from the data: when `when` holds, answer by `then`. `because`: a key of the report's words."""

    when: str = Field(description="a machine-readable condition, such as features.tables > 0.2")
    then: Literal["recall", "milder", "full"]
    because: str
    evidence: float | None = None


class Remark(Part):
    """What a reader should know of the run. text: in English. key, values: for a report in any language (`said.KEY` of
    its words); "" where there is English alone."""

    text: str
    key: str = ""
    values: dict[str, str] = {}


class Skipped(Part):
    """A file that was not used; key and values as in Remark."""

    path: str
    reason: str
    key: str = ""
    values: dict[str, str] = {}


def _remarks(given: Any) -> Any:
    """The plain sentences of older reports are remarks too."""
    if not isinstance(given, (list, tuple)):
        return given
    return tuple(Remark(text=one) if isinstance(one, str) else one for one in given)


class PocReport(Part):
    """All of it."""

    schema_version: int = SCHEMA
    anchorkv_version: str
    created: str = Field(description="ISO date and time")
    title: str
    lang: Lang
    redacted: bool
    seconds: float
    model: ModelFacts
    environment: dict[str, Any]
    policies: dict[str, AnchorConfig]
    recall_modes: tuple[RecallMode, ...]
    budget_minutes: float | None
    seed: int
    threads: int | None = None
    thresholds: Thresholds
    overall: AreaResult
    areas: tuple[AreaResult, ...]
    documents: tuple[DocumentResult, ...]
    worst: tuple[WorstCase, ...]
    capacity: Capacity
    rules: tuple[FallbackRule, ...]
    skipped: tuple[Skipped, ...]
    left_out: Annotated[tuple[Remark, ...], BeforeValidator(_remarks)] = Field(description="what was not measured")
    own_questions: bool = Field(description="whether the user's own questions were asked; else cloze questions")

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, path: str = "report.json") -> PocReport:
        """Raises SavedStateError, naming `path`, for what is no report of this version."""
        try:
            return cls.model_validate_json(text)
        except ValueError:
            raise SavedStateError(
                f"{path} is no report.json of this version of anchorkv; run anchorkv poc again."
            ) from None
