"""Writing a GGUF file with an adapter merged into its weights: numpy and the gguf library, no torch.

The base's metadata is copied as bytes (the gguf writer would drop empty values), tensors go through in pieces of a few
MB on all processors, so that memory does not grow with the model.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize, quantize

from anchorkv.adapter import EMBEDDINGS, Change
from anchorkv.engines.base import Floats
from anchorkv.errors import ModelError
from anchorkv.ggufheader import Header, Tensor, read_header

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]
_Type = gguf.GGMLQuantizationType
_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16, "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1, "Q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
}
_PLAIN = (_Type.F32, _Type.F16, _Type.BF16)
_INTEGERS = (_Type.I8, _Type.I16, _Type.I32, _Type.I64, _Type.F64)
"""Never converted: these hold indices and the like, not weights."""
_ROUTER = "ffn_gate_inp.weight"
"""Chooses experts; llama.cpp never quantises it either."""
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", *EMBEDDINGS)
_INTERLEAVED = ("llama", "granite", "smollm3")
"""Architectures whose GGUF files keep the rows of q and k in the order of interleaved rotary pairs."""
_AS_IN_HF = ("gemma", "gemma2", "gemma3", "olmo2", "qwen2", "qwen3")
"""Architectures whose GGUF files keep them as transformers does."""
_ALWAYS_TIED = ("gemma", "gemma2")
"""Architectures for which llama.cpp takes no output matrix beside the embedding."""
_PIECE = 1 << 20
"""Elements converted at once."""
_TOKEN_EMBD, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class _Entry:
    """A tensor of the new file: where it comes from, what changes in it, what it is stored as."""

    name: str
    source: Tensor
    kind: gguf.GGMLQuantizationType
    change: Change | None = None

    @property
    def copied(self) -> bool:
        return self.change is None and self.source.kind == self.kind

    @property
    def columns(self) -> int:
        return self.source.shape[0] if self.source.shape else 1

    @property
    def rows(self) -> int:
        return int(np.prod(self.source.shape[1:], dtype=np.int64))

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(self.rows * self.columns // block * size)


def write_merged(
    base: Path, changes: dict[str, Change], out: Path, kind: str, strings: dict[str, str] | None, progress: Progress
) -> None:
    """Write `base` with `changes` (by transformers' module names) to `out`, whole or not at all.

    strings: metadata to add; what begins with "anchorkv." in the base is then left out. None leaves the base's own.
    progress: called with (bytes written, bytes in all). Raises ModelError.
    """
    header = read_header(base)
    entries = _plan(header, changes, kind, base)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            _write(file, header, np.memmap(base, np.uint8, "r"), entries, kind, strings, progress)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out)
    except OSError as error:
        raise ModelError(f"{out.parent} cannot be written to ({error.strerror}); choose another place.") from None
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # its folder is none, or cannot be written: then nothing was written either
        return


# --- which tensor becomes what -------------------------------------------------------------------------------------


def _plan(header: Header, changes: dict[str, Change], kind: str, base: Path) -> list[_Entry]:
    architecture = str(header.fields.get("general.architecture", ""))
    known = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if known is None or header.fields.get("general.type", "model") != "model":
        raise ModelError(f"{base} is not a language model of a known architecture ('{architecture}').")
    if header.fields.get("split.count", 1) > 1:
        raise ModelError(f"{base} is one part of several; join them with llama-gguf-split --merge first.")
    names = gguf.get_tensor_name_map(known, int(header.of_architecture("block_count", 0)))
    tensors = {tensor.name: tensor for tensor in header.tensors}
    placed: dict[str, Change | None] = {}
    for module, change in changes.items():
        leaf = module.rpartition(".")[2]
        name = _OUTPUT if leaf == "lm_head" else f"{names.get_name(module)}.weight"
        if leaf not in _TARGETS or (name not in tensors and not (leaf == "lm_head" and _TOKEN_EMBD in tensors)):
            raise ModelError(f"The adapter changes {module}, which {base.name} ({architecture}) does not have or which "
                             "cannot be merged.")
        source = tensors.get(name, tensors.get(_TOKEN_EMBD))
        if source is None or not _fits(change, source):
            raise ModelError(f"The adapter's change of {module} does not fit {base.name}: it is for another model, or "
                             "for a vocabulary of another size.")
        left = change.left
        if leaf in ("q_proj", "k_proj") and left is not None:
            left = in_order(left, leaf, module, header, architecture)
        placed[name] = replace(change, left=left)
    if _OUTPUT not in tensors:
        _part_tied(placed, architecture)
    order = [*header.tensors, *(replace(tensors[_TOKEN_EMBD], name=name) for name in placed if name not in tensors)]
    return [_entry(tensor, placed.get(tensor.name), kind, base) for tensor in order]


def _fits(change: Change, source: Tensor) -> bool:
    rows, columns = change.shape
    inside = change.ids is None or int(change.ids.max(initial=0)) < source.shape[-1]
    return len(source.shape) == 2 and columns == source.shape[0] and rows in (None, source.shape[1]) and inside


def _part_tied(placed: dict[str, Change | None], architecture: str) -> None:
    """Where one matrix is embedding and output at once (no output.weight), say what each becomes.

    A whole matrix and trained tokens are shared, as in PEFT. LoRA is not: PEFT adds it on the side that it targets,
    so the file gets an output.weight of its own. Raises ModelError where that cannot be.
    """
    sides = placed.get(_TOKEN_EMBD), placed.get(_OUTPUT)
    if (sides[0] is None or sides[0].left is None) and sides[1] is None:
        return
    changes = [change for change in sides if change is not None]
    if architecture in _ALWAYS_TIED or any(change.ids is not None for change in changes):
        raise ModelError("The adapter changes embedding and output differently, but the base has one matrix for both "
                         "and cannot have two.")
    whole = next((change.whole for change in changes if change.whole is not None), None)
    for name, change in zip((_TOKEN_EMBD, _OUTPUT), sides, strict=True):
        placed[name] = change if whole is None else replace(change or Change(), whole=whole)


def in_order(left: Floats, leaf: str, module: str, header: Header, architecture: str) -> Floats:
    """Rows of q or k as the file keeps them (llama.cpp's convert_hf_to_gguf, `permute`)."""
    if architecture in _AS_IN_HF:
        return left
    if architecture not in _INTERLEAVED:
        raise ModelError(f"It is not known how GGUF files of '{architecture}' order the rows of {leaf}, which the "
                         "adapter changes.")
    heads = header.of_architecture("attention.head_count", 1)
    if leaf == "k_proj":
        heads = header.of_architecture("attention.head_count_kv", heads)
    if isinstance(heads, list):
        heads = heads[next(int(part) for part in module.split(".") if part.isdigit())]
    if heads < 1 or len(left) % (2 * heads):
        raise ModelError(f"The adapter's change of {module} has {len(left)} rows, which {heads} heads cannot share.")
    swapped = left.reshape(heads, 2, len(left) // heads // 2, left.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(swapped).reshape(left.shape)


def _entry(tensor: Tensor, change: Change | None, kind: str, base: Path) -> _Entry:
    if tensor.kind not in gguf.GGML_QUANT_SIZES:
        raise ModelError(f"{base} stores {tensor.name} in a way that this gguf library does not know; update gguf.")
    own, wanted = _Type(tensor.kind), _Type[kind]
    if change is None and (len(tensor.shape) < 2 or own in _INTEGERS or tensor.name.endswith(_ROUTER)):
        wanted = own
    elif tensor.shape[0] % gguf.GGML_QUANT_SIZES[wanted][0]:
        wanted = _Type.F16
    entry = _Entry(tensor.name, tensor, wanted, change)
    if not entry.copied:
        try:
            dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[own][1]), np.uint8), own)
        except NotImplementedError:
            raise ModelError(f"{base} stores {tensor.name} as {own.name}, which cannot be read back into numbers; "
                             "take a base of another quantisation.") from None
    return entry


