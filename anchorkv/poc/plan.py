"""What a proof of concept is to measure: a folder and defaults, or a YAML file as `anchorkv poc init` writes it.

Every mistake is one sentence, told before anything is measured: unknown options, values out of range, thresholds that
contradict each other or ask for what no policy aims at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from anchorkv.config import AnchorConfig, RecallMode
from anchorkv.errors import ConfigError, SavedStateError
from anchorkv.evaluate.plan import YAML
from anchorkv.evaluate.ways import FULL, way
from anchorkv.models import EngineName
from anchorkv.optional import library
from anchorkv.poc.capacity import CapacityInputs
from anchorkv.poc.documents import MAX_BYTES
from anchorkv.poc.results import Lang, Part, Thresholds
from anchorkv.yaml_file import load_yaml

_HEAD = "# A proof of concept: run it with `anchorkv poc {name}`. Paths are relative to this file.\n"
_PATHS = ("folder", "questions", "out")
FROM_POLICY = ("sinks", "recent_window", "segment", "recall_cells", "cell_budget")
"""What a capacity takes from the policy that was chosen, so that a plan need not say it."""
_HINTS = {
    "memory_reduction": "it is a factor, so 5 means a fifth of the memory",
    "speed_ratio": "it is a factor, so 1 means as fast as the full cache",
    "quality_share": "it is a share, so 0.95 means 95 %",
    "perplexity_ratio": "it is a factor, so 1.25 means 25 % more",
    "agreement": "it is a share, so 0.6 means 60 %",
}
"""How a threshold is written, for those who wrote another thing."""


THRESHOLDS = Thresholds.model_validate({})


class Plan(Part):
    """Everything that a run follows from. None in the place of a number: no limit, or as many as there are."""

    title: str = Field("", max_length=200, description="of the report; empty: the folder's name")
    folder: Path | None = Field(None, description="a sub-folder for each business area; null: the bundled samples")
    questions: Path | None = Field(
        None, description="your own questions (.jsonl, .json, .yaml, .csv: question, answer, document); null: those in "
        "the folder's questions.jsonl, or made from the facts of each document"
    )
    skip_bad_rows: bool = Field(False, description="whether questions that cannot be asked are passed over and listed")
    model: str | None = Field(None, description="hub id, folder or GGUF file; null: the built-in SmolLM2-135M-Instruct")
    engine: EngineName = Field("auto", description="auto, llama or torch; auto takes llama for GGUF files")
    threads: int | None = Field(None, ge=1, description="processor threads; null: chosen by the engine")
    policies: dict[str, str | AnchorConfig] = Field(
        {"default": "default"}, description="what to set beside the full cache: names as in `anchorkv eval` (default, "
        "window, default:reduction=24, a JSON file), or names with the options of a policy", validate_default=True,
    )
    recall_modes: tuple[RecallMode, ...] = Field(
        ("off", "auto", "on"), min_length=1, description="whether dropped sentences are brought back for a question"
    )
    thresholds: Thresholds = Field(THRESHOLDS, description="what an area must reach to be adopted")
    questions_per_document: int = Field(6, ge=0, le=1000, description="questions made from a document, at most")
    max_tokens_document: int | None = Field(
        4096, ge=64, description="tokens read of a document; null: as many as the model's window takes"
    )
    max_file_bytes: int = Field(MAX_BYTES, ge=1, description="larger files are skipped")
    budget_minutes: float | None = Field(None, gt=0, description="minutes to measure; null: until all is measured")
    seed: int = Field(0, ge=0, description="of everything drawn")
    lang: Lang = Field("en", description="language of the report: en or ja")
    redact: bool = Field(False, description="whether lengths and hashes replace the documents' text in the report")
    capacity: CapacityInputs = Field(CapacityInputs(), description="the machine and users to work out costs for")
    out: Path | None = Field(None, description="folder of the report; null: a folder of its own under poc/")

    def __init__(self, **fields: Any) -> None:
        """Raises ConfigError, one sentence, for what is unknown, out of range or contradictory."""
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_sentence(error)) from None

    @field_validator("policies", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        names = [given] if isinstance(given, str) else given
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            return {name: name for name in names}
        return given

    @field_validator("policies")
    @classmethod
    def _against_full(cls, given: dict[str, str | AnchorConfig]) -> dict[str, str | AnchorConfig]:
        if given.get(FULL, FULL) != FULL:
            raise ValueError("'full' is the full cache, which all is measured against; name the policy otherwise")
        if not given.keys() - {FULL}:
            raise ValueError("name at least one policy to set beside the full cache, such as default")
        return given

    @field_validator("recall_modes", mode="before")
    @classmethod
    def _unquoted(cls, given: Any) -> Any:
        """YAML reads on and off as true and false."""
        words = {True: "on", False: "off"}
        return [words.get(mode, mode) for mode in given] if isinstance(given, list) else given

    @field_validator("recall_modes")
    @classmethod
    def _once(cls, given: tuple[RecallMode, ...]) -> tuple[RecallMode, ...]:
        return tuple(dict.fromkeys(given))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        asked = self.thresholds
        if asked.perplexity_ratio == 1:
            raise ValueError(
                f"the thresholds contradict each other: memory_reduction {asked.memory_reduction:g} drops cells, and "
                "perplexity_ratio 1 allows no loss at all; allow some, such as 1.1"
            )
        if asked.agreement == 1 and asked.quality_share < 1:
            raise ValueError(
                "the thresholds contradict each other: agreement 1 allows no answer to differ from the full cache's, "
                f"quality_share {asked.quality_share:g} does; lower agreement, or set quality_share to 1"
            )
        return self

    def changed(self, **given: Any) -> Plan:
        """What is not None in `given` goes before what the plan says. Raises ConfigError as a new plan does."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Plan(**{**fields, **{name: value for name, value in given.items() if value is not None}})

    def resolved(self, own: AnchorConfig | None = None) -> dict[str, AnchorConfig]:
        """The policies themselves. own: the model's own, which "default" means.

        Raises ConfigError for one that is unknown, that needs the model without its adapter, or when the thresholds ask
        for more than any of them aims at.
        """
        found = {name: _policy(given, own) for name, given in self.policies.items() if name != FULL}
        most = max(map(_aim, found.values()))
        if most < self.thresholds.memory_reduction:
            raise ConfigError(
                f"No policy can reach the threshold: memory_reduction is {self.thresholds.memory_reduction:g}, and the "
                f"policies keep one cell in {most:g} at best; lower it, or name a policy such as "
                f"default:reduction={2 * self.thresholds.memory_reduction:g}."
            )
        return found

    @classmethod
    def load(cls, path: Path) -> Plan:
        """The plan in a YAML file. Raises ConfigError, one sentence, when it is missing or wrong."""
        content = _read(path)
        for name in _PATHS:
            if isinstance(content.get(name), str):
                content[name] = path.parent / Path(content[name]).expanduser()
        if isinstance(content.get("model"), str):
            content["model"] = _beside(path, content["model"])
        try:
            plan = cls(**content)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        return plan.changed(policies={
            name: _beside(path, given) if isinstance(given, str) else given for name, given in plan.policies.items()
        })

    def save(self, path: Path) -> None:
        """As YAML, every option with what it means. Raises SavedStateError when it cannot be written."""
        yaml = library("yaml", "plans")
        given = self.model_dump(mode="json")
        given["policies"] = _short(given["policies"])
        for name in _PATHS:
            if value := getattr(self, name):
                given[name] = _relative(value, path.parent)
        if self.model and Path(self.model).exists():
            given["model"] = _relative(Path(self.model), path.parent)
        text = _HEAD.format(name=path.name) + "\n".join(_written(type(self), given, yaml)) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise SavedStateError(f"{path} cannot be written ({error.strerror}); choose another place.") from None


