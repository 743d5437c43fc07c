"""A trained adapter as one GGUF file that reads without torch: its weights merged, its settings in the metadata."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchorkv.config import AnchorConfig
from anchorkv.errors import ConfigError, ModelError
from anchorkv.ggufheader import read_header

BOUNDS = {
    "F32": 1e-3, "F16": 1e-3, "BF16": 1e-3, "Q8_0": 2e-2, "Q5_1": 0.5, "Q5_0": 0.5, "Q4_1": 0.5, "Q4_0": 0.5,
}
"""What weights may be stored as, and how far the merged model may then be from the adapter: mean KL a token (nats)."""
POLICY_FILE, SCORER_FILE = "anchorkv.json", "scorer.safetensors"
_POLICY, _SCORER, _NAME = "anchorkv.policy", "anchorkv.scorer", "anchorkv.adapter"


@dataclass(frozen=True)
class Settings:
    """What a model was trained to be read with. `scorer`: the bytes of the scorer's .safetensors file."""

    policy: AnchorConfig | None
    scorer: bytes | None
    name: str


def settings_of(adapter: Path) -> Settings:
    """The settings beside an adapter's weights: anchorkv.json and scorer.safetensors, each where there is one.

    Raises ConfigError or ModelError when one of them is damaged.
    """
    policy, scorer = adapter / POLICY_FILE, adapter / SCORER_FILE
    if scorer.exists():
        from anchorkv.scorers import Learned

        Learned.load(scorer)
    try:
        return Settings(
            AnchorConfig.load(policy) if policy.exists() else None, scorer.read_bytes() if scorer.exists() else None,
            adapter.resolve().name,
        )
    except OSError as error:
        raise ModelError(f"{scorer} cannot be read ({error.strerror}).") from None


def read_settings(path: Path) -> Settings | None:
    """The settings that travel in a GGUF file, None where it has none. No tensor is read.

    Raises ModelError when the file or the settings are damaged.
    """
    fields = read_header(path).fields
    if _NAME not in fields:
        return None
    try:
        policy, scorer = fields.get(_POLICY), fields.get(_SCORER)
        return Settings(
            AnchorConfig.from_json(policy) if policy is not None else None,
            base64.b64decode(scorer, validate=True) if scorer is not None else None, str(fields[_NAME]),
        )
    except (ConfigError, binascii.Error, TypeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise ModelError(f"The settings in {path} cannot be read ({reason}); export it again.") from None


def merge(
    base: Path, adapter: Path, out: Path, kind: str = "Q8_0", settings: Settings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Merge the PEFT LoRA adapter in the folder `adapter` into the GGUF file `base`, and write `out` with its weights
    stored as `kind` (see BOUNDS). Needs no torch. `out` appears whole or not at all.

    settings: travel in the file's metadata; None leaves what the base has. progress: (bytes written, bytes in all).
    Raises ModelError, one sentence, for everything that is missing, damaged, or cannot be merged.
    """
    if kind not in BOUNDS:
        raise ModelError(f"Weights cannot be stored as {kind}; choose one of {', '.join(BOUNDS)}.")
    from anchorkv.adapter import read_adapter
    from anchorkv.gguf_merge import write_merged

    check_target(base, out)
    strings = None if settings is None else _strings(settings)
    write_merged(base, read_adapter(adapter), out, kind, strings, progress or (lambda done, total: None))


def check_target(base: Path, out: Path) -> None:
    """Raises ModelError where `out` cannot be a new file beside `base`, before any work is done."""
    try:
        folder, missing = out.is_dir(), not out.parent.is_dir()
        same = out.exists() and base.exists() and out.samefile(base)
    except OSError as error:
        raise ModelError(f"{out} cannot be written to ({error.strerror}); choose another place.") from None
    if folder:
        raise ModelError(f"{out} is a folder; name a file in it.")
    if missing:
        raise ModelError(f"There is no folder at {out.parent} to write {out.name} into.")
    if same:
        raise ModelError(f"{out} is the base itself; write to another file.")


def _strings(settings: Settings) -> dict[str, str]:
    strings = {_NAME: settings.name}
    if settings.policy is not None:
        strings[_POLICY] = settings.policy.model_dump_json()
    if settings.scorer is not None:
        strings[_SCORER] = base64.b64encode(settings.scorer).decode("ascii")
    return strings


# --- does it still say the same? -----------------------------------------------------------------------------------

TEXT = (
    "On the ninth of March the supply ship Marion Ellis left Bergen with 412 tonnes of cable, two winches and a crew "
    "of nineteen. Captain Ruth Aldous had made the crossing eleven times before; her engineer, a quiet man named Tomas "
    "Reyes, had made it once. \"If the forward pump fails again,\" he wrote in the log, \"we shall lose six hours, not "
    "two.\" It failed on the second night.\n\nThe report lists three causes:\n\n1. a worn seal in the pump's housing,\n"
    "2. salt in the control box (see section 4.2), and\n3. a sensor that read 0.0 bar whatever the pressure was.\n\n"
    "Nobody was hurt, and the cable was laid on the 21st. The company paid 86,000 kroner for repairs. It has since "
    "replaced every sensor of that type. What does the report recommend? That the seals be changed each spring, that "
    "spare boxes be kept dry below deck, and that def check(bar): return bar > 0.2 be removed from the software."
)
"""What both models read to be compared: prose, names, figures, a list, a piece of code."""
_TOKENS = 200


@dataclass(frozen=True)
class Agreement:
    """How well a merged model agrees with the adapter that was not merged, over `tokens` tokens of text."""

    tokens: int
    kl: float
    """Mean KL(unmerged || merged) a token, in nats."""
    argmax: float
    """Share of tokens after which both find the same one likeliest."""


def compare(base: Path, adapter: Path, merged: Path) -> Agreement:
    """Run the merged file in llama.cpp, and the adapter on the dequantised base in PyTorch (fp32), on the same text.

    Needs torch and peft. Raises MergedError when the merged file cannot be run, ModelError when the other side cannot.
    """
    try:
        tokens, found = _merged_logits(merged)
    except ModelError as error:
        raise MergedError(str(error)) from None
    import torch

    from anchorkv.engines.torch import TorchEngine

    engine = TorchEngine.load(base, adapter=adapter, dtype="fp32")
    with torch.no_grad():
        out = engine.model(input_ids=torch.tensor([tokens], device=engine.device)).logits[0]
    wanted = out.float().cpu().numpy()
    engine.close()
    vocabulary = min(wanted.shape[1], found.shape[1])
    p, q = (_log_softmax(logits[:, :vocabulary]) for logits in (wanted, found))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    return Agreement(len(tokens), float(kl.mean()), float((p.argmax(axis=1) == q.argmax(axis=1)).mean()))


class MergedError(ModelError):
    """The merged file cannot be run."""


def _merged_logits(path: Path) -> tuple[list[int], np.ndarray[Any, np.dtype[np.float32]]]:
    """The tokens of TEXT, and the logits [n, vocabulary] after each."""
    from anchorkv.engines.base import SURPRISE
    from anchorkv.engines.llama import LlamaEngine

    engine = LlamaEngine.load(path, weights="as-is")
    try:
        tokens = [*engine.tokenizer.start_ids(), *engine.tokenizer.encode(TEXT)][:_TOKENS]
        engine.open().decode(tokens, 0, needs=frozenset({SURPRISE}))  # computes every token's logits, in one batch
        return tokens, engine._all_logits(len(tokens)).copy()
    finally:
        engine.close()


def _log_softmax(logits: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    out: np.ndarray[Any, np.dtype[np.float64]] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return out
