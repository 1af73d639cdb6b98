"""Directories of tensors, as safetensors or as ``torch.save`` wrote them: one file, or shards with an index.

The package opens each file, which checks all of it but the numbers; these are read here, by plain reads at the places
that the checked header says. Read through the package, a checkpoint of 1.05 GB in bfloat16, in slices of 2**20 numbers
(as the loader reads them; safetensors 0.8.0, two cores, the file in the page cache), took

    how                                     seconds   bytes read   peak beyond the interpreter
    plain reads                                 0.5      1.05 GB                       1.00 GB
    safe_open, get_slice, backend="mmap"    0.3-2.0      (pages)                       2.00 GB
    safe_open, get_slice, backend="pread"        30      35.4 GB                       1.07 GB

A map's pages count as the process's memory, and a file that is cut off ends the process that has it mapped; the other
backend reads a whole tensor for every slice of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats import torch_pickle
from jaxllm.weights.formats.plain_file import PlainFile

#: what the names of Hugging Face's files begin with
STEM = "model"
SINGLE = f"{STEM}.safetensors"
INDEX = f"{SINGLE}.index.json"
#: the same tensors a second time, in some of Mistral's directories (`formats.mistral`)
_CONSOLIDATED = "consolidated"
#: the types that weights can have
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
#: those besides that quantized ones are made of
STORED_DTYPES = {
    **DTYPES,
    "I8": np.int8,
    "U8": np.uint8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
#: exponents of two (e8m0) are bytes for who reads them, as older files have them
_AS_BYTES = {"F8_E8M0": "U8"}
_LENGTH_BYTES = 8
#: vLLM's files of one worker each
_OF_A_WORKER = re.compile(r"model-(rank|pp)-\d+-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    file: PlainFile
    dtype: str
    shape: tuple[int, ...]
    #: first byte, from the beginning of the file
    offset: int
    nbytes: int


class TensorFiles:
    """The tensors of a directory, or of one file, under their own names. A context manager; the files stay open while
    it is.

    Args:
        directory: with safetensors; with ``pytorch_model.bin`` or its shards, where there are none of these.
        pickled: read the latter in any case.
        stem: what the names of the files begin with.

    Raises ``WeightsError`` when a file is missing, truncated or corrupt, or when the index and the shards disagree.
    """

    def __init__(self, directory: Path, *, pickled: bool | None = None, stem: str = STEM) -> None:
        self.path = directory
        if pickled is None:
            pickled = stem == STEM and is_pickled(directory)
        with contextlib.ExitStack() as stack:
            self._tensors = _open_all(directory, pickled, stem, stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> TensorFiles:
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

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        """The tensor, or the `rows` (of step 1) of its first axis, in its stored dtype; only these bytes are read. With
        `within`, that one of the tensors that are stacked on its first axis.

        Raises ``WeightsError`` for an unknown name, a type that is no weight's, or a file that has become shorter.
        """
        return self._read(name, rows, within, DTYPES)

    def raw(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        """As `read`, also of types that no weight has by itself."""
        return self._read(name, rows, within, STORED_DTYPES)

    def _read(
        self, name: str, rows: slice | None, within: int | None, dtypes: Mapping[str, type[np.generic]]
    ) -> np.ndarray:
        tensor = self._find(name)
        dtype = dtypes.get(tensor.dtype)
        axes = len(tensor.shape)
        if tensor.dtype == "I64" and axes == 1:
            # numbers of tokens, which are no matrix that was quantized
            dtype = np.int64
        if dtype is None:
            raise WeightsError(
                f"{tensor.file.path}: tensor {name!r} has type {tensor.dtype}; weights of type {', '.join(DTYPES)} can "
                "be loaded, and others as part of a quantization that config.json names (quantization_config)"
            )
        shape, offset, nbytes = tensor.shape, tensor.offset, tensor.nbytes
        if within is not None:
            nbytes //= shape[0]
            offset, shape = offset + within * nbytes, shape[1:]
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            offset += start * (nbytes // max(shape[0], 1))
            shape = (max(stop - start, 0), *shape[1:])
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return tensor.file.read(name, offset, nbytes).view(dtype).reshape(shape)

    def _find(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise WeightsError(f"{self.path}: there is no tensor {name!r} among its {len(self._tensors)} weights")
        return self._tensors[name]


def has_safetensors(directory: Path) -> bool:
    """Whether a directory has safetensors of Hugging Face's, or says where they would be."""
    return (directory / INDEX).is_file() or bool(_safetensors(directory))


