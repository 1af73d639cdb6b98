"""The header of a GGUF file has metadata and tensor infos; every length is checked against the file.

Format (ggml's ``docs/gguf.md``), little-endian: magic ``GGUF``, version u32, tensor count u64, metadata count u64,
the metadata entries (key string, value type u32, value), the tensor infos (name, number of dimensions u32, dimensions
u64 from the fastest one, type u32, offset u64), padding to ``general.alignment``, then the tensors' data.
A string is a u64 length and UTF-8 bytes; an array is an element type u32, a u64 count and the elements.
"""

from __future__ import annotations

import importlib.util
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.api.extras import how_to_install
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.gguf_quants import TENSOR_TYPES, TensorType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_MAX_DIMS = 4
# Real files hold no nested arrays at all; a bound keeps a corrupt one from exhausting Python's stack.
_MAX_NESTING = 4


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor as the file stores it. ``shape`` is row-major (numpy order), ``offset`` is from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: TensorType
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """``metadata``: Python scalars, strings and lists by key. ``tensors``: by their name in the file."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


_U64 = struct.Struct("<Q")


class _Cursor:
    """Reads forward through a buffer; past its end raises ``WeightsError`` saying what was being read."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def take(self, count: int, what: str) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise self.error(
                f"the header is truncated: {what} needs {count} bytes at byte {self.position}, "
                f"the file ends at byte {len(self.data)}"
            )
        start, self.position = self.position, end
        return self.data[start:end]

    def u32(self, what: str) -> int:
        return struct.unpack("<I", self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return struct.unpack("<Q", self.take(8, what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.u64(f"the length of {what}"), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 at byte {self.position - len(raw) + error.start}") from error

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        what = f"the value of {key!r}"
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._array(key, depth)
        if kind not in _SCALARS:
            raise self.error(f"{what} has unknown value type {kind}; known are 0 to 12")
        return self._scalars(kind, 1, what)[0]

    def _array(self, key: str, depth: int) -> list[Any]:
        what = f"the array {key!r}"
        if depth >= _MAX_NESTING:
            raise self.error(f"{what} is nested more than {_MAX_NESTING} deep")
        kind, count = self.u32(what), self.u64(what)
        if kind in _SCALARS:
            return self._scalars(kind, count, what)
        # Each element takes at least its own length field: a corrupt count fails here, not after a long loop.
        least = count * (8 if kind == _STRING else 12)
        if least > len(self.data) - self.position:
            raise self.error(f"the header is truncated: {what} claims {count} elements, at least {least} bytes")
        if kind == _STRING and (found := self._strings(count)) is not None:
            return found
        return [self.value(kind, key, depth + 1) for _ in range(count)]

    def _strings(self, count: int) -> list[str] | None:
        """Read `count` strings, several times faster than one by one; None, and nothing read, where one is wrong."""
        data, position, found = self.data, self.position, []
        try:
            for _ in range(count):
                start = position + _U64.size
                position = start + _U64.unpack_from(data, position)[0]
                if position > len(data):
                    return None
                found.append(str(data[start:position], "utf-8"))
        except (struct.error, UnicodeDecodeError):
            return None
        self.position = position
        return found

    def _scalars(self, kind: int, count: int, what: str) -> list[Any]:
        dtype = _SCALARS[kind]
        raw = self.take(count * dtype.itemsize, what)
        if kind == _BOOL and np.any(np.frombuffer(raw, np.uint8) > 1):
            raise self.error(f"{what} holds a boolean that is neither 0 nor 1")
        return np.frombuffer(raw, dtype).tolist()

    def error(self, message: str) -> WeightsError:
        return WeightsError(f"{self.path}: {message}")


def parse_header(data: memoryview, path: Path) -> GGUFHeader:
    """Parse and check the header at the start of ``data``, the whole file's bytes (a memory map: only read as needed).

    Raises ``WeightsError``: bad magic, unsupported version or byte order, truncated header, malformed value,
    duplicate key or tensor, unknown tensor type, or a tensor whose bytes lie outside the file or inside another's.
    """
    cursor = _Cursor(data, path)
    magic = bytes(cursor.take(4, "the magic number"))
    if magic != _MAGIC:
        raise cursor.error(f"not a GGUF file: it starts with {magic!r}, a GGUF file starts with {_MAGIC!r}")
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        hint = ", the file is big-endian" if version and version & 0xFFFF == 0 else ""
        raise cursor.error(f"GGUF version {version} is not supported{hint}; little-endian versions 2 and 3 are")
    tensor_count = cursor.u64("the tensor count")
    metadata_count = cursor.u64("the metadata count")

    metadata: dict[str, Any] = {}
    for index in range(metadata_count):
        key = cursor.string(f"metadata key {index} of {metadata_count}")
        if key in metadata:
            raise cursor.error(f"the metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.u32(f"the value type of {key!r}"), key)

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}; it must be a power of two")

    tensors: dict[str, TensorInfo] = {}
    for index in range(tensor_count):
        info = _tensor_info(cursor, f"tensor info {index} of {tensor_count}", alignment)
        if info.name in tensors:
            raise cursor.error(f"the tensor {info.name!r} appears twice")
        tensors[info.name] = info

    data_start = -(-cursor.position // alignment) * alignment
    placed = {
        name: TensorInfo(
            name=name, shape=info.shape, kind=info.kind, offset=data_start + info.offset, nbytes=info.nbytes
        )
        for name, info in tensors.items()
    }
    _check_extents(placed, len(data), path)
    return GGUFHeader(version=version, metadata=metadata, tensors=placed)


def _tensor_info(cursor: _Cursor, what: str, alignment: int) -> TensorInfo:
    name = cursor.string(f"the name in {what}")
    dims_count = cursor.u32(f"the number of dimensions of tensor {name!r}")
    if not 1 <= dims_count <= _MAX_DIMS:
        raise cursor.error(f"tensor {name!r} has {dims_count} dimensions; GGUF allows 1 to {_MAX_DIMS}")
    raw = cursor.take(8 * dims_count, f"the dimensions of tensor {name!r}")
    shape = tuple(reversed(struct.unpack(f"<{dims_count}Q", raw)))
    number = cursor.u32(f"the type of tensor {name!r}")
    offset = cursor.u64(f"the offset of tensor {name!r}")
    kind = TENSOR_TYPES.get(number)
    if kind is None:
        known = ", ".join(known.name for known in TENSOR_TYPES.values())
        raise cursor.error(f"tensor {name!r} has type number {number}, which is not supported; supported are {known}")
    if kind.package is not None and importlib.util.find_spec(kind.package) is None:
        raise cursor.error(
            f"tensor {name!r} has the type {kind.name}, which the {kind.package} package reads: "
            f"{how_to_install(kind.package)}"
        )
    if 0 in shape or shape[-1] % kind.block:
        raise cursor.error(
            f"tensor {name!r} has shape {shape}; its last dimension must be a positive multiple of "
            f"{kind.name}'s block of {kind.block}, the others positive"
        )
    if offset % alignment:
        raise cursor.error(f"tensor {name!r} has offset {offset}, not a multiple of the alignment {alignment}")
    nbytes = math.prod(shape) // kind.block * kind.nbytes
    return TensorInfo(name=name, shape=shape, kind=kind, offset=offset, nbytes=nbytes)


def _check_extents(tensors: dict[str, TensorInfo], file_bytes: int, path: Path) -> None:
    previous: TensorInfo | None = None
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset + info.nbytes > file_bytes:
            seen = max(0, file_bytes - info.offset)
            raise WeightsError(
                f"{path}: the data of tensor {info.name!r} ({info.kind.name}, shape {info.shape}) is truncated: "
                f"expected {info.nbytes} bytes at byte {info.offset}, the file has {seen} there; fetch the file again"
            )
        if previous is not None and previous.offset + previous.nbytes > info.offset:
            raise WeightsError(
                f"{path}: the data of tensor {info.name!r} starts at byte {info.offset}, "
                f"inside tensor {previous.name!r} which ends at byte {previous.offset + previous.nbytes}"
            )
        previous = info
