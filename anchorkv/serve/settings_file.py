"""Settings as YAML: read and merged with what goes before it, and written with what each of them means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.types import ByteSize

from anchorkv.errors import ConfigError
from anchorkv.optional import library
from anchorkv.yaml_file import load_yaml

_HEAD = "# Settings of `anchorkv serve --config FILE`. Paths are relative to this file.\n"


def merged(
    path: Path | None, layers: Sequence[Mapping[str, Any]], paths: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """The file's content with `layers` over it, the last one strongest: values by dotted names, None says nothing.

    paths: settings of the file that are paths; names: those that are one where such a file is there.
    Raises ConfigError, one sentence, for a file that cannot be read.
    """
    content = {} if path is None else _read(path)
    if path is not None:
        _place(content, path.parent, paths, names)
    for layer in layers:
        for name, value in layer.items():
            if value is not None:
                group, key = _group(content, name)
                group[key] = value
    return content


def sentence(error: ValidationError, kind: type[BaseModel], path: Path | None = None) -> str:
    """What is wrong with the settings, the first of it. Never shows what was given for a secret."""
    problem = error.errors(include_url=False)[0]
    where = [str(part) for part in problem["loc"]]
    name, message = ".".join(where), problem["msg"].removeprefix("Value error, ").rstrip(".")
    place = f"{path}: " if path is not None else ""
    if problem["type"] == "extra_forbidden":
        known = _fields(kind, where[:-1])
        close = get_close_matches(where[-1], known, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"those there are: {', '.join(known)}."
        return f"{place}There is no setting '{name}'; {hint}"
    if problem["type"] == "value_error":
        return f"{place}{name + ': ' if name else ''}{message if name else message[:1].upper() + message[1:]}."
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        first = next(iter(_fields(kind, where)))
        return f"{place}'{name}' is a group of settings; write it as one, such as {name}: {{{first}: …}}."
    given = f" {problem['input']!r}" if isinstance(problem["input"], (str, int, float, bool)) else " that"
    if name == "audit.database":
        given = " what was given"  # there may be a password in it
    message = message.partition(" for <")[0]
    return f"{place}'{name}' cannot be{given[:80]} ({message[:1].lower()}{message[1:]})."


def dump(settings: BaseModel) -> str:
    """YAML, every setting behind its description, secrets left out."""
    yaml = library("yaml", "settings")
    return _HEAD + "\n".join(_lines(settings, yaml, "")) + "\n"


def _lines(settings: BaseModel, yaml: Any, indent: str) -> Iterator[str]:
    given = settings.model_dump(mode="json")
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            said = field.description or (type(value).__doc__ or "").strip().splitlines()[0].rstrip(".")
            yield f"{indent}# {said[:1].lower()}{said[1:]}"
            yield f"{indent}{name}:"
            yield from _lines(value, yaml, indent + "  ")
            continue
        if field.description:
            yield f"{indent}# {' '.join(field.description.split())}"
        shown = None if isinstance(value, SecretStr) else _size(value) if isinstance(value, ByteSize) else given[name]
        text = yaml.safe_dump(
            [shown], allow_unicode=True, default_flow_style=True, width=float("inf"), sort_keys=False
        )
        yield f"{indent}{name}: {text.strip()[1:-1]}"


def _size(value: int) -> str | int:
    """In the largest unit that says it exactly."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value and value % size == 0:
            return f"{value // size}{unit}"
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path, "settings")
    except FileNotFoundError:
        raise ConfigError(f"There are no settings at {path}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"The settings {path} cannot be read ({why}).") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"{path} holds no settings; write some such as `port: 8080`.")
    return content


def _place(content: dict[str, Any], folder: Path, paths: Sequence[str], names: Sequence[str]) -> None:
    """What the file says relative to itself."""
    for name in (*paths, *names):
        group: Any = content
        *groups, key = name.split(".")
        for part in groups:
            group = group.get(part) if isinstance(group, dict) else None
        if isinstance(group, dict) and isinstance(group.get(key), str):
            found = folder / Path(group[key]).expanduser()
            if name in paths or found.exists():
                group[key] = str(found)


def _group(content: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Where the setting of that dotted name belongs."""
    *groups, key = name.split(".")
    for part in groups:
        inner = content.get(part)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"'{part}' holds settings of its own, such as {part}.{key}; write it as a group.")
        content[part] = content = dict(inner or {})
    return content, key


def _fields(kind: type[BaseModel], where: Sequence[str]) -> list[str]:
    """Those of the group that `where` leads to."""
    for part in where:
        field = kind.model_fields.get(part)
        inner = field.annotation if field is not None else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            kind = inner
        elif part == "tenants" and "limits" in kind.model_fields:
            return _fields(kind, ["limits"])
    return list(kind.model_fields)
