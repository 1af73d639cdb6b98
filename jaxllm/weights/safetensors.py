"""Safetensors directories as weights: one file, or shards with an index."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxllm.weights.errors import WeightsError

INDEX = "model.safetensors.index.json"


class SafetensorsReader:
    """A directory's safetensors under their own names. A context manager; the files stay memory-mapped while it is
    open.

    Raises ``WeightsError`` when a file is missing, truncated or corrupt, or when the index and the shards disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self._stack = contextlib.ExitStack()
        index = directory / INDEX
        files = sorted(directory.glob("*.safetensors")) if not index.is_file() else None
        wanted = None if files is not None else _weight_map(index)
        if wanted is not None:
            files = [directory / name for name in sorted(set(wanted.values()))]
        if not files:
            raise WeightsError(f"{directory}: there is no .safetensors file")
        handles = {file.name: self._open(file) for file in files}
        self._files = {name: handle for handle in handles.values() for name in handle.keys()}  # noqa: SIM118
        for name, file in (wanted or {}).items():
            if self._files.get(name) is not handles[file]:
                raise WeightsError(f"{index}: tensor {name!r} should be in {file}, but is not there")

    def _open(self, file: Path):
        try:
            return self._stack.enter_context(safe_open(file, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file}: not a readable safetensors file: {error}") from error

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def names(self) -> Iterable[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._find(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return self._find(name).get_slice(name).get_dtype()

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or the `rows` of its first axis, in its stored dtype (bfloat16 through ml_dtypes)."""
        file = self._find(name)
        try:
            return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        except (SafetensorError, TypeError) as error:
            raise WeightsError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error

    def _find(self, name: str):
        if name not in self._files:
            raise WeightsError(f"{self.path}: there is no tensor {name!r} among its {len(self._files)} weights")
        return self._files[name]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index}: not a readable index of shards: {error!r}") from error
    for file in sorted(set(weight_map.values())):
        if not (index.parent / file).is_file():
            raise WeightsError(f"{index}: the shard {file} is missing")
    return weight_map