def is_plan(path: Path) -> bool:
    """Whether `path` is called as a plan is."""
    return path.suffix.lower() in YAML


# --- policies ------------------------------------------------------------------------------------------------------


def _policy(given: str | AnchorConfig, own: AnchorConfig | None) -> AnchorConfig:
    if isinstance(given, AnchorConfig):
        return given
    found = way(given, own)
    if not found.adapter:
        raise ConfigError(
            f"'{given}' is the model without its adapter, but both sides of a proof of concept have the same weights; "
            "give its policy by its own name."
        )
    return found.policy


def _aim(policy: AnchorConfig) -> float:
    """Full cells per cell kept that a policy can reach at most; without limit where other kinds of anchors or a budget
    decide it."""
    selects = policy.anchors == ("SEL",) and not isinstance(policy.cell_budget, int)
    return policy.reduction if selects else float("inf")


# --- files ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path, "plans")
    except FileNotFoundError:
        raise ConfigError(f"There is no plan at {path}; `anchorkv poc init {path}` writes one.") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"The plan {path} cannot be read ({why}); save it as UTF-8 text.") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"{path} is no plan; write options such as `folder: documents`, or run `anchorkv poc init`.")
    return content


def _beside(plan: Path, name: str) -> str:
    """A file that lies beside the plan by its place, everything else as it is. Behind a colon: options of a policy."""
    file, colon, options = name.partition(":")
    found = plan.parent / Path(file).expanduser()
    return f"{found}{colon}{options}" if file and found.exists() and ("/" in file or "." in file) else name


def _relative(path: Path, folder: Path) -> str:
    whole, start = path.expanduser().resolve(), folder.expanduser().resolve()
    return whole.relative_to(start).as_posix() or "." if whole.is_relative_to(start) else os.fspath(whole)


def _short(policies: dict[str, Any]) -> Any:
    """A list of names, where they say everything."""
    return list(policies) if all(name == given for name, given in policies.items()) else policies


def _written(kind: type[Part], given: Mapping[str, Any], yaml: Any, indent: str = "") -> Iterator[str]:
    """Lines of YAML, each option behind its description."""
    for name, field in kind.model_fields.items():
        if name in FROM_POLICY:
            continue
        if field.description:
            yield f"{indent}# {' '.join(field.description.split())}"
        if isinstance(field.default, Part):
            yield f"{indent}{name}:"
            yield from _written(type(field.default), given[name], yaml, indent + "  ")
        else:
            value = yaml.safe_dump(
                [given[name]], allow_unicode=True, default_flow_style=True, width=float("inf"), sort_keys=False
            )
            yield f"{indent}{name}: {value.strip()[1:-1]}"


def _sentence(error: ValidationError) -> str:
    """What is wrong with a plan, the first of it."""
    problem = error.errors()[0]
    where = [str(part) for part in problem["loc"] if part not in ("str", "AnchorConfig")]
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    if not where:
        return f"{message[0].upper()}{message[1:]}."
    if problem["type"] == "extra_forbidden":
        known = Plan.model_fields if len(where) == 1 else Thresholds.model_fields
        return f"There is no option '{'.'.join(where)}'; the options are {', '.join(known)}."
    hint = f"; {_HINTS[where[-1]]}" if where[-1] in _HINTS else ""
    if problem["type"] == "value_error":
        return f"{'.'.join(where)}: {message}."
    return f"'{'.'.join(where)}' cannot be {problem['input']!r} ({message[0].lower()}{message[1:]}{hint})."
