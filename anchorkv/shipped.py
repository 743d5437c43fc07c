"""What the package brings for a model: a trained adapter, and the scorer that chooses its anchors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anchorkv.engines.base import ModelInfo

FOLDER = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class Known:
    """A model by its name and its shape: fingerprints differ from quantisation to quantisation, these do not."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def is_model(self, info: ModelInfo) -> bool:
        shape = (info.layers, info.kv_heads, info.head_dim, info.vocabulary)
        return self.name in info.name and shape == (self.layers, self.kv_heads, self.head_dim, self.vocabulary)


KNOWN = (Known("SmolLM2-135M-Instruct", layers=30, kv_heads=3, head_dim=64, vocabulary=49152),)


def scorer_path(info: ModelInfo) -> Path | None:
    """The scorer that was trained for this model, None where there is none."""
    if info.scorer:
        return Path(info.scorer)
    for known in KNOWN:
        path = FOLDER / known.name / "scorer.safetensors"
        if known.is_model(info) and path.is_file():
            return path
    return None


def adapter_folder(name: str) -> Path | None:
    """The adapter that the package brings for the model `name`, None where there is none."""
    folder = FOLDER / name
    return folder if (folder / "adapter_model.safetensors").is_file() else None
