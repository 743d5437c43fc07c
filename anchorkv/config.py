"""Every choice that defines an anchored model, as one frozen, validated, JSON-able object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from anchorkv.errors import ConfigError

AnchorKind = Literal["EP", "AC", "SEL"]
SegmentKind = Literal["sentence", "separator", "period", "fixed"]
RecallMode = Literal["off", "on", "auto"]


class AnchorConfig(BaseModel):
    """What stays in the cache, and what may come back.

    `anchors` names the kinds in force; they combine (``("EP", "SEL")`` keeps end tokens *and* selected ones):

    * ``EP``  the segment's end token (AnLLM, arXiv 2402.07616, section 3.2); with separator segments, every
      separator in it (SepLLM, arXiv 2412.12094)
    * ``AC``  `ac_tokens` added ``<AC>`` tokens end every segment (ibid.)
    * ``SEL`` the text's own tokens that `scorer` finds most useful, one in `reduction`

    With none, only sinks, pinned spans and the recent window stay: "no memory", the lower yardstick.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    anchors: tuple[AnchorKind, ...] = ("SEL",)
    ac_tokens: int = Field(1, ge=1, le=16, description="k: added <AC> tokens a segment (AC only)")
    scorer: str = Field("default", description="name of the scorer that SEL asks (see anchorkv.scorers)")
    reduction: float = Field(12.0, gt=1, le=1000, description="SEL: tokens of older text per cell kept of it")
    aging: float = Field(
        5.5, ge=0, le=100, description="SEL: how much age counts against an anchor, in standard deviations of the "
        "scores per e-fold of age; 0: what is an anchor stays one"
    )
    sinks: int = Field(4, ge=0, description="first tokens of the stream that are never dropped")
    recent_window: int = Field(1, ge=0, description="newest whole segments before the current one (w)")
    anchors_see_anchors: bool = Field(False, description="EP and AC anchors also see earlier anchors")
    pinned: tuple[str, ...] = Field((), description="spans of text that are never dropped")
    pin_prompt: bool = Field(True, description="pin the chat template's opening (system prompt) as well")
    segments: SegmentKind = "sentence"
    min_segment: int = Field(16, ge=1, description="tokens; sentence ends before this are passed over")
    max_segment: int = Field(48, ge=1, description="tokens; a segment is cut here at the latest")
    recall: RecallMode = "auto"
    recall_cells: int = Field(256, ge=0, description="cells that recalled segments may hold at once")
    cell_budget: Annotated[int, Field(ge=16)] | Literal["window"] | None = Field(
        None, description="most cells kept; when full the worst (SEL that ages) or the oldest anchors go; 'window': "
        "see budget_for"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.anchors)) != len(self.anchors):
            raise ValueError("anchors names a kind twice")
        if self.max_segment < self.min_segment:
            raise ValueError(f"max_segment ({self.max_segment}) is smaller than min_segment ({self.min_segment})")
        if self.recall == "on" and self.recall_cells == 0:
            raise ValueError("recall is on but recall_cells is 0: give it cells or turn recall off")
        whole = self.most_whole
        if isinstance(self.cell_budget, int) and self.cell_budget <= whole:
            raise ValueError(
                f"cell_budget ({self.cell_budget}) leaves no room for anchors: sinks, the recent window and the "
                f"current segment alone can take {whole} cells"
            )
        if any(not span.strip() for span in self.pinned):
            raise ValueError("a pinned span is empty")
        return self

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_one_sentence(error)) from None

    @property
    def isolated(self) -> bool:
        """Whether EP/AC anchors see their own segment alone (the paper's AnSAN)."""
        return not self.anchors_see_anchors and ("EP" in self.anchors or "AC" in self.anchors)

    @property
    def most_whole(self) -> int:
        """Most cells that sinks, the recent window and the current segment can take."""
        added = self.ac_tokens if "AC" in self.anchors else 0
        return self.sinks + (self.recent_window + 1) * (self.max_segment + added)

    def budget_for(self, window: int) -> int | None:
        """Most cells kept with a model of `window` tokens: "window" is an eighth more than its whole window takes at
        this reduction, so that only streams longer than the model was trained for lose their oldest anchors."""
        if self.cell_budget != "window":
            return self.cell_budget
        return max(round(window / self.reduction * 9 / 8), 2 * self.most_whole)

    @property
    def ends_are_anchors(self) -> bool:
        """Whether the last token of a segment is an anchor because it is the last."""
        return "EP" in self.anchors and self.segments != "separator"

    def replace(self, **changes: Any) -> AnchorConfig:
        """A copy with `changes`, validated again."""
        return AnchorConfig(**{**self.model_dump(), **changes})

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> AnchorConfig:
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the policy is not valid JSON: {error.msg} at line {error.lineno}.") from None
        if not isinstance(fields, dict):
            raise ConfigError("the policy must be a JSON object of options.")
        return cls(**fields)

    @classmethod
    def load(cls, path: str | Path) -> AnchorConfig:
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the policy file {path} cannot be read: {error}.") from None

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")


