"""The rollout plan as a file: what to run where, what to watch, and when to fall back. Written as YAML, for people and
for the server alike (`--policy rollout.yaml`).

`Rollout.policy_for` answers the one question that a server has: with which policy does this text run?
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from anchorkv.config import AnchorConfig, RecallMode, preset
from anchorkv.errors import AnchorKVError, ConfigError, SavedStateError
from anchorkv.evaluate.ways import FULL
from anchorkv.optional import library
from anchorkv.poc.results import AreaResult, FallbackRule, Part, PocReport, Thresholds, VerdictKind
from anchorkv.poc.rules import Watch, chosen_way, condition, holds, watch
from anchorkv.poc.verdict import MILDEST

FORMAT = "anchorkv-rollout/1"
_HEAD = (
    "# How to run anchored caches, as a proof of concept found it. Load it with --policy FILE.\n"
    "# areas: the policy of each kind of document. watch: compare with a sample answered by the full cache.\n"
    "# rules: what holds goes to `then`: recall, a milder policy, or the full cache, the last steps of the ladder.\n"
)


class AreaPlan(Part):
    """How documents of one area run. policy: a name of `Rollout.policies`, or "full"."""

    verdict: VerdictKind
    policy: str
    recall: RecallMode
    watch: Watch


class Step(Part):
    """A step of the fallback ladder."""

    policy: str
    recall: RecallMode


class Rollout(Part):
    """Everything that a server needs to run anchored caches as they were measured."""

    format: Literal["anchorkv-rollout/1"] = "anchorkv-rollout/1"
    anchorkv_version: str
    created: str
    model: str
    fingerprint: str = Field(description="of the weights that were measured")
    verdict: VerdictKind = Field(description="over all areas")
    policy: str = Field(description="of what belongs to no area")
    recall: RecallMode
    policies: dict[str, AnchorConfig]
    areas: dict[str, AreaPlan]
    watch: Watch
    thresholds: Thresholds = Field(
        default_factory=lambda: Thresholds.model_validate({}), description="what the proof of concept asked for"
    )
    ladder: tuple[Step, ...] = Field(description="from what is chosen to the full cache, each step safer and larger")
    rules: tuple[FallbackRule, ...]

    @field_validator("rules")
    @classmethod
    def _conditions(cls, found: tuple[FallbackRule, ...]) -> tuple[FallbackRule, ...]:
        for rule in found:
            try:
                condition(rule.when)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return found

    def model_post_init(self, _: Any) -> None:
        named = [self.policy, *(area.policy for area in self.areas.values()), *(step.policy for step in self.ladder)]
        for name in named:
            if name != FULL and name not in self.policies:
                raise ConfigError(f"The rollout plan names the policy '{name}' but does not say what it is.")

    def config(self, policy: str, recall: RecallMode) -> AnchorConfig:
        """The policy of that name with that recall."""
        return preset(FULL) if policy == FULL else self.policies[policy].replace(recall=recall)

    def policy_for(self, facts: Mapping[str, Any]) -> AnchorConfig:
        """The policy that `facts` (rules.py: area, tokens, features.X, watch.X; those that are known) ask for. Of
        several rules that hold the safest counts."""
        area = self.areas.get(str(facts.get("area")))
        step = Step(policy=area.policy, recall=area.recall) if area else Step(policy=self.policy, recall=self.recall)
        asked = {rule.then for rule in self.rules if holds(rule.when, facts)}
        if "full" in asked or step.policy == FULL:
            return preset(FULL)
        if asked:
            step = self._safer(step, "milder" in asked)
        return self.config(step.policy, step.recall)

    def _safer(self, step: Step, milder: bool) -> Step:
        """What the ladder has beyond `step`: the same policy with more recall, or a milder policy."""
        later = self.ladder[self.ladder.index(step) + 1 :] if step in self.ladder else self.ladder[1:]
        if milder:
            later = tuple(other for other in later if other.policy != step.policy)
        return later[0] if later else Step(policy=FULL, recall="off")

    def save(self, path: Path) -> None:
        """Raises SavedStateError when it cannot be written."""
        yaml = library("yaml", path.name)
        text = _HEAD + yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
        try:
            partial = path.with_name(path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise SavedStateError(
                f"{path} cannot be written ({error.strerror}); free some space or choose another --out."
            ) from None

    @classmethod
    def load(cls, path: Path) -> Rollout:
        """Raises ConfigError, one sentence, for a file that is missing, damaged or no rollout plan."""
        yaml = library("yaml", str(path))
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"The rollout plan {path} cannot be read ({error.strerror}); check the path.") from None
        except (UnicodeDecodeError, yaml.YAMLError):
            raise ConfigError(f"{path} is no YAML; give the rollout.yaml that anchorkv poc wrote.") from None
        if not isinstance(content, dict) or "format" not in content:
            raise ConfigError(
                f"{path} is no rollout plan; give the rollout.yaml that anchorkv poc wrote, or a policy as .json."
            )
        if content["format"] != FORMAT:
            raise ConfigError(
                f"{path} is a rollout plan of another version ({content['format']}); run anchorkv poc again."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            what = first["msg"].removeprefix("Value error, ").rstrip(".")
            raise ConfigError(f"{path}: {where}: {what}; mend it, or run anchorkv poc again.") from None
        except AnchorKVError as error:
            raise ConfigError(f"{path}: {error}") from None


def rollout(report: PocReport) -> Rollout:
    """The plan that follows from a report."""
    overall = report.overall
    step = _step(overall)
    thresholds = report.thresholds
    return Rollout(
        anchorkv_version=report.anchorkv_version, created=report.created, model=report.model.name,
        fingerprint=report.model.fingerprint, verdict=overall.verdict.kind, policy=step.policy, recall=step.recall,
        policies={name: policy for name, policy in report.policies.items() if name != FULL},
        areas={
            area.name: AreaPlan(
                verdict=area.verdict.kind, policy=_step(area).policy, recall=_step(area).recall,
                watch=watch(chosen_way(area), thresholds),
            )
            for area in report.areas
        },
        watch=watch(chosen_way(overall), thresholds), thresholds=thresholds, ladder=_ladder(overall),
        rules=report.rules,
    )


def _step(area: AreaResult) -> Step:
    """What runs: what passed, else the full cache."""
    verdict = area.verdict
    if verdict.kind.startswith("adopt"):
        return Step(policy=verdict.policy, recall=verdict.recall)
    return Step(policy=FULL, recall="off")


def _ladder(overall: AreaResult) -> tuple[Step, ...]:
    """The chosen policy with ever more recall, then those that keep more cells, as they were measured, then full."""
    chosen = overall.verdict.policy
    reductions = {way.policy: way.reduction.value or 0.0 for way in reversed(overall.ways[1:])}
    milder = [name for name, reduction in reductions.items() if reduction < reductions.get(chosen, 0.0)]
    steps = []
    for policy in [chosen, *sorted(milder, key=lambda name: -reductions[name])]:
        modes = [way.recall for way in overall.ways[1:] if way.policy == policy]
        steps += [Step(policy=policy, recall=mode) for mode in sorted(modes, key=MILDEST.index)]
    return (*steps, Step(policy=FULL, recall="off"))
