"""Eight-bit floats (Micikevicius et al. 2022, arXiv:2209.05433): e4m3 numbers with a scale of the whole matrix, of each
row, or of each block of 128 by 128 (DeepSeek; ``weight_scale_inv`` is multiplied by, despite its name). Scales of more
than a row are repeated for each, so that a part of a matrix is a matrix.

Inputs are rounded to the same format: by a scale of the checkpoint (``activation_scheme`` "static"), or by each token's
largest number ("dynamic"), of blocks in groups of as many columns as a block has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.layers.weight_storage import Layout, RoundedInputsLayout, ScaledLayout
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.naming import spellings
from jaxllm.weights.quantization.awq import scale_dtype
from jaxllm.weights.quantization.method import HEADS, Found, Method, StoredTensors, inner, needs, one_of

FLOAT8 = "float8_e4m3fn"
_SCALES = (".weight_scale_inv", ".weight_scale")
_INPUTS = (".input_scale", ".activation_scale")


class FP8(Method):
    """Raises ValidationError for a scheme of inputs that is not known."""

    name = "fp8"
    tensors = (".weight", *_SCALES, *_INPUTS, ".weight_scale_2", ".input_scale_ub")
    markers = _SCALES

    def __init__(self, config: Mapping[str, Any]):
        self._static = one_of(config, "activation_scheme", ("static", "dynamic"), "dynamic") == "static"
        self._block: tuple[int, int] | None = None
        if config.get("weight_block_size"):
            self._block = tuple(map(int, config["weight_block_size"]))  # pyright: ignore[reportAttributeAccessIssue]
        self._left_out = tuple(config.get("ignored_layers") or config.get("modules_to_not_convert") or ())

    def planned(self, name: str, shape: tuple[int, int]) -> Layout | None:
        names = spellings(name.removesuffix(".weight"))
        if name.startswith(HEADS) or any(each in self._left_out for each in names):
            return None
        return self._layout(shape[1], "float32", static=self._static)

    def _layout(self, columns: int, scales: str, *, static: bool) -> Layout:
        group = math.gcd(columns, self._block[1]) if self._block else 0
        own = ScaledLayout(dtype=FLOAT8, group=group, scale_dtype=scales)
        return RoundedInputsLayout(layout=own, dtype=FLOAT8, group=0 if static else group, static=static)

    def look(self, tensors: StoredTensors, module: str) -> Found:
        rows, columns = needs(tensors, f"{module}.weight", (None, None))
        stored = tensors.dtype(f"{module}.weight")
        if stored != "F8_E4M3":
            raise WeightsError(f"tensor {module + '.weight'!r} has type {stored} beside a scale: F8_E4M3 is known")
        scale = _name(tensors, module, _SCALES)
        assert scale is not None
        shape = tensors.shape(scale)
        if self._block is not None and len(shape) == 2 and shape != (rows, 1):
            across, along = self._block
            needs(tensors, scale, (-(-rows // across), -(-columns // along)))
        elif shape not in ((), (1,), (rows,), (rows, 1)):
            raise WeightsError(f"tensor {scale!r} has shape {shape}, the matrix has {rows} rows")
        static = self._static and _name(tensors, module, _INPUTS) is not None
        if self._static and not static:
            raise WeightsError(
                f"the checkpoint has no tensor {module + _INPUTS[0]!r}, and its config.json says that inputs have "
                "scales in it (activation_scheme static)"
            )
        return Found(self._layout(columns, scale_dtype(tensors, scale), static=static), (rows, columns))

    def array(
        self, tensors: StoredTensors, name: str, found: Found, kind: str, rows: slice, within: int | None
    ) -> np.ndarray:
        module = name.removesuffix(".weight")
        if kind == "values":
            return tensors.raw(f"{module}.weight", rows)
        if kind == "inputs":
            stored = _name(tensors, module, _INPUTS)
            assert stored is not None
            return tensors.read(stored).reshape(1)
        layout, (count, columns) = inner(found.layout), found.shape
        assert isinstance(layout, ScaledLayout)
        stored = _name(tensors, module, _SCALES)
        assert stored is not None
        scales = tensors.read(stored)
        if layout.group and scales.ndim == 2 and self._block is not None:
            across, along = self._block
            spread = np.repeat(scales, along // layout.group, axis=1)[:, : columns // layout.group]
            return np.repeat(spread, across, axis=0)[:count][rows]
        return np.broadcast_to(scales.reshape(-1, 1), (count, 1))[rows]

    whole_matrices = False


def _name(tensors: StoredTensors, module: str, ends: tuple[str, ...]) -> str | None:
    names = tensors.names()
    return next((module + end for end in ends if module + end in names), None)
