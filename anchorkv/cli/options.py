"""Options that several commands share: dataclasses whose fields are options, and how a command takes them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

from typer import Option

from anchorkv.cli.screen import merging_bar
from anchorkv.config import PRESETS, AnchorConfig, policy_of
from anchorkv.errors import ConfigError
from anchorkv.models import EngineName, Model, Policy, load
from anchorkv.sampling import Sampling
from anchorkv.scorers import scorer

JsonOption = Annotated[bool, Option("--json", help="Print one JSON object and nothing else on standard output.")]


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return Option(*names, help=help, rich_help_panel=panel, **more)


_MODEL, _POLICY, _SAMPLING = "Model", "Policy: what stays in the cache", "Writing"

ModelOption = Annotated[str | None, _option(
    "--model", "-m", panel=_MODEL, metavar="ID|DIR|GGUF",
    help="Hub id, local folder or GGUF file; without it the built-in SmolLM2-135M-Instruct.")]
PlannedEngineOption = Annotated[EngineName | None, _option(
    "--engine", panel=_MODEL, show_default="auto", help="auto takes llama for GGUF files.")]
"""Of commands that may take it from a plan: None where it was not given."""
ThreadsOption = Annotated[int | None, _option("--threads", panel=_MODEL, min=1, help="Processor threads.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, on which engine."""

    model: ModelOption = None
    engine: Annotated[EngineName, _option("--engine", panel=_MODEL, help="auto takes llama for GGUF files.")] = "auto"
    threads: ThreadsOption = None
    adapter: Annotated[bool, _option(
        "--adapter/--no-adapter", panel=_MODEL, help="Whether the built-in model uses its built-in adapter.")] = True

    def load(self, policy: Policy | None) -> Model:
        """policy: None takes the model's own. Raises ModelError when the model cannot be found or used."""
        with merging_bar() as progress:
            return load(
                self.model, engine=self.engine, policy=policy, threads=self.threads, adapter=self.adapter,
                progress=progress,
            )


