"""Find, check and open a transformers model: hub id, local folder or GGUF file. Every failure is one ModelError."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from anchorkv.engines.torch_model import DTYPES
from anchorkv.engines.torch_tokenizer import TorchTokenizer
from anchorkv.errors import ConfigError, ModelError
from anchorkv.ggufheader import read_header

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load(
    spec: str | Path, *, device: str | None = None, dtype: str | None = None, adapter: str | Path | None = None
) -> tuple[Any, TorchTokenizer, str]:
    """(model, tokenizer, name) of a hub id, a local folder or a GGUF file.

    device: "cpu" or "cuda"; None takes CUDA where there is one.
    dtype: "fp32", "bf16" or "fp16"; None takes what the device computes fast (see `best_dtype`).
    adapter: a PEFT folder or hub id, applied unmerged; its own tokenizer, if any, replaces the model's.
    Raises ModelError when the model cannot be found, read or anchored; ConfigError for an unknown device or dtype.
    """
    place = _device(device)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"There is no dtype '{dtype}'; choose one of {', '.join(DTYPES)}.")
    source, options, name = _source(str(spec))
    with _quiet():
        with _one_sentence(name):
            config = AutoConfig.from_pretrained(source, **options)
        _check_decoder(config, name)
        with _one_sentence(name):
            tokenizer = AutoTokenizer.from_pretrained(source, config=config, **options)
        with _one_sentence(name):
            model, found = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=DTYPES[dtype] if dtype else best_dtype(place), output_loading_info=True,
                **options,
            )
        missing = sorted(found["missing_keys"])
        if missing:
            raise ModelError(f"The model '{name}' is incomplete: {missing[0]} and perhaps others are missing.")
        if "gguf_file" in options:
            _restore_pre_tokenizer(tokenizer, Path(source) / options["gguf_file"])
        if adapter is not None:
            model, tokenizer = _with_adapter(model, tokenizer, str(adapter))
    generation = getattr(model, "generation_config", None)
    return model.to(place), TorchTokenizer(tokenizer, getattr(generation, "eos_token_id", None)), name


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware computes in it, else fp32: without the instructions bf16 is several times slower."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    able = torch.cpu.get_capabilities()
    native = any(able.get(key, False) for key in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
    return torch.bfloat16 if native else torch.float32


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"There is no device '{name}'; choose cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("There is no CUDA device that this PyTorch can use; choose cpu.")
    return device


def _source(spec: str) -> tuple[str, dict[str, Any], str]:
    """(what from_pretrained takes, its options, a short name) for `spec`."""
    path = Path(spec).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file; give a GGUF file, a model folder or a hub id.")
        read_header(path)  # finds a truncated file at once, before anything is converted
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}, path.stem
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"The folder {path} has no config.json, so it is not a transformers model.")
        if not any((path / file).is_file() for file in TOKENIZER_FILES):
            raise ModelError(f"The folder {path} has no tokenizer (tokenizer.json or the like).")
        return str(path), {"local_files_only": True}, path.name
    if spec.startswith(("/", ".", "~")) or spec.count("/") > 1 or path.suffix == ".gguf":
        raise ModelError(f"There is no model at {path}.")
    return spec, {}, spec


def _check_decoder(config: Any, name: str) -> None:
    """Refuse what is not a decoder-only language model."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"The model '{name}' ({config.model_type}) is an encoder-decoder, not decoder-only.")
    decoder = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    architectures = config.architectures or [decoder]
    # BERT and its like have a decoder class too; what the weights were saved as decides.
    if decoder is None or not known.intersection(architectures):
        kind = ", ".join(map(str, architectures))
        raise ModelError(f"The model '{name}' ({kind}) is not a decoder-only language model.")


def _with_adapter(model: Any, tokenizer: Any, adapter: str) -> tuple[Any, Any]:
    """The model with a PEFT adapter's layers in place (unmerged), and the adapter's tokenizer when it has one."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError("An adapter needs peft: pip install peft.") from None
    folder = Path(adapter).expanduser()
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise ModelError(f"The folder {folder} has no adapter_config.json, so it is not an adapter.")
    with _one_sentence(adapter):
        if any((folder / file).is_file() for file in TOKENIZER_FILES):
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        return PeftModel.from_pretrained(model, adapter).get_base_model(), tokenizer


def _restore_pre_tokenizer(tokenizer: Any, path: Path) -> None:
    """Split text into words as the GGUF file says.

    transformers reads a GPT-2 vocabulary from GGUF but not `tokenizer.ggml.pre`, so that SmolLM's "\\n\\n1" would be
    cut otherwise than in training: its kind takes every digit apart first.
    """
    kind = read_header(path).fields.get("tokenizer.ggml.pre")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    if kind in ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"):
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    elif kind in WORDS:
        first = pre_tokenizers.Split(Regex(WORDS[kind]), "isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        return
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, last])


_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {"qwen2": _WORD.format(digits=""), "llama-bpe": _WORD.format(digits="{1,3}")}
"""How these GGUF vocabularies cut words: the regular expressions of Qwen 2 and Llama 3."""


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings from the library while it loads; our errors say what matters."""
    # The bar of the GGUF reader has no switch; it writes to whatever standard error is at the time.
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turn whatever the libraries raise into a ModelError that says what to do."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the readers raise everything from KeyError to RuntimeError on damaged files
        if Path(name).suffix or Path(name).exists() or "/" not in name:
            hint = "it is damaged, truncated or of an unknown kind"
        else:
            hint = "a local folder or a GGUF file works without the hub"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ModelError(f"The model '{name}' cannot be loaded ({reason}): {hint}.") from None
