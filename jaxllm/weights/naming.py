"""Names of tensors, where checkpoints of one model differ in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

#: heads stand beside the body, never inside
_HEADS = ("lm_head.", "score.", "classifier.", "cls.")
#: TensorFlow's names of a norm's weights, in BERT's first checkpoints
_OLD_ENDS = {".gamma": ".weight", ".beta": ".bias"}


class _Reader(Protocol):
    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, rows: slice | None = None) -> np.ndarray: ...


class CommonNames:
    """A checkpoint under the names that its model has as part of a larger one.

    Args:
        prefix: what the names of the body begin with (``model.``); checkpoints of the body alone leave it out.
    """

    def __init__(self, reader: _Reader, prefix: str):
        self._reader = reader
        stored = list(reader.names())
        bare = not any(name.startswith(prefix) for name in stored)
        self._stored = {_common(name, prefix if bare else ""): name for name in stored}

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._stored.get(name, name))

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self._reader.read(self._stored.get(name, name), rows)


def _common(name: str, prefix: str) -> str:
    for old, new in _OLD_ENDS.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name if name.startswith(_HEADS) else prefix + name
