"""A PEFT LoRA adapter folder as numpy arrays: what it changes in which matrix. Needs safetensors, no torch.

Only what can be added to the weights once and for all is taken; anything else in the folder is refused, for a merged
model that quietly lacks a part of its training looks like a working one.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize

from anchorkv.engines.base import Floats, Ints
from anchorkv.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_REFUSED = {
    "use_dora": "DoRA magnitudes", "modules_to_save": "whole trained modules (modules_to_save)",
    "layer_replication": "replicated layers", "lora_bias": "trained biases", "use_qalora": "QALoRA layers",
    "alora_invocation_tokens": "an adapter that is switched on by a phrase (aLoRA)",
    "target_parameters": "LoRA of bare parameters (target_parameters)", "megatron_config": "Megatron layers",
}
"""Options of adapter_config.json that mean more than adding B @ A, and what to call them."""
_REBASING = ("pissa", "olora", "corda", "loftq")
"""Ways of starting a LoRA that change the base's weights too, so that B @ A does not belong to the base as it is."""
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_KEY = re.compile(
    r"base_model\.model\.(?P<module>[\w.]+?)\.(?P<part>"
    r"lora_[AB]\.weight|lora_embedding_[AB]|token_adapter\.trainable_tokens_delta|(base_layer\.)?weight)"
)


@dataclass(frozen=True)
class Change:
    """What becomes of one matrix W [rows, columns]: (whole or W) + left @ right, then rows `ids` become `values`."""

    left: Floats | None = None
    """[rows, r], the scale in it."""
    right: Floats | None = None
    """[r, columns]."""
    whole: Floats | None = None
    """[rows, columns]: PEFT saves an embedding that LoRA targets along with the adapter."""
    ids: Ints | None = None
    values: Floats | None = None
    """[ids, columns]."""

    @property
    def shape(self) -> tuple[int | None, int]:
        """(rows, columns) of the matrix that this fits; rows None where trained tokens leave them open.

        Raises ValueError where its own parts do not fit together.
        """
        shapes: set[tuple[int, int]] = set()
        if self.left is not None and self.right is not None:
            shapes.add((self.left.shape[0], self.right.shape[1]))
        if self.whole is not None:
            shapes.add((self.whole.shape[0], self.whole.shape[1]))
        columns = {shape[1] for shape in shapes} | ({self.values.shape[1]} if self.values is not None else set())
        if len(shapes) > 1 or len(columns) != 1:
            raise ValueError("its parts have different shapes")
        return (shapes.pop()[0] if shapes else None), columns.pop()


def read_adapter(folder: Path) -> dict[str, Change]:
    """What the adapter in `folder` changes, by the module's name in transformers ("model.layers.0.mlp.up_proj").

    Raises ModelError, one sentence, for what is missing, damaged, inconsistent, or more than LoRA and trained tokens.
    """
    config = _config(folder)
    changes: dict[str, Change] = {}
    found: dict[str, dict[str, Floats]] = {}
    for key, array in sorted(_arrays(folder / WEIGHTS).items()):
        match = _KEY.fullmatch(key)
        module, part = (match["module"], match["part"]) if match else ("", "")
        if not module or (part.endswith("weight") and "lora" not in part and _leaf(module) not in EMBEDDINGS):
            raise ModelError(f"The adapter {folder} holds '{key}', which cannot be merged: only LoRA and trained "
                             "tokens can.")
        found.setdefault(module, {})[part] = array
    if not found:
        raise ModelError(f"The adapter {folder} is empty: {WEIGHTS} holds no weights.")
    for module, parts in found.items():
        try:
            changes[module] = _change(module, parts, config)
            _ = changes[module].shape
        except (KeyError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ModelError(f"The adapter {folder} does not fit together at {module}: {reason}.") from None
    return changes


EMBEDDINGS = ("embed_tokens", "lm_head")


def _change(module: str, parts: dict[str, Floats], config: dict[str, Any]) -> Change:
    """Raises KeyError, TypeError, ValueError, ZeroDivisionError or re.error where things do not fit."""
    change = Change(whole=parts.get("base_layer.weight", parts.get("weight")))
    for kind in ("lora_{}.weight", "lora_embedding_{}"):
        if kind.format("A") in parts or kind.format("B") in parts:
            a, b = parts[kind.format("A")], parts[kind.format("B")]
            rank, scale = _rank_and_scale(module, config)
            if a.shape[0] != rank or b.shape[1] != rank:
                raise ValueError(f"its LoRA matrices are {a.shape} and {b.shape}, not of rank {rank}")
            # An embedding is looked up by rows, so PEFT transposes what it adds to one.
            left, right = (a.T, b.T) if "embedding" in kind else (b, a)
            change = replace(change, left=left * np.float32(scale), right=right)
    if "token_adapter.trainable_tokens_delta" in parts:
        ids = np.asarray(_trained_ids(module, config), dtype=np.int64)
        values = parts["token_adapter.trainable_tokens_delta"]
        if len(ids) != len(values) or len(set(ids.tolist())) != len(ids) or (ids < 0).any():
            raise ValueError(f"it has {len(values)} trained tokens, but trainable_token_indices names others")
        change = replace(change, ids=ids, values=values)
    return change


def _rank_and_scale(module: str, config: dict[str, Any]) -> tuple[int, float]:
    rank = int(_by_pattern(config.get("rank_pattern"), module, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """As PEFT does: a key is the end of a module's name, or a regular expression for it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _trained_ids(module: str, config: dict[str, Any]) -> Any:
    named = config["trainable_token_indices"]
    if not isinstance(named, dict):
        return named
    for name, ids in named.items():
        if f".{module}".endswith(f".{name}"):
            return ids
    raise ValueError("trainable_token_indices does not name it")


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"There is no adapter folder at {folder}.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        raise ModelError(f"The folder {folder} has no {CONFIG}, so it is not an adapter.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG} cannot be read ({error}).") from None
    if config.get("peft_type") != "LORA":
        raise ModelError(f"The adapter {folder} is of the kind {config.get('peft_type')}; only LORA can be merged.")
    for option, what in _REFUSED.items():
        if config.get(option):
            raise ModelError(f"The adapter {folder} has {what}, which cannot be merged: only LoRA and trained tokens "
                             "can.")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_REBASING):
        raise ModelError(f"The adapter {folder} was started with {start}, which changes the base too; save it with "
                         "path_initial_model_for_weight_conversion.")
    return config


def _arrays(path: Path) -> dict[str, Floats]:
    """The tensors of a safetensors file as float32; numpy's own loader knows no bf16."""
    try:
        found = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        arrays = {name: _array(entry) for name, entry in found}
    except FileNotFoundError:
        raise ModelError(f"The folder {path.parent} has no {path.name}; save the adapter as safetensors.") from None
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path} is damaged or truncated ({error}).") from None
    for name, array in arrays.items():
        if array.ndim != 2:
            raise ModelError(f"{path} holds '{name}' of shape {array.shape}, which cannot be merged.")
        if not np.isfinite(array).all():
            raise ModelError(f"{path} holds values that are no finite numbers in '{name}'.")
    return arrays


def _array(entry: dict[str, Any]) -> Floats:
    data, kind = entry["data"], entry["dtype"]
    if kind == "BF16":
        array: npt.NDArray[Any] = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif kind in _DTYPES:
        array = np.frombuffer(data, _DTYPES[kind]).astype(np.float32)
    else:
        raise ValueError(f"weights of type {kind}")
    return array.reshape(entry["shape"])
