"""The groups of an operator's settings, each with what it means and what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator
from pydantic.types import ByteSize

from anchorkv.config import PRESETS, RecallMode
from anchorkv.errors import ConfigError
from anchorkv.poc.results import FallbackRule
from anchorkv.poc.rules import condition

OPERATOR = "operator"
"""Why a rule is there that the operator wrote."""


def _words(given: Any) -> Any:
    """YAML reads on and off as true and false."""
    if not isinstance(given, (list, tuple)):
        return given
    return [("on" if mode else "off") if isinstance(mode, bool) else mode for mode in given]


def _why(given: Any) -> Any:
    """A rule that the operator writes need not say why."""
    if not isinstance(given, (list, tuple)):
        return given
    return [{"because": OPERATOR, **rule} if isinstance(rule, dict) else rule for rule in given]


class Group(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AuditSettings(Group):
    """What is recorded of every answer."""

    database: SecretStr | None = Field(
        None, description="SQLite file or postgresql://… ; null: audit.db in the data folder. One with a password is "
        "better given as ANCHORKV_AUDIT_DATABASE"
    )
    text: bool = Field(False, description="whether prompts and answers are recorded; else their hashes alone")
    retention_days: float | None = Field(
        None, gt=0, le=36_500, description="days until the content of a record is taken away, on start and daily; its "
        "hash stays in the chain; null: it is kept"
    )
    spool_bytes: ByteSize = Field(
        ByteSize(64 * 2**20), ge=2**16, description="records that wait on disk while the database is away, at most"
    )


class PolicyBounds(Group):
    """What a request may choose for itself."""

    smallest_reduction: float | None = Field(2.0, gt=1, le=1000, description="null, as largest: it may choose none")
    largest_reduction: float | None = Field(32.0, gt=1, le=1000, description="tokens of older text per cell kept of it")
    recall: Annotated[tuple[RecallMode, ...], BeforeValidator(_words)] = Field(
        ("off", "auto", "on"), min_length=1, description="whether dropped segments may be brought back"
    )
    full: bool = Field(True, description="whether a request may ask for the full cache; the fallback always may")
    policies: tuple[str, ...] = Field((), description="presets that it may name, besides the rollout plan's policies")
    custom: bool = Field(False, description="whether a request may give a policy's options itself")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.smallest_reduction, self.largest_reduction
        if (low is None) != (high is None):
            raise ValueError("give both smallest_reduction and largest_reduction, or null for both")
        if low is not None and high is not None and low > high:
            raise ValueError(f"smallest_reduction ({low:g}) is above largest_reduction ({high:g})")
        for name in self.policies:
            if name not in PRESETS:
                raise ValueError(f"there is no preset '{name}'; choose among {', '.join(PRESETS)}")
        return self

    @property
    def reductions(self) -> tuple[float, float] | None:
        """Smallest and largest, None where a request may choose none."""
        if self.smallest_reduction is None or self.largest_reduction is None:
            return None
        return self.smallest_reduction, self.largest_reduction


class RequestLimits(Group):
    """How large and how long one request may be."""

    bytes: ByteSize = Field(ByteSize(8 * 2**20), ge=1024, description="body of a request")
    upload_bytes: ByteSize = Field(ByteSize(32 * 2**20), ge=1024, description="an uploaded document")
    tokens: int | None = Field(None, ge=1, description="prompt and answer together; null: what fits in the KV cells")
    max_tokens: int = Field(4096, ge=1, description="most tokens of an answer")
    default_tokens: int = Field(512, ge=1, description="most tokens of an answer, where the request does not say")
    answers: int = Field(8, ge=1, le=16, description="answers to one request (n)")
    seconds: float = Field(600, gt=0, description="time of a request, waiting included")
    read_seconds: float = Field(30, gt=0, description="time until a client has sent its request, or read a piece")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tokens is not None and self.max_tokens > self.tokens:
            raise ValueError(
                f"an answer may have {self.max_tokens} tokens (max_tokens), but prompt and answer together only "
                f"{self.tokens} (tokens)"
            )
        if self.default_tokens > self.max_tokens:
            raise ValueError(f"default_tokens ({self.default_tokens}) is above max_tokens ({self.max_tokens})")
        return self


class WatchSettings(Group):
    """The check of a share of answers against the full cache, in the background."""

    share: float = Field(0.02, ge=0, le=1, description="share of requests that is checked; 0: none")
    most_share: float = Field(0.25, ge=0, le=1, description="the share may rise to this where a figure is in doubt")
    time_share: float = Field(0.1, gt=0, le=1, description="share of the engine's time that checks may take under load")
    idle_seconds: float = Field(
        600, ge=0, description="checks take free KV cells, and those of conversations that nobody has gone on with for "
        "so long; with 0 a check may cost a live conversation its cells, which is then read again"
    )
    tokens: int = Field(4096, ge=64, description="longer requests are not checked: a full cache holds all their cells")
    loss_gap_limit: float | None = Field(
        None, ge=0, description="nats a token that anchors may lose; null: as the rollout plan says"
    )
    agreement_floor: float | None = Field(
        None, ge=0, le=1, description="share of answers that must say what the full cache's say; null: as the plan says"
    )
    window: int = Field(200, ge=10, description="newest checks that an estimate is made of")
    confidence: float = Field(0.95, ge=0.5, lt=1, description="of the bounds")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.most_share < self.share:
            raise ValueError(f"most_share ({self.most_share:g}) is below share ({self.share:g})")
        return self


class FallbackSettings(Group):
    """When to answer more safely: anchors, anchors and recall, a milder reduction, the full cache."""

    enabled: bool = True
    dry_run: bool = Field(False, description="only say in logs and records what would have been done")
    rules: Annotated[tuple[FallbackRule, ...], BeforeValidator(_why)] = Field(
        (), description="besides those of the rollout plan: [{when: 'features.tables > 0.2', then: recall}]"
    )
    least_logprob: float | None = Field(
        None, le=0, description="mean log-probability of an answer's tokens below which it is written anew, more safely"
    )
    breaker: bool = Field(
        True, description="whether a tenant or kind of document falls back while its watch is out of bounds"
    )
    probe_seconds: float = Field(60, gt=0, description="time until a breaker that fell back tries anchors again")
    probes: int = Field(5, ge=1, description="good checks in a row until it trusts them")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for rule in self.rules:
            try:
                condition(rule.when)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        if self.dry_run and not self.enabled:
            raise ValueError("dry_run needs the fallback to be enabled")
        return self


class CanarySettings(Group):
    """Questions with known answers, asked on a schedule."""

    file: Path | None = Field(None, description=".jsonl, .json, .yaml or .csv: question, answer, document; null: none")
    every_minutes: float = Field(60, ge=1, le=10_080, description="how often they are asked")
    least_right: float = Field(0.8, ge=0, le=1, description="share of right answers below which it is an alarm")
