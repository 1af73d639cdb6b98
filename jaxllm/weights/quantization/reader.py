"""A quantized checkpoint as the loader reads it: the arrays that matrices are stored as, in its own tensors' place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from jaxllm.layers.weight_storage import MARK
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.quantization.method import Found, Method, StoredTensors

#: arrays of layouts that numbers are multiplied by, which are small enough to be looked at
_SCALES = ("scales", "factors", "inputs")


class QuantizedTensors:
    """A checkpoint's tensors, and for each quantized matrix its arrays, ``{matrix}#{array}``.

    Args:
        matrices: the quantized ones, by name.
    """

    def __init__(self, tensors: StoredTensors, method: Method, matrices: Mapping[str, Found]):
        self._tensors, self._method, self._matrices = tensors, method, matrices
        hidden = {name.removesuffix(".weight") + end for name in matrices for end in method.tensors} | set(matrices)
        self._names = dict.fromkeys(name for name in tensors.names() if name not in hidden)
        present = set(tensors.names())
        for name, found in matrices.items():
            if method.in_files or name in present:
                self._names.update((f"{name}{MARK}{kind}", None) for kind in found.layout.shapes(*found.shape))
        #: the array that was read last, of matrices that are converted as a whole: it is asked for in pieces
        self._last: tuple[tuple[str, int | None], np.ndarray] | None = None

    def names(self) -> Iterable[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        matrix, mark, kind = name.partition(MARK)
        if not mark:
            return self._tensors.shape(name)
        found = self._matrices[matrix]
        shape = found.layout.shapes(*found.shape)[kind]
        return (found.stacked, *shape) if found.stacked else shape

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        """As `loader.WeightReader` says. Raises WeightsError for scales of a checkpoint that are no finite numbers."""
        matrix, mark, kind = name.partition(MARK)
        if not mark:
            return self._tensors.read(name, rows, within)
        rows = slice(None) if rows is None else rows
        found, method = self._matrices[matrix], self._method
        if not method.whole_matrices:
            return self._checked(method.array(self._tensors, matrix, found, kind, rows, within), matrix, kind)
        if self._last is None or self._last[0] != (name, within):
            whole = method.array(self._tensors, matrix, found, kind, slice(None), within)
            self._last = (name, within), self._checked(whole, matrix, kind)
        return self._last[1][rows]

    def _checked(self, array: np.ndarray, matrix: str, kind: str) -> np.ndarray:
        if kind not in _SCALES or not self._method.in_files:
            return array
        # bytes are exponents of two (e8m0), of which the last one is no number
        is_broken = bool((array == 255).any()) if array.dtype == np.uint8 else not _is_finite(array)
        if not is_broken:
            return array
        ends = [end for end in self._method.tensors if "scale" in end or "absmax" in end or end == ".SCB"]
        stored = [f"{matrix.removesuffix('.weight')}{end}" for end in ends]
        stored = [name for name in stored if name in self._tensors.names()]
        broken = [name for name in stored if not _is_finite(self._tensors.raw(name))] or stored
        raise WeightsError(
            f"tensor {' or '.join(map(repr, broken or [matrix]))} has scales that are infinite or no numbers (NaN), "
            "with which every answer would be wrong: the file is damaged, or its calibration failed. Take another copy "
            "or checkpoint."
        )


def _is_finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())
