"""GGUF files are read as weights under Hugging Face names and in its orientation, one tensor at a time."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.gguf_config import MetadataView, hf_config
from jaxllm.weights.formats.gguf_header import GGUFHeader, TensorInfo, parse_header
from jaxllm.weights.formats.gguf_names import ROPE_FREQS, StoredTensor, tensor_map
from jaxllm.weights.formats.gguf_quants import dequantize_rows
from jaxllm.weights.formats.plain_file import PlainFile

#: the header that was read last: a start asks for one file's config, tokenizer and weights, and each would parse a
#: vocabulary anew
_kept: dict[tuple[Path, int, int, int], GGUFHeader] = {}
#: seconds after which a file that is written anew has another time of modification on any file system
_SETTLED = 2.0


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a GGUF file, of any architecture. Raises ``WeightsError`` as ``GGUFReader`` does."""
    with contextlib.closing(PlainFile(Path(path))) as file:
        return _header(file).metadata


#: how llama.cpp names the files that a model is split into, from 1 on
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def first_of_split(path: Path) -> Path | None:
    """The first of the files that a model is split into, by the name of one; None: it has no such name."""
    match = _SPLIT.fullmatch(path.name)
    return path.with_name(f"{match[1]}-{1:05d}-of-{match[3]}.gguf") if match else None


