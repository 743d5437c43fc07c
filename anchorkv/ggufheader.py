"""The header of a GGUF file: its metadata and whether all its tensors are there. No weights are read.

The gguf library's own reader builds an array for every token of the vocabulary (seconds a file); a list of models needs
a few numbers, so this walks over what it does not need. Format: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from anchorkv.errors import ModelError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 64
"""Arrays with more elements (vocabularies) are walked over."""
_SANE = 1 << 32


@dataclass(frozen=True)
class Tensor:
    """`shape`: row length first, as ggml has it. `kind`: its ggml type. Its bytes are file[start : start + nbytes]."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """`fields`: metadata without long arrays. `types`: tensors of each ggml type. `size`: bytes of the file.

    `pairs`: where in the file each metadata pair lies, name and all: bytes [first, end). `alignment`: of tensors.
    """

    fields: dict[str, Any]
    types: dict[int, int]
    size: int
    pairs: dict[str, tuple[int, int]]
    tensors: tuple[Tensor, ...]
    alignment: int

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.key`."""
        return self.fields.get(f"{self.fields.get('general.architecture', '')}.{key}", default)


def read_header(path: Path) -> Header:
    """Raises ModelError, one sentence, for a file that is missing, no GGUF, damaged or truncated."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file.")
            return _read(file, path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}).") from None
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, ValueError):
        raise ModelError(f"{path} is truncated or damaged; download it again.") from None


def _read(file: BinaryIO, path: Path) -> Header:
    version = _scalar(file, "<I")
    if version not in (2, 3):
        raise ModelError(f"{path} has GGUF version {version}, which cannot be read; convert it to version 3.")
    tensors, pairs = _scalar(file, "<Q"), _scalar(file, "<Q")
    fields, places = {}, {}
    for _ in range(pairs):
        first = file.tell()
        name = _string(file)
        fields[name] = _value(file, _scalar(file, "<I"))
        places[name] = (first, file.tell())
    types: dict[int, int] = {}
    found = []
    for _ in range(tensors):
        name = _string(file)
        shape = tuple(_scalar(file, "<Q") for _ in range(_scalar(file, "<I")))
        kind, offset = _scalar(file, "<I"), _scalar(file, "<Q")
        types[kind] = types.get(kind, 0) + 1
        found.append(Tensor(name, shape, kind, offset, _tensor_bytes(kind, shape)))
    alignment = int(fields.get("general.alignment") or 32)
    start = -(-file.tell() // alignment) * alignment
    end = start + max((tensor.start + tensor.nbytes for tensor in found), default=0)
    size = path.stat().st_size
    if size < end:
        raise ModelError(f"{path} is truncated: {end - size:,} bytes are missing; download it again.")
    placed = tuple(replace(tensor, start=start + tensor.start) for tensor in found)
    return Header(fields, types, size, places, placed, alignment)


def _tensor_bytes(kind: int, shape: tuple[int, ...]) -> int:
    """0 for a type that this gguf library does not know: then the file's end is not checked for it."""
    from gguf.constants import GGML_QUANT_SIZES

    elements = 1
    for length in shape:
        elements *= length
    block, nbytes = GGML_QUANT_SIZES.get(kind, (1, 0))
    return int(elements // block * nbytes)


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _scalar(file, _SCALARS[kind])
    inner, length = _scalar(file, "<I"), _scalar(file, "<Q")
    if length <= _LONGEST:
        return [_value(file, inner) for _ in range(length)]
    if inner == _STRING:
        for _ in range(length):
            file.seek(_length(file), 1)
    else:
        file.seek(struct.calcsize(_SCALARS[inner]) * _checked(length), 1)
    return None


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: BinaryIO) -> str:
    length = _length(file)
    data = file.read(length)
    if len(data) != length:
        raise ValueError("the file ends inside a string")
    return data.decode("utf-8")


def _length(file: BinaryIO) -> int:
    return _checked(int(_scalar(file, "<Q")))


def _checked(length: int) -> int:
    if length > _SANE:
        raise ValueError("a length in the file is absurd")
    return length
