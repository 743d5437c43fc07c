"""What is to be evaluated: task names from the command line, or a YAML file that combines tasks with their options.

    model: null                 # built-in
    policies: [default, "default:reduction=24", window, base]
    data: ../shared/data        # paths are relative to the file
    limit: 20
    tasks:
      perplexity: {length: 4096}
      reading: {passages: [1, 21]}

A task is a frozen dataclass whose fields are its options. An unknown one, or a value of another type, is one sentence.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from anchorkv.config import AnchorConfig
from anchorkv.errors import ConfigError
from anchorkv.evaluate.run import Task
from anchorkv.evaluate.ways import FULL, WINDOW, Way, ways
from anchorkv.models import EngineName
from anchorkv.yaml_file import load_yaml

TASKS = {
    "perplexity": "anchorkv.evaluate.tasks.perplexity:Perplexity",
    "qa": "anchorkv.evaluate.tasks.qa:QA",
    "reading": "anchorkv.evaluate.tasks.reading:Reading",
    "needle": "anchorkv.evaluate.tasks.needle:Needle",
    "icl": "anchorkv.evaluate.tasks.icl:ICL",
    "speed": "anchorkv.evaluate.tasks.speed:Speed",
    "sessions": "anchorkv.evaluate.tasks.sessions:Sessions",
}
"""name -> "module:class", imported when it is asked for."""
POLICIES = (FULL, WINDOW, "default")
"""Where none is named, and the task's class has no `policies` of its own."""
SHARED = ("data", "limit", "seed", "skip_bad_rows")
"""Options of the plan that go to every task that has them, where it was given none of its own."""
YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Plan:
    """Tasks by name with the options given to each, and what they share; None where nothing was given."""

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    policies: tuple[str, ...] = ()
    model: str | None = None
    engine: EngineName | None = None
    threads: Annotated[int, Field(ge=1)] | None = None
    data: Path | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    skip_bad_rows: bool | None = None
    out: Path | None = None

    @classmethod
    def of(cls, words: Sequence[str]) -> Plan:
        """words: task names, each with options behind a colon where wanted ("perplexity:length=2048,first=256", as
        policies are written), or the name of one YAML file. Raises ConfigError for what is neither."""
        plans = [word for word in words if word.lower().endswith(YAML)]
        if plans:
            if len(words) > 1:
                raise ConfigError(f"A plan is evaluated alone; leave out everything but {plans[0]}.")
            return cls._load(Path(plans[0]).expanduser())
        tasks: dict[str, dict[str, Any]] = {}
        for word in words:
            name, _, options = word.partition(":")
            if name in tasks:
                raise ConfigError(f"The task {name} is named twice; name it once.")
            kind = _task_class(name)
            tasks[name] = _checked(kind, _parsed(word, options, _hints(kind)), name, Path())
        return cls(tasks)

    @classmethod
    def _load(cls, path: Path) -> Plan:
        content = {key: value for key, value in _yaml(path).items() if value is not None}
        named = content.pop("tasks", None)
        if isinstance(named, list) and all(isinstance(name, str) for name in named):
            named = dict.fromkeys(named)
        if not isinstance(named, dict) or not named:
            raise ConfigError(f"{path} has no tasks; name some under `tasks:` ({', '.join(TASKS)}).")
        found = _checked(cls, content, "The plan", path.parent)
        if (model := found.get("model")) and (path.parent / model).exists():
            found["model"] = str(path.parent / model)
        for name, options in named.items():
            kind = _task_class(name)
            if not isinstance(options, dict | None):
                raise ConfigError(f"The options of {name} are written as {{name: value}}, not as {options!r}.")
            found.setdefault("tasks", {})[name] = _checked(kind, options or {}, name, path.parent)
        return cls(**found)

    def changed(self, **given: Any) -> Plan:
        """What is not None in `given` goes before what the plan says."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def make(self) -> list[Task]:
        """The tasks, in their order. Raises ConfigError when options do not fit together."""
        made = []
        for name, options in self.tasks.items():
            kind = _task_class(name)
            shared = {key: getattr(self, key) for key in SHARED if key in _hints(kind)}
            shared = {key: value for key, value in shared.items() if value is not None}
            made.append(kind(**{**shared, **options}))
        return made

    def ways(self, task: Task, own: AnchorConfig | None = None) -> list[Way]:
        """The ways that `task` compares. own: the model's own policy. Raises ConfigError for a policy that fits
        nothing, and for one without the adapter of a model that has none to leave out."""
        names = self.policies or getattr(task, "policies", POLICIES)
        found = ways(names, own)
        if self.model is None:
            return found
        without = [way.name for way in found if not way.adapter]
        if self.policies and without:
            raise ConfigError(
                f"'{without[0]}' means the built-in model without its adapter; leave it out, or leave out --model."
            )
        return [way for way in found if way.adapter]


def _task_class(name: str) -> Any:
    if name not in TASKS:
        raise ConfigError(f"There is no task '{name}'; choose among {', '.join(TASKS)}, or name a plan (.yaml).")
    module, _, kind = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), kind)


def _hints(kind: Any) -> dict[str, Any]:
    """The options of a dataclass, and their types."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields(kind) if f.init and f.name != "name"}


def _checked(kind: Any, given: dict[str, Any], title: str, folder: Path) -> dict[str, Any]:
    """`given` as values of the fields of dataclass `kind`, paths relative to `folder`.

    Raises ConfigError, one sentence, for what is unknown or of another type.
    """
    known = _hints(kind)
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{title} has no option '{name}'; its options are {', '.join(known)}.")
        try:
            # JSON knows neither tuples nor paths, so that strict types can be asked of everything else.
            checked = TypeAdapter(known[name]).validate_json(json.dumps(value), strict=True)
        except (ValidationError, TypeError) as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it is no plain value"
            raise ConfigError(
                f"{title}: '{name}' cannot be {value!r} ({problem[0].lower()}{problem[1:]}); its options are "
                f"{', '.join(known)}."
            ) from None
        found[name] = _placed(checked, folder)
    return found


def _parsed(word: str, options: str, hints: dict[str, Any]) -> dict[str, Any]:
    """What stands behind the colon of `word`: values are JSON, or words; several are joined by "+"."""
    found: dict[str, Any] = {}
    for part in filter(None, options.split(",")):
        name, equals, text = part.partition("=")
        if not equals:
            raise ConfigError(f"In '{word}', '{part}' is no option=value; the options are {', '.join(hints)}.")
        if get_origin(hints.get(name)) is tuple:
            found[name] = [_value(one) for one in text.split("+")]
        else:
            found[name] = _value(text)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return folder / value.expanduser()
    return tuple(_placed(part, folder) for part in value) if isinstance(value, tuple) else value


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path, "plans")
    except FileNotFoundError:
        raise ConfigError(f"There is no plan at {path}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The plan {path} cannot be read ({type(error).__name__}); save it as UTF-8 text.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no plan; write `tasks:` and, under it, {', '.join(TASKS)}.")
    return content