# --- the file ------------------------------------------------------------------------------------------------------


def _write(
    file: BinaryIO, header: Header, data: Bytes, entries: list[_Entry], kind: str, strings: dict[str, str] | None,
    progress: Progress,
) -> None:
    pairs = list(_pairs(header, data, kind, strings))
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(pairs)) + b"".join(pairs))
    offset = 0
    for entry in entries:
        shape = entry.source.shape
        file.write(_text(entry.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, entry.kind, offset))
        offset += entry.nbytes + -entry.nbytes % header.alignment
    total = sum(entry.nbytes for entry in entries)
    done = 0
    for first, piece in _in_turn(_jobs(entries, data)):
        if first:
            file.write(bytes(-file.tell() % header.alignment))
        file.write(piece.data)
        done += piece.nbytes
        progress(done, total)
    file.write(bytes(-file.tell() % header.alignment))


def _pairs(header: Header, data: Bytes, kind: str, strings: dict[str, str] | None) -> Iterator[bytes]:
    """The metadata, each pair as its bytes."""
    numbers = {"general.file_type": int(_FILE_TYPES[kind])}
    if _Type[kind] not in _PLAIN:
        numbers["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    for name, (first, end) in header.pairs.items():
        if name not in numbers and not (name.startswith("anchorkv.") and strings is not None):
            yield data[first:end].tobytes()
    for name, number in numbers.items():
        yield _text(name) + struct.pack("<II", gguf.GGUFValueType.UINT32, number)
    for name, text in (strings or {}).items():
        yield _text(name) + struct.pack("<I", gguf.GGUFValueType.STRING) + _text(text)


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


Job = tuple[bool, Callable[[], npt.NDArray[Any]]]


def _jobs(entries: Iterable[_Entry], data: Bytes) -> Iterator[Job]:
    """Pieces of all tensors in order: whether one is its tensor's first, and what makes it."""
    for entry in entries:
        rows = max(1, _PIECE // max(1, entry.columns))
        for first in range(0, entry.rows, rows):
            last = min(entry.rows, first + rows)

            def work(entry: _Entry = entry, first: int = first, last: int = last) -> npt.NDArray[Any]:
                return _piece(entry, data, first, last)

            yield first == 0, work


def _piece(entry: _Entry, data: Bytes, first: int, last: int) -> npt.NDArray[Any]:
    """Rows [first, last) of a tensor as they are stored."""
    source, change = entry.source, entry.change
    row = source.nbytes // entry.rows
    raw = data[source.start + first * row : source.start + last * row].reshape(last - first, row)
    if entry.copied:
        return raw
    values: Floats
    with np.errstate(all="ignore"):  # blocks of zeros divide by their scale, 0, and the library knows
        if change is not None and change.whole is not None:
            values = change.whole[first:last]
        else:
            values = dequantize(np.asarray(raw), _Type(source.kind))
        if change is not None and change.left is not None and change.right is not None:
            values = values + change.left[first:last] @ change.right
        if change is not None and change.ids is not None and change.values is not None:
            here = (change.ids >= first) & (change.ids < last)
            values = values.copy()
            values[change.ids[here] - first] = change.values[here]
        return np.ascontiguousarray(quantize(np.ascontiguousarray(values, np.float32), entry.kind))


def _in_turn(jobs: Iterator[Job]) -> Iterator[tuple[bool, npt.NDArray[Any]]]:
    """What the jobs give, in order; a few run ahead, on as many threads as there are processors."""
    threads = len(os.sched_getaffinity(0))
    waiting: deque[tuple[bool, Future[npt.NDArray[Any]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for first, work in jobs:
            waiting.append((first, pool.submit(work)))
            if len(waiting) > 2 * threads:
                flag, future = waiting.popleft()
                yield flag, future.result()
        for flag, future in waiting:
            yield flag, future.result()
