"""Which models can be loaded, and what their caches cost; described without loading weights."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anchorkv.errors import ModelError
from anchorkv.ggufheader import read_header
from anchorkv.models import DEFAULT, builtin

_F16_BYTES = 2
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


@dataclass(frozen=True)
class Entry:
    """One model. `spec`: what --model takes; `problem`: why it cannot be used; `note`: what else to know."""

    name: str
    spec: str
    architecture: str = ""
    layers: int = 0
    window: int = 0
    weights: str = ""
    weight_bytes: int = 0
    cell_bytes: int = 0
    """Keys and values of one token in all layers, as f16."""
    engines: tuple[str, ...] = field(default=())
    problem: str = ""
    note: str = ""

    @property
    def full_bytes(self) -> int:
        """KV bytes of a full cache as long as the window."""
        return self.cell_bytes * self.window

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "full_bytes": self.full_bytes}


def describe(spec: str) -> Entry:
    """What `spec` (GGUF file, folder or hub id) is. Never raises: what is wrong is in `problem`."""
    path = Path(spec).expanduser()
    try:
        if path.is_dir():
            return _folder(path, path.name or str(path), spec)
        if path.is_file():
            return _gguf(path, spec)
        if spec == DEFAULT:
            return _builtin()
        if path.suffix.lower() != ".gguf" and spec.count("/") == 1 and not spec.startswith((".", "~", "/")):
            return _hub(spec)
        raise ModelError(f"There is no file or folder at {path}.")
    except ModelError as error:
        return Entry(name=path.name or spec, spec=spec, problem=str(error))


def find(search: Iterable[Path] = ()) -> Iterator[Entry]:
    """The built-in model, and what is in the current folder, in `search` (with all it holds) and the hub's cache."""
    yield _builtin()
    seen: set[Path] = set()
    here = Path()
    places = [*here.glob("*.gguf"), *(config.parent for config in here.glob("*/config.json"))]
    for folder in search:
        if not folder.expanduser().is_dir():
            yield Entry(name=str(folder), spec=str(folder), problem=f"There is no folder at {folder}.")
        places += folder.expanduser().rglob("*.gguf")
        places += (config.parent for config in folder.expanduser().rglob("config.json"))
    for path in sorted(places):
        if path.resolve() not in seen and not _is_later_part(path):
            seen.add(path.resolve())
            yield describe(str(path))
    yield from _cached(seen)


def _builtin() -> Entry:
    try:
        path = builtin()
    except ModelError as error:
        return Entry(name=f"{DEFAULT} (built in)", spec="", problem=str(error))
    entry = describe(str(path))
    return Entry(**{**asdict(entry), "name": f"{DEFAULT} (built in)", "spec": ""})


def _cached(seen: set[Path]) -> Iterator[Entry]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return
    for repository in sorted(repositories, key=lambda found: found.repo_id):
        revisions = sorted(repository.revisions, key=lambda found: found.last_modified, reverse=True)
        if repository.repo_type != "model" or not revisions:
            continue
        snapshot = revisions[0].snapshot_path
        for path in sorted(snapshot.rglob("*.gguf")):
            if path.resolve() not in seen and not _is_later_part(path):
                seen.add(path.resolve())
                yield describe(str(path))
        if (snapshot / "config.json").is_file():
            yield _folder_or_problem(snapshot, repository.repo_id)


def _hub(spec: str) -> Entry:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(spec, "config.json")
    except HFValidationError:
        raise ModelError(f"There is no file or folder at {spec}, and it is no hub id.") from None
    if isinstance(found, str):
        return _folder(Path(found).parent, spec, spec)
    return Entry(name=spec, spec=spec, engines=_torch(), note="not in the cache; downloaded when it is loaded")


def _folder_or_problem(path: Path, name: str) -> Entry:
    try:
        return _folder(path, name, name)
    except ModelError as error:
        return Entry(name=name, spec=name, problem=str(error))