class GGUFReader:
    """A GGUF file, or a model that is split into several, by its first one, under HF tensor names. A context manager;
    nothing is read but the headers and what is asked for.

    Raises ``WeightsError`` when a file cannot be opened, is not GGUF version 2 or 3, is truncated or malformed,
    or has an unknown architecture, tensor or tensor type.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(contextlib.closing(PlainFile(self.path)))
            header = _header(file)
            self.metadata: dict[str, Any] = header.metadata
            self._tensors: dict[str, TensorInfo] = dict(header.tensors)
            #: that have a tensor
            self._files = dict.fromkeys(header.tensors, file)
            for other in self._other_files():
                file = stack.enter_context(contextlib.closing(PlainFile(other)))
                tensors = _header(file, keep=False).tensors
                twice = next((name for name in tensors if name in self._tensors), None)
                if twice is not None:
                    raise WeightsError(f"{other}: the tensor {twice!r} is in {self._files[twice].path}, too")
                self._tensors |= tensors
                self._files |= dict.fromkeys(tensors, file)
            self._map_names()
            self._stack = stack.pop_all()

    def _other_files(self) -> list[Path]:
        """What has the rest of a model that is split (llama.cpp's ``split.no``, from 0 on, and ``split.count``)."""
        number, count = self.metadata.get("split.no", 0), self.metadata.get("split.count", 1)
        if type(number) is not int or type(count) is not int:
            raise WeightsError(f"{self.path}: split.no is {number!r} and split.count {count!r}, expected integers")
        if count < 2:
            return []
        first = first_of_split(self.path)
        if number != 0:
            raise WeightsError(
                f"{self.path}: this is file {number + 1} of the {count} that the model is split into: give the first"
                f"{f', {first.name}' if first else ''}"
            )
        match = _SPLIT.fullmatch(self.path.name)
        if match is None or int(match[3]) != count:
            raise WeightsError(
                f"{self.path}: the model is split into {count} files, which are found by their names: call them "
                f"NAME-00001-of-{count:05d}.gguf and so on, in one folder"
            )
        return [self.path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(2, count + 1)]

    def _map_names(self) -> None:
        view = MetadataView(self.metadata, str(self.path))
        heads = view.count("attention.head_count")
        kv_heads = view.count("attention.head_count_kv", heads)
        self._map = tensor_map(view.architecture, self._tensors, heads, kv_heads, str(self.path))
        for stored in self._map.values():
            self._check_shape(stored)

    def __enter__(self) -> GGUFReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; ``metadata``, names, shapes and dtypes stay readable."""
        self._stack.close()

    def config(self) -> dict[str, Any]:
        """Return the HF-style ``config.json``; see ``gguf_config.hf_config``."""
        info = self._tensors.get(ROPE_FREQS)
        freqs = None if info is None else self._dequantize(info, slice(None)).astype(np.float32)
        return hf_config(self.metadata, self._tensors, freqs, str(self.path))

    def names(self) -> Iterable[str]:
        """Return the HF names of all weights, in the file's order."""
        return self._map.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return HF's shape: linear weights are ``(out_features, in_features)``, embeddings ``(vocab, hidden)``."""
        stored, info = self._find(name)
        return stored.shape(info.shape)

    def dtype(self, name: str) -> str:
        """Return the stored type, for example ``Q4_1`` or ``F32``; ``F32`` where the blocks lie across HF's rows."""
        stored, info = self._find(name)
        return info.kind.name if stored.form == "same" or info.kind.block == 1 else "F32"

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        """Return the weight as HF's checkpoint has it, dequantised; a copy.

        ``rows`` slices the first axis; what is read reaches from the first stored row of them to the last. Float16 and
        bfloat16 weights keep their dtype, all others are float32. Raises ``WeightsError`` for an unknown name or after
        ``close``.
        """
        assert within is None, "experts are tensors of their own here (`gguf_names`)"
        stored, info = self._find(name)
        wanted = slice(None) if rows is None else rows
        if stored.form != "same":
            return self._reshaped(stored, info, wanted)
        order = stored.rows(info.shape[0])
        index = wanted if order is None else order[wanted]
        values = self._dequantize(info, index)
        if stored.subtract:
            return values.astype(np.float32) - np.float32(stored.subtract)
        return values

    def raw(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        """As `read`, of a quantized matrix, its blocks: uint8 [rows, bytes of a row]."""
        assert within is None
        stored, info = self._find(name)
        order = stored.rows(info.shape[0])
        wanted = slice(None) if rows is None else rows
        return self._rows(info, wanted if order is None else order[wanted])

    def _find(self, name: str) -> tuple[StoredTensor, TensorInfo]:
        stored = self._map.get(name)
        if stored is None:
            raise WeightsError(f"{self.path}: there is no tensor {name!r} among its {len(self._map)} weights")
        return stored, stored.part(self._tensors[stored.name])

    def _reshaped(self, stored: StoredTensor, info: TensorInfo, wanted: slice) -> np.ndarray:
        """Rows of a weight whose axes lie otherwise in the file; what is read are the heads that have them."""
        count, width = stored.shape(info.shape)
        if stored.form == "row":
            return self._dequantize(info, slice(None)).reshape(1, width)[wanted]
        rows, each = np.arange(count)[wanted], count // info.shape[0]
        if not len(rows):
            return np.empty((0, width), info.kind.dtype)
        first = int(rows.min()) // each
        values = self._dequantize(info, slice(first, int(rows.max()) // each + 1))
        turned = values.swapaxes(1, 2) if stored.form == "turned heads" else values
        return turned.reshape(-1, width)[rows - first * each]

    def _dequantize(self, info: TensorInfo, rows: slice | np.ndarray) -> np.ndarray:
        if len(info.shape) == 1 and info.kind.block > 1:
            # A quantised vector's blocks straddle its elements: unpack it whole.
            whole = self._files[info.name].read(info.name, info.offset, info.nbytes)
            return dequantize_rows(whole.reshape(1, -1), info.kind)[0][rows]
        picked = self._rows(info, rows)
        return dequantize_rows(picked, info.kind).reshape(len(picked), *info.shape[1:])

    def _rows(self, info: TensorInfo, rows: slice | np.ndarray) -> np.ndarray:
        """Bytes of a tensor's rows, uint8 [rows, bytes of a row]."""
        wanted = np.arange(info.shape[0])[rows]
        row_bytes = info.nbytes // max(info.shape[0], 1)
        first, last = (int(wanted.min()), int(wanted.max())) if len(wanted) else (0, -1)
        raw = self._files[info.name].read(info.name, info.offset + first * row_bytes, (last + 1 - first) * row_bytes)
        return raw.reshape(last + 1 - first, row_bytes)[wanted - first]

    def _check_shape(self, stored: StoredTensor) -> None:
        info = self._tensors[stored.name]
        axes = {"row": 1, "heads": 3, "turned heads": 3}.get(stored.form, len(info.shape))
        if stored.expert is not None and len(info.shape) < 2 or len(info.shape) != axes:
            raise WeightsError(
                f"{self.path}: tensor {stored.name!r} has shape {info.shape}, with too many or too few axes"
            )
        for heads, times, word in ((stored.rope_heads, 2, "twice"), (stored.fused_heads, 3, "three times")):
            if heads and info.shape[0] % (times * heads):
                raise WeightsError(
                    f"{self.path}: tensor {stored.name!r} has {info.shape[0]} rows, "
                    f"expected a multiple of {word} its {heads} heads"
                )


def _header(file: PlainFile, *, keep: bool = True) -> GGUFHeader:
    status, path = os.fstat(file.file.fileno()), file.path
    key = (path, status.st_ino, status.st_size, status.st_mtime_ns)
    header = _kept.get(key)
    if header is None:
        # mapped only while it is parsed
        data = np.memmap(file.file, np.uint8, "r") if status.st_size else np.empty(0, np.uint8)
        header = parse_header(data.data, path)
        if not keep:
            return header
        forget_headers()
        if time.time() - status.st_mtime > _SETTLED:
            _kept[key] = header
    return header


def forget_headers() -> None:
    """Free what is kept of the header that was read last: some megabytes."""
    _kept.clear()
