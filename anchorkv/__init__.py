"""anchorkv: language models that keep each sentence's anchors in the KV cache and free the rest."""

from anchorkv.config import PRESETS, AnchorConfig, preset
from anchorkv.document import Answer, Document
from anchorkv.errors import AnchorKVError
from anchorkv.models import Model, load
from anchorkv.sampling import Sampling

__version__ = "0.1.0"
__all__ = [
    "PRESETS", "AnchorConfig", "AnchorKVError", "Answer", "Document", "Model", "Sampling", "load", "preset",
]