@dataclass(frozen=True)
class PolicyOptions:
    """A preset or a saved policy, and what is changed in it. None means: as the policy has it."""

    policy: Annotated[str | None, _option(
        "--policy", "-p", panel=_POLICY, metavar="NAME|FILE[:field=value,…]",
        help=f"One of {', '.join(PRESETS)}, or a JSON file; :field=value changes it (default:reduction=24).")] = None
    anchors: Annotated[str | None, _option(
        "--anchors", panel=_POLICY, metavar="KIND,…", help="Kinds of anchors: EP, AC, SEL, several or none.")] = None
    ac_tokens: Annotated[int | None, _option(
        "--ac-tokens", panel=_POLICY, metavar="K", help="Added <AC> tokens a segment (needs AC).")] = None
    scorer: Annotated[str | None, _option(
        "--scorer", panel=_POLICY, metavar="NAME", help="Which scorer selects anchors (needs SEL).")] = None
    reduction: Annotated[float | None, _option(
        "--reduction", panel=_POLICY, metavar="X", help="Tokens of older text per cell kept of it (needs SEL).")] = None
    aging: Annotated[float | None, _option(
        "--aging", panel=_POLICY, metavar="X",
        help="How fast anchors thin out with age; 0: they stay for good (needs SEL).")] = None
    sinks: Annotated[int | None, _option(
        "--sinks", panel=_POLICY, metavar="N", help="First tokens that are never dropped.")] = None
    recent_window: Annotated[int | None, _option(
        "--recent-window", panel=_POLICY, metavar="N", help="Newest segments held whole.")] = None
    anchors_see_anchors: Annotated[bool | None, _option(
        "--anchors-see-anchors/--anchors-isolated", panel=_POLICY,
        help="Whether EP and AC anchors see earlier anchors.")] = None
    pinned: Annotated[list[str] | None, _option(
        "--pin", panel=_POLICY, metavar="TEXT", help="A span that is never dropped; repeatable.")] = None
    segments: Annotated[str | None, _option(
        "--segments", panel=_POLICY, metavar="KIND", help="sentence, period, separator or fixed.")] = None
    min_segment: Annotated[int | None, _option(
        "--min-segment", panel=_POLICY, metavar="N", help="Tokens a segment has at least.")] = None
    max_segment: Annotated[int | None, _option(
        "--max-segment", panel=_POLICY, metavar="N", help="Tokens a segment has at most.")] = None
    recall: Annotated[str | None, _option(
        "--recall", panel=_POLICY, metavar="MODE", help="off, on or auto: bring dropped segments back.")] = None
    recall_cells: Annotated[int | None, _option(
        "--recall-cells", panel=_POLICY, metavar="N", help="Cells that recalled segments may hold at once.")] = None
    cell_budget: Annotated[str | None, _option(
        "--cell-budget", panel=_POLICY, metavar="N|window|none",
        help="Most cells kept, oldest anchors go first; window: what the model's own window takes.")] = None

    def config(self) -> AnchorConfig:
        """The policy that these options make. Raises ConfigError for what is unknown, out of range or contradictory."""
        return self._changed(policy_of(self.policy or "default"))

    def chosen(self) -> Policy | None:
        """`config` where a policy was named; what changes the model's own where only options were; None for neither.

        Raises ConfigError for what is wrong whatever the model's own policy is.
        """
        if self.policy is not None:
            return self.config()
        self._changes()
        return self._changed if self.given() else None

    def _changes(self) -> dict[str, Any]:
        changes = {
            field.name: getattr(self, field.name)
            for field in fields(self) if field.name != "policy" and getattr(self, field.name) is not None
        }
        if self.anchors is not None:
            changes["anchors"] = _kinds(self.anchors)
        if self.pinned is not None:
            changes["pinned"] = tuple(self.pinned)
        if self.cell_budget is not None:
            changes["cell_budget"] = _budget(self.cell_budget)
        if self.scorer is not None:
            scorer(self.scorer)  # an unknown scorer should be told before a model is loaded
        return changes

    def _changed(self, base: AnchorConfig) -> AnchorConfig:
        """`base` with what these options change."""
        changes = self._changes()
        config = base.replace(**changes)
        for kind, names in {"AC": ("ac_tokens",), "SEL": ("scorer", "reduction", "aging")}.items():
            for name in names:
                if name in changes and kind not in config.anchors:
                    option = name.replace("_", "-")
                    have = "+".join(config.anchors) or "none"
                    raise ConfigError(f"--{option} needs {kind} anchors, but the policy has {have}.")
        if "SEL" in config.anchors:
            scorer(config.scorer)
        return config

    def given(self) -> list[str]:
        """The options of this group that were given, as they are written."""
        named = {"pinned": "pin"}
        return [
            "--" + named.get(field.name, field.name).replace("_", "-")
            for field in fields(self) if getattr(self, field.name) is not None
        ]


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is written."""

    temperature: Annotated[float, _option("--temperature", panel=_SAMPLING, help="0 takes the likeliest token.")] = 0.0
    top_k: Annotated[int, _option("--top-k", panel=_SAMPLING, help="Draw from the k likeliest; 0 is off.")] = 0
    top_p: Annotated[float, _option("--top-p", panel=_SAMPLING, help="Draw from this share of probability.")] = 1.0
    seed: Annotated[int, _option("--seed", panel=_SAMPLING, min=0, help="Of the random draws.")] = 0
    max_tokens: Annotated[int, _option("--max-tokens", panel=_SAMPLING, min=1, help="Longest answer.")] = 128
    repetition_penalty: Annotated[float, _option(
        "--repetition-penalty", panel=_SAMPLING, help="Above 1 makes repeating less likely.")] = 1.0

    def sampling(self) -> Sampling:
        """Raises ConfigError for a value out of range."""
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed,
            repetition_penalty=self.repetition_penalty,
        )


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command declare a parameter of an option dataclass: its fields become options of the command line."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in groups:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        group = groups[parameter.name]
        kinds = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[field.name],
            ))
    order = sorted(parameters, key=lambda parameter: parameter.kind)

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    wrapper.__signature__ = inspect.Signature(order)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in order}
    return wrapper


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(kind.strip().upper() for kind in text.split(",") if kind.strip())
    if not kinds:
        raise ConfigError("--anchors is empty; name EP, AC, SEL, several of them (EP,SEL), or none.")
    return () if kinds == ("NONE",) else kinds


def _budget(text: str) -> int | Literal["window"] | None:
    if text.strip().lower() == "none":
        return None
    if text.strip().lower() == "window":
        return "window"
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--cell-budget takes a number of cells, 'window' or 'none' (got {text!r}).") from None
