"""AWQ (Lin et al. 2023, arXiv:2306.00978): four bits in groups along the inputs, scales and zero points of each.

A matrix [N, K] is ``qweight`` i32 [K, N / 8], ``qzeros`` i32 [K / g, N / 8] and ``scales`` [K / g, N]; the lowest four
bits of a word are its column 0, the next ones 2, then 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight_storage import Int4Layout, Layout
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.naming import spellings
from jaxllm.weights.quantization.groups import group_size, planned_group, stored_group
from jaxllm.weights.quantization.method import (
    HEADS,
    Found,
    Method,
    StoredTensors,
    as_stream,
    codes_of,
    needs,
    one_of,
    packed_pairs,
    stream,
)

#: where each column of eight lies in a word
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
SCALE_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


class AWQ(Method):
    """Raises ValidationError for other layouts than "gemm", and other numbers of bits than four."""

    name = "awq"
    tensors = (".qweight", ".qzeros", ".scales")
    markers = (".qweight",)

    def __init__(self, config: Mapping[str, Any]):
        # GPTQModel's files have it under its own names
        said = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
        config = {**config, "version": str(said).lower()}
        one_of(config, "version", ("gemm",), "gemm")
        one_of(config, "bits" if "bits" in config else "w_bit", (4,), 4)
        self._group = group_size(config)
        self._left_out = tuple(config.get("modules_to_not_convert") or ())

    def planned(self, name: str, shape: tuple[int, int]) -> Layout | None:
        if name.startswith(HEADS) or any(part in each for part in self._left_out for each in spellings(name)):
            return None
        group = planned_group(self._group_of(name.removesuffix(".weight")), name, shape[1])
        return Int4Layout(group=group, scale_dtype="float16")

    def _group_of(self, module: str) -> int:
        """The configuration's group size of a module."""
        return self._group

    def look(self, tensors: StoredTensors, module: str) -> Found:
        columns, words = needs(tensors, f"{module}.qweight", (None, None))
        rows = words * 8
        group = stored_group(tensors, module, columns, rows, self._group_of(module))
        needs(tensors, f"{module}.qzeros", (columns // group, words))
        return Found(Int4Layout(group=group, scale_dtype=scale_dtype(tensors, f"{module}.scales")), (rows, columns))

    def array(
        self, tensors: StoredTensors, name: str, found: Found, kind: str, rows: slice, within: int | None
    ) -> np.ndarray:
        module, layout = name.removesuffix(".weight"), found.layout
        assert isinstance(layout, Int4Layout)
        if kind == "packed":
            return packed_pairs(columns_of(tensors.raw(f"{module}.qweight")).T, layout.group)
        if kind == "zeros":
            return columns_of(tensors.raw(f"{module}.qzeros")).T
        return tensors.read(f"{module}.scales").T

    writes = True

    def written(self, name: str, found: Found, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        module, (rows, _) = name.removesuffix(".weight"), found.shape
        layout, zeros = found.layout, arrays["zeros"]
        if not isinstance(layout, Int4Layout) or rows % 8 or zeros.max(initial=0) > 15:
            raise ValidationError(f"{module} [{rows} rows] cannot be written as AWQ: rows come in eights, zeros to 15.")
        return {
            f"{module}.qweight": _words(codes_of(arrays["packed"], layout.group).T),
            f"{module}.qzeros": _words(zeros.T),
            f"{module}.scales": np.ascontiguousarray(arrays["scales"].T),
        }


def configuration(group: int, left_out: Iterable[str]) -> dict[str, Any]:
    """quantization_config of a checkpoint in this format.

    Args:
        group: columns that share a scale.
        left_out: modules that are not quantized.
    """
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(left_out),
    }


def scale_dtype(tensors: StoredTensors, name: str) -> str:
    """The dtype of stored scales. Raises WeightsError for one that scales cannot have."""
    stored = tensors.dtype(name)
    if stored not in SCALE_DTYPES:
        raise WeightsError(f"tensor {name!r} has type {stored}, scales have {' or '.join(SCALE_DTYPES)}")
    return SCALE_DTYPES[stored]


def columns_of(words: np.ndarray) -> np.ndarray:
    """i32 [R, N / 8] -> uint8 [R, N]."""
    rows = words.shape[0]
    return stream(words, 4, words.shape[1] * 8).reshape(rows, -1, 8)[:, :, _PLACES].reshape(rows, -1)


def _words(numbers: np.ndarray) -> np.ndarray:
    """`columns_of` backwards."""
    rows = numbers.shape[0]
    return as_stream(numbers.reshape(rows, -1, 8)[:, :, np.argsort(_PLACES)].reshape(rows, -1), 4)
