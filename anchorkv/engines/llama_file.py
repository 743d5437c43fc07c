"""GGUF files: opening one, describing it, and a faster copy where llama.cpp has no quick kernels for its weights."""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path
from typing import Any

import llama_cpp
import platformdirs

from anchorkv.engines.base import ModelInfo
from anchorkv.errors import ModelError

_SLOW = {3: "Q4_1", 9: "Q5_1"}
"""File types without batched CPU kernels in llama.cpp: their prefill is about half as fast (docs/performance.md)."""
_Q8_0 = 7
_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 12: "Q3_K_M", 14: "Q4_K_S",
    15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16",
}
_COPY_LIMIT = 1 << 30
"""Bytes; larger files are read as they are, for a Q8_0 copy takes twice the memory."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp's own log lines are not for the user's terminal."""


llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def open_model(path: Path, gpu_layers: int = -1) -> Any:
    """A loaded llama_model. Raises ModelError for a file that is missing, broken, or no decoder with attention."""
    if not path.is_file():
        raise ModelError(f"There is no model file at {path}.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file.")
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = gpu_layers if gpu_layers >= 0 else 999
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise ModelError(f"{path} cannot be loaded: it is truncated, damaged, or of a kind unknown to this llama.cpp.")
    problem = None
    if llama_cpp.llama_model_has_encoder(model) or not llama_cpp.llama_model_has_decoder(model):
        problem = "is not a decoder-only model"
    elif llama_cpp.llama_model_is_recurrent(model):
        problem = "is a recurrent model without attention cells"
    elif metadata(model, f"{metadata(model, 'general.architecture')}.attention.sliding_window"):
        problem = "has sliding-window layers, whose cells llama.cpp drops by itself; use the torch engine"
    if problem:
        llama_cpp.llama_model_free(model)
        raise ModelError(f"{path} {problem}.")
    return model


def metadata(model: Any, key: str) -> str:
    """One metadata value as text, "" where there is none."""
    buffer = ctypes.create_string_buffer(256)
    count = llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, 256)
    return buffer.value.decode("utf-8", errors="replace") if count >= 0 else ""


def describe(model: Any, path: Path, cell_bytes: int) -> ModelInfo:
    heads = llama_cpp.llama_model_n_head_kv(model)
    layers = llama_cpp.llama_model_n_layer(model)
    hidden = llama_cpp.llama_model_n_embd(model)
    architecture = metadata(model, "general.architecture")
    head_dim = metadata(model, f"{architecture}.attention.key_length")
    return ModelInfo(
        name=path.stem, architecture=architecture, layers=layers, kv_heads=heads,
        head_dim=int(head_dim) if head_dim else hidden // llama_cpp.llama_model_n_head(model), hidden_size=hidden,
        vocabulary=llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)),
        window=llama_cpp.llama_model_n_ctx_train(model), cell_bytes=cell_bytes, fingerprint=fingerprint(path),
        weights=_NAMES.get(int(metadata(model, "general.file_type") or -1), "unknown"),
    )


def fingerprint(path: Path) -> str:
    """sha256 of the file's size, its first MiB and 64 samples of 64 KiB spread over the rest: quick at any size."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        for step in range(1, 65):
            file.seek(max(0, (size - (1 << 16)) * step // 64))
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


def file_type(path: Path) -> int:
    """The GGUF's general.file_type, -1 where it has none. Raises ModelError for a broken file."""
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise ModelError(f"{path} cannot be loaded: it is truncated, damaged, or not a GGUF file.")
    try:
        return int(metadata(model, "general.file_type") or -1)
    finally:
        llama_cpp.llama_model_free(model)


def fast_copy(path: Path) -> Path:
    """`path`, or a cached Q8_0 copy of it where its own quantisation has no batched kernels.

    Q4_1 and Q5_1 values are reproduced by Q8_0 up to its own rounding, so nothing is lost that matters.
    """
    if not path.is_file() or path.stat().st_size > _COPY_LIMIT:
        return path
    folder = platformdirs.user_cache_path("anchorkv") / "weights"
    target = folder / f"{path.stem}-{fingerprint(path)[:16]}-Q8_0.gguf"
    if target.is_file():
        return target
    if file_type(path) not in _SLOW:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{target.name}.{os.getpid()}.partial"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = _Q8_0, True
        if llama_cpp.llama_model_quantize(str(path).encode(), str(partial).encode(), ctypes.byref(params)) != 0:
            partial.unlink(missing_ok=True)
            return path
        os.replace(partial, target)
    except OSError:
        return path  # no place for a copy: the file itself works too, only slower
    return target