def _safetensors(directory: Path) -> list[Path]:
    return sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith(_CONSOLIDATED))


def has_pickled(directory: Path) -> bool:
    """Whether a directory has weights that ``torch.save`` wrote."""
    return (directory / torch_pickle.SINGLE).is_file() or (directory / torch_pickle.INDEX).is_file()


def is_pickled(directory: Path) -> bool:
    """Whether it has these alone."""
    has_others = any(directory.glob("*.safetensors")) or (directory / INDEX).is_file()
    return not has_others and has_pickled(directory)


def _open_all(directory: Path, pickled: bool, stem: str, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    read = _open_pickled if pickled else _open
    single, index = (torch_pickle.SINGLE, torch_pickle.INDEX) if pickled else (SINGLE, INDEX)
    single, index = (name.replace(STEM, stem, 1) if stem != STEM else name for name in (single, index))
    index = directory / index
    if index.is_file():
        weight_map = _weight_map(index)
        shards = {file: read(directory / file, stack) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in shards[file]:
                raise WeightsError(f"{index}: tensor {name!r} should be in {file}, but is not there")
        return {name: shards[file][name] for name, file in weight_map.items()}
    files = [directory if directory.is_file() else directory / single]
    if not files[0].is_file():
        files = _safetensors(directory) if stem == STEM else sorted(directory.glob(f"{stem}*.safetensors"))
        files = [] if pickled else files
        if files and (match := _OF_A_WORKER.match(files[0].name)):
            raise WeightsError(
                f"{files[0]}: it is one worker's part of a model that vLLM has saved by save_sharded_state, with "
                f"tensors joined as vLLM has them ({match[0]}...). Take the checkpoint that it was made from: each "
                "device reads its own part of that."
            )
    if not files:
        kind = single if pickled else ".safetensors file"
        raise WeightsError(f"{directory}: there is no {kind}{'' if pickled else _remedy(directory)}")
    tensors: dict[str, _Tensor] = {}
    for file in files:
        found = read(file, stack)
        if twice := found.keys() & tensors.keys():
            raise WeightsError(f"{file}: tensor {min(twice)!r} is in another file of the directory too")
        tensors.update(found)
    return tensors


def _open_pickled(path: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    file = stack.enter_context(contextlib.closing(PlainFile(path)))
    found = torch_pickle.places(path)
    return {name: _Tensor(file=file, **place._asdict()) for name, place in found.items()}


def _open(path: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """The tensors of one file; the package checks that each has its shape's size, and that they fill the file."""
    file = stack.enter_context(contextlib.closing(PlainFile(path)))
    try:
        with safe_open(path, framework="numpy"):
            pass
        length = int.from_bytes(file.file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.file.read(length))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise WeightsError(
            f"{path}: truncated, corrupt or not safetensors: {error} ({path.stat().st_size} bytes)"
        ) from error
    header.pop("__metadata__", None)
    return {name: _tensor(file, entry, _LENGTH_BYTES + length) for name, entry in header.items()}


def _tensor(file: PlainFile, entry: Mapping[str, Any], data: int) -> _Tensor:
    begin, end = entry["data_offsets"]
    shape: tuple[int, ...] = tuple(entry["shape"])
    dtype: str = entry["dtype"]
    return _Tensor(file=file, dtype=_AS_BYTES.get(dtype, dtype), shape=shape, offset=data + begin, nbytes=end - begin)


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


def _remedy(directory: Path) -> str:
    """What to do with a directory that has its weights in another form; "" where nothing is known."""
    others = sorted(directory.glob("*.bin")) or sorted(directory.glob("*.pt*"))
    if not others:
        return ""
    return (
        f", nor {torch_pickle.SINGLE}, but {others[0].name}: a state_dict of the whole model can be read under that "
        "name, or its index's"
    )