def _one_sentence(error: ValidationError) -> str:
    parts = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        what = problem["msg"].removeprefix("Value error, ")
        given = f" (got {problem['input']!r})" if where and problem["type"] != "extra_forbidden" else ""
        parts.append(f"{where}: {what}{given}" if where else what)
    return "Invalid anchor policy: " + "; ".join(parts) + "."


PRESETS: dict[str, AnchorConfig] = {
    # The yardstick: the recent window never ends, so nothing is ever dropped.
    "full": AnchorConfig(
        anchors=("EP",), anchors_see_anchors=True, segments="fixed", min_segment=512, max_segment=512,
        recent_window=2**31, recall="off",
    ),
    # The lower yardstick: what left the recent window leaves nothing behind (StreamingLLM, arXiv 2309.17453).
    "no-memory": AnchorConfig(anchors=(), recall="off"),
    # SEL with the best scorer that needs no training; bounded, so any length passes through.
    "default": AnchorConfig(min_segment=24, max_segment=64, cell_budget="window"),
    # The paper: nothing but one anchor a sentence, w = 0, an anchor sees its own sentence alone.
    "paper-ep": AnchorConfig(
        anchors=("EP",), sinks=0, recent_window=0, min_segment=1, max_segment=256, recall="off",
        pin_prompt=False,
    ),
    "paper-ac": AnchorConfig(
        anchors=("AC",), ac_tokens=1, sinks=0, recent_window=0, min_segment=1, max_segment=256, recall="off",
        pin_prompt=False,
    ),
    # The paper's EP checkpoints: every token "." is an anchor and nothing else is; the paper knows no longest segment,
    # so this one is as long as those models' window.
    "anllm-ep": AnchorConfig(
        anchors=("EP",), sinks=0, recent_window=0, segments="period", min_segment=1, max_segment=4096, recall="off",
        pin_prompt=False,
    ),
    # SepLLM (arXiv 2412.12094): sinks, separators and a recent window; separators are ordinary tokens.
    "sepllm": AnchorConfig(
        anchors=("EP",), segments="separator", anchors_see_anchors=True, min_segment=32, max_segment=48,
        sinks=4, recent_window=2, recall="off", cell_budget=768, pin_prompt=False,
    ),
}


def preset(name: str) -> AnchorConfig:
    """The preset called `name`. Raises ConfigError with the known names otherwise."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"There is no preset '{name}'; choose one of {', '.join(PRESETS)}.") from None


def policy_of(
    text: str, also: Mapping[str, AnchorConfig] | None = None, files: str = "a .json file of one"
) -> AnchorConfig:
    """The policy that `text` names, wherever a user names one: "NAME" or "NAME:field=value,field=value".

    NAME: a preset, or the JSON file of a policy. also: further names, or what a preset's name means instead. files:
    what else may be named there, for the error.
    Raises ConfigError, one sentence, for what is unknown or does not fit.
    """
    name, _, changes = (text, "", "") if Path(text).is_file() else text.partition(":")
    return _named(name, {**PRESETS, **(also or {})}, files).replace(**_fields(text, changes))


def _named(name: str, known: Mapping[str, AnchorConfig], files: str) -> AnchorConfig:
    if name in known:
        return known[name]
    if name.lower().endswith(".json") or Path(name).is_file():
        return AnchorConfig.load(Path(name).expanduser())
    raise ConfigError(f"There is no policy '{name}'; choose one of {', '.join(known)}, or name {files}.")


def _fields(text: str, changes: str) -> dict[str, Any]:
    """What stands behind the colon. Values are JSON; what is none is a word."""
    fields: dict[str, Any] = {}
    for part in filter(None, changes.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in AnchorConfig.model_fields:
            raise ConfigError(
                f"In '{text}', '{part}' is no field=value of a policy; its fields are "
                f"{', '.join(AnchorConfig.model_fields)}."
            )
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = tuple(value.split("+")) if name == "anchors" else value
    return fields
