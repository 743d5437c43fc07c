"""What a transformers model is made of, as far as anchoring asks; refuses what cannot be anchored."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import Any

import torch

from anchorkv.errors import ModelError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FULL, SLIDING = "full_attention", "sliding_attention"


def fingerprint(model: Any) -> str:
    """sha256 over the configuration and, of every tensor, its name, shape, first and middle 4 KiB."""
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "quantization_config", "use_cache"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat, size = tensor.detach().reshape(-1), max(1, 4096 // tensor.element_size())
        for first in (0, len(flat) // 2):
            digest.update(flat[first : first + size].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def layer_kinds(config: Any) -> list[str]:
    """The attention type of every layer. Raises ModelError for those that keep no cells or cut them otherwise."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) is not None
        kinds = [SLIDING if windowed else FULL] * config.num_hidden_layers
        if getattr(config, "attention_chunk_size", None) is not None:
            kinds = ["chunked_attention"]
    strange = sorted(set(kinds) - {FULL, SLIDING})
    if strange:
        raise ModelError(
            f"The model ({config.model_type}) has {', '.join(strange)} layers; anchors need full or sliding attention "
            "in every layer."
        )
    return list(kinds)


CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What forwards call their cache: transformers 5.24 renamed the second to the first."""


def cache_argument(accepted: frozenset[str]) -> str:
    """Which of CACHE_ARGUMENTS is among `accepted`; the older name where none is."""
    return next((name for name in CACHE_ARGUMENTS if name in accepted), CACHE_ARGUMENTS[-1])


def check_arguments(model: Any) -> frozenset[str]:
    """Names of the arguments that `model.forward` takes. Raises ModelError where one is missing that anchors need."""
    accepted = frozenset(inspect.signature(model.forward).parameters)
    needed = ("attention_mask", "position_ids", cache_argument(accepted))
    missing = [name for name in needed if name not in accepted]
    if missing:
        lacks = " and no ".join(missing)
        raise ModelError(f"The model ({type(model).__name__}) takes no {lacks}, so it cannot be anchored.")
    return accepted


def rope_types(config: Any) -> set[str]:
    rope = getattr(config, "rope_parameters", None) or {}
    groups = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return {str(group.get("rope_type", "default")) for group in groups}
