"""The weights of sentence-transformers' Dense modules, which lie beside a model's own, each in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxllm.weights.formats.tensor_files import TensorFiles


class _Reader(Protocol):
    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray: ...


class WithDenseModules:
    """A checkpoint, and the tensors of its folders, ``{folder}/{tensor}``."""

    def __init__(self, reader: _Reader, folders: dict[str, TensorFiles]):
        self._reader = reader
        self._places = {f"{path}/{name}": (own, name) for path, own in folders.items() for name in own.names()}

    def names(self) -> Iterable[str]:
        return [*self._reader.names(), *self._places]

    def shape(self, name: str) -> tuple[int, ...]:
        own, name = self._places.get(name, (self._reader, name))
        return own.shape(name)

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        own, name = self._places.get(name, (self._reader, name))
        return own.read(name, rows, within)


@contextlib.contextmanager
def with_dense_modules(reader: _Reader, directory: Path, folders: Iterable[str]) -> Iterator[_Reader]:
    """`reader`, with the modules of these folders of the model's directory.

    Raises WeightsError when one has no safetensors.
    """
    with contextlib.ExitStack() as stack:
        opened = {folder: stack.enter_context(TensorFiles(directory / folder)) for folder in folders}
        yield WithDenseModules(reader, opened) if opened else reader
