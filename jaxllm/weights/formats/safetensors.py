"""Safetensors directories as weights: one file, or shards with an index.

The format (https://github.com/huggingface/safetensors#format) is a little-endian u64, that many bytes of JSON which say
each tensor's dtype, shape and place, and the tensors, one after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.plain_file import PlainFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: the types that weights can have
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_LENGTH_BYTES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    file: PlainFile
    dtype: str
    shape: tuple[int, ...]
    #: first byte, from the beginning of the file
    offset: int
    nbytes: int


class SafetensorsReader:
    """A directory's safetensors under their own names. A context manager; the files stay open while it is.

    Raises ``WeightsError`` when a file is missing, truncated or corrupt, or when the index and the shards disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory
        with contextlib.ExitStack() as stack:
            self._tensors = self._open_all(directory, stack)
            self._stack = stack.pop_all()

    @staticmethod
    def _open_all(directory: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
        index = directory / INDEX
        if index.is_file():
            weight_map = _weight_map(index)
            shards = {file: _open(directory / file, stack) for file in sorted(set(weight_map.values()))}
            for name, file in weight_map.items():
                if name not in shards[file]:
                    raise WeightsError(f"{index}: tensor {name!r} should be in {file}, but is not there")
            return {name: shards[file][name] for name, file in weight_map.items()}
        files = [directory / SINGLE]
        if not files[0].is_file():
            files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise WeightsError(f"{directory}: there is no .safetensors file")
        tensors: dict[str, _Tensor] = {}
        for file in files:
            found = _open(file, stack)
            if twice := found.keys() & tensors.keys():
                raise WeightsError(f"{file}: tensor {min(twice)!r} is in another file of the directory too")
            tensors.update(found)
        return tensors

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def dtype(self, name: str) -> str:
        """The stored type, in the format's words, for example ``BF16``."""
        return self._find(name).dtype

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or the `rows` (of step 1) of its first axis, in its stored dtype; only these bytes are read.

        Raises ``WeightsError`` for an unknown name, a type that is no weight's, or a file that has become shorter.
        """
        tensor = self._find(name)
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None:
            raise WeightsError(
                f"{tensor.file.path}: tensor {name!r} has type {tensor.dtype}; weights of type {', '.join(DTYPES)} can "
                "be loaded (quantized safetensors are not supported)"
            )
        shape, offset = tensor.shape, tensor.offset
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            offset += start * (tensor.nbytes // max(shape[0], 1))
            shape = (max(stop - start, 0), *shape[1:])
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return tensor.file.read(name, offset, nbytes).view(dtype).reshape(shape)

    def _find(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise WeightsError(f"{self.path}: there is no tensor {name!r} among its {len(self._tensors)} weights")
        return self._tensors[name]


def _open(path: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """The tensors of one file, every one of them checked to lie within the file and to have its shape's size."""
    file = stack.enter_context(contextlib.closing(PlainFile(path)))
    try:
        size = path.stat().st_size
        length = int.from_bytes(file.file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES + length:
            raise WeightsError(
                f"{path}: truncated or not safetensors: {size} bytes, of which its header needs {length}"
            )
        header = json.loads(file.file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _tensor(file, entry, _LENGTH_BYTES + length) for name, entry in entries.items()}
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: its safetensors header is corrupt: {error!r}") from error
    _check_places(path, tensors, _LENGTH_BYTES + length, size)
    return tensors


def _tensor(file: PlainFile, entry: Mapping[str, Any], data: int) -> _Tensor:
    begin, end = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)) or type(dtype) is not str:
        raise ValueError(f"an entry is {entry!r:.200}")
    return _Tensor(file=file, dtype=dtype, shape=tuple(shape), offset=data + begin, nbytes=end - begin)


def _check_places(path: Path, tensors: Mapping[str, _Tensor], data: int, size: int) -> None:
    """The format's rules: tensors fill the file without holes or overlap, each of the size that its shape needs."""
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        problem = None
        if tensor.offset != end or tensor.nbytes < 0:
            problem = f"begins at byte {tensor.offset} and has {tensor.nbytes}, but should begin at {end}"
        elif tensor.dtype in DTYPES:
            needed = math.prod(tensor.shape) * np.dtype(DTYPES[tensor.dtype]).itemsize
            if needed != tensor.nbytes:
                problem = f"has {tensor.nbytes} bytes, but its shape {tensor.shape} and type need {needed}"
        if problem:
            raise WeightsError(f"{path}: its safetensors header is corrupt: tensor {name!r} {problem}")
        end += tensor.nbytes
        if end > size:
            raise WeightsError(f"{path}: truncated: tensor {name!r} ends at byte {end}, the file has {size}")
    if end != size:
        raise WeightsError(f"{path}: corrupt: {size - end} bytes follow the last tensor")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not all(type(file) is str for file in shards):
            raise TypeError("a shard's name is not a string")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: not a readable index of shards: {error!r}") from error
    for file in shards:
        if not (index.parent / file).is_file():
            raise WeightsError(f"{index}: the shard {file} is missing")
    return weight_map