def _is_later_part(path: Path) -> bool:
    """Whether this is the second or a later file of a split GGUF ("…-00002-of-00003.gguf")."""
    parts = path.stem.rsplit("-", 3)
    return len(parts) == 4 and parts[2] == "of" and parts[1].isdigit() and int(parts[1]) > 1


def _gguf(path: Path, spec: str) -> Entry:
    header = read_header(path)
    layers = _integer(header.of_architecture("block_count"))
    heads = header.of_architecture("attention.head_count", 0)
    kv_heads = header.of_architecture("attention.head_count_kv", heads)
    queries = max(heads) if isinstance(heads, list) else _integer(heads)
    # Some architectures give one number of KV heads a layer.
    per_layer = sum(kv_heads) if isinstance(kv_heads, list) else layers * _integer(kv_heads)
    default = _integer(header.of_architecture("embedding_length")) // queries if queries else 0
    sizes = [_integer(header.of_architecture(f"attention.{part}_length", default)) for part in ("key", "value")]
    problem = "" if per_layer else f"{path} has no attention layers whose cells could be freed."
    if header.of_architecture("attention.sliding_window"):
        problem = f"{path} has sliding-window layers, whose cells llama.cpp drops by itself; use the torch engine."
    if header.fields.get("general.type") not in (None, "model"):
        problem = f"{path} is a {header.fields['general.type']}, not a language model."
    return Entry(
        name=path.stem, spec=spec, architecture=str(header.fields.get("general.architecture", "")), layers=layers,
        window=_integer(header.of_architecture("context_length")), weights=_quantisation(header.types),
        weight_bytes=header.size, cell_bytes=per_layer * sum(sizes) * _F16_BYTES, engines=("llama", *_torch()),
        problem=problem,
    )


def _quantisation(types: dict[int, int]) -> str:
    """The name of the type that most tensors have; norms are always F32 and do not count beside others."""
    from gguf.constants import GGMLQuantizationType

    others = {kind: tensors for kind, tensors in types.items() if kind != GGMLQuantizationType.F32} or types
    if not others:
        return ""
    kind = max(others, key=lambda kind: others[kind])
    try:
        return str(GGMLQuantizationType(kind).name)
    except ValueError:
        return f"type {kind}"


def _folder(path: Path, name: str, spec: str) -> Entry:
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"The folder {path} has no config.json, so it holds no model.")
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        config = {**whole, **(whole.get("text_config") or {})}
        heads = _first(config, "num_attention_heads", "n_head")
        kv_heads = _first(config, "num_key_value_heads") or heads
        layers = _first(config, "num_hidden_layers", "n_layer", "num_layers")
        head_dim = _first(config, "head_dim") or (_first(config, "hidden_size", "n_embd") // heads if heads else 0)
        window = _first(config, "max_position_embeddings", "n_positions", "n_ctx")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} cannot be understood ({error}).") from None
    weights = [file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in path.glob(kind)]
    problem = ""
    if whole.get("is_encoder_decoder"):
        problem = "It is an encoder-decoder; anchors need a decoder-only model."
    elif not layers or not heads:
        problem = "Its config.json names no attention layers."
    elif not weights:
        problem = "It has no weights (*.safetensors)."
    elif not any((path / name).is_file() for name in _TOKENIZERS):
        problem = "It has no tokenizer (tokenizer.json)."
    return Entry(
        name=name, spec=spec, architecture=str(whole.get("model_type", "")), layers=layers, window=window,
        weights=str(config.get("dtype") or config.get("torch_dtype") or ""), weight_bytes=sum(weights),
        cell_bytes=2 * layers * kv_heads * head_dim * _F16_BYTES, engines=_torch(), problem=problem,
        note="" if _torch() else "needs pip install 'anchorkv[torch]'",
    )


def _torch() -> tuple[str, ...]:
    installed = all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))
    return ("torch",) if installed else ()


def _first(config: dict[str, Any], *names: str) -> int:
    return next((_integer(config[name]) for name in names if config.get(name) is not None), 0)


def _integer(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else 0
