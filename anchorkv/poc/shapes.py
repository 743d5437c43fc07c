"""Where a `ModelShape` comes from: the list of known models, a folder, a GGUF file or a hub id, or a loaded model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path

from anchorkv.catalog import Entry, describe
from anchorkv.engines.base import ModelInfo
from anchorkv.errors import ModelError
from anchorkv.poc.capacity import CapacityInputs, ModelShape, chosen_reduction, rows
from anchorkv.poc.results import Capacity

_F16 = 2
_SLIDING = "sliding_attention"
_WITH_CELLS = ("full_attention", _SLIDING, "chunked_attention", "attention")


@cache
def known() -> tuple[ModelShape, ...]:
    """The models of shapes.yaml, small ones first. Raises ModelError when pyyaml is missing."""
    try:
        import yaml
    except ImportError:
        raise ModelError("The list of known models needs pyyaml: pip install 'anchorkv[poc]'.") from None
    text = files("anchorkv.poc").joinpath("shapes.yaml").read_text(encoding="utf-8")
    return tuple(ModelShape(**fields) for fields in yaml.safe_load(text))


def find(name: str, weights: int = 0) -> ModelShape:
    """The model called `name` in the list (by its name or its hub id), else the folder, GGUF file or hub id.

    weights: bytes of its weights where they are known better. Raises ModelError with names that are alike.
    """
    wanted = _plain(name)
    for shape in known():
        if wanted in (_plain(shape.name), _plain(shape.source), _plain(shape.source.rpartition("/")[2])):
            return _weighing(shape, weights)
    entry = describe(name)
    if not entry.problem and not entry.cell_bytes:
        _fetch_config(name)
        entry = describe(name)
    if not entry.cell_bytes:
        raise ModelError(_unknown(name, entry))
    return of_entry(entry, weights)


def of_entry(entry: Entry, weights: int = 0) -> ModelShape:
    """What `catalog.describe` knows of a model that is not loaded; see `find`. Raises ModelError without a size."""
    if not (weights or entry.weight_bytes):
        raise ModelError(f"How large the weights of {entry.name} are is not known; give their size, as in 16GB.")
    folder = _folder(entry.spec)
    kinds = _layer_kinds(folder) if folder else {}
    every = max(1, entry.layers)
    layers = every - kinds.pop("without", 0)
    return ModelShape(
        name=entry.name, layers=layers, numbers=entry.cell_bytes // _F16 * layers // every, window=entry.window,
        weight_bytes=weights or entry.weight_bytes, source=entry.spec, hybrid=layers < every, **kinds,
    )


def of_info(info: ModelInfo, weights: int) -> ModelShape:
    """A loaded model, from what its engine says. weights: bytes of its file or files."""
    return ModelShape(
        name=info.name, layers=info.layers, kv_heads=info.kv_heads, head_dim=info.head_dim, window=info.window,
        weight_bytes=weights, source="engine",
    )


def capacity(inputs: CapacityInputs, own: ModelShape | None = None, measured: float | None = None) -> Capacity:
    """The report's part: rows for `own` and for the models that `inputs` names, and all that its page may choose from.

    measured: reduction with recall off. Raises ModelError for a model that nothing is known of.
    """
    shown = _by_name([own] if own else [], map(find, inputs.models))
    taken = CapacityInputs(**{**inputs.model_dump(), "reduction": chosen_reduction(inputs, measured)})
    return Capacity(
        inputs=taken.model_dump(), models=tuple(shape.model_dump() for shape in _by_name(shown, known())),
        rows=rows(taken, shown),
    )


def _by_name(*groups: Iterable[ModelShape]) -> list[ModelShape]:
    """All of them in order; of several with one name the first."""
    found: dict[str, ModelShape] = {}
    for shape in chain(*groups):
        found.setdefault(shape.name, shape)
    return list(found.values())


def _weighing(shape: ModelShape, weights: int) -> ModelShape:
    return ModelShape(**{**shape.model_dump(), "weight_bytes": weights}) if weights else shape


def _plain(name: str) -> str:
    return name.casefold().replace("_", "-").replace(" ", "-")


def _unknown(name: str, entry: Entry) -> str:
    names = {_plain(shape.name): shape.name for shape in known()}
    alike = [names[found] for found in get_close_matches(_plain(name), names, n=3)] or list(names.values())
    why = entry.problem or entry.note or "Its configuration names no attention layers."
    return f"{name} is none of the known models ({', '.join(alike)}), nor can it be described: {why}"


def _fetch_config(name: str) -> None:
    """A hub model's config.json, a few kB; no weights. Raises ModelError where it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        hf_hub_download(name, "config.json")
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ModelError(
            f"The configuration of {name} cannot be had from the hub ({type(error).__name__}); name a local folder or "
            "GGUF file, or one of the known models."
        ) from None


def _folder(spec: str) -> Path | None:
    """Where the config.json of a folder or of a cached hub model lies."""
    from huggingface_hub import try_to_load_from_cache

    if Path(spec).expanduser().is_dir():
        return Path(spec).expanduser()
    found = try_to_load_from_cache(spec, "config.json") if spec.count("/") == 1 and not Path(spec).exists() else None
    return Path(found).parent if isinstance(found, str) else None


def _layer_kinds(folder: Path) -> dict[str, int]:
    """How many layers slide, how far, and how many are `without` cells, by the config.json in `folder`."""
    whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {**whole, **(whole.get("text_config") or {})}
    window, kinds = int(config.get("sliding_window") or 0), config.get("layer_types")
    if kinds is None:
        slides = window > 0 and config.get("use_sliding_window") is not False
        kinds = [_SLIDING if slides else _WITH_CELLS[0]] * int(config.get("num_hidden_layers") or 0)
    sliding = kinds.count(_SLIDING) if window else 0
    without = sum(kind not in _WITH_CELLS for kind in kinds)
    return {"without": without, "sliding_layers": sliding, "sliding_window": window if sliding else 0}
