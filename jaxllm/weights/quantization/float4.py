"""Matrices [N, K] of four-bit floats (e2m1), two a byte, the first in the low four bits, with a scale for each group.

MXFP4 (OCP Microscaling Formats 1.0) has an exponent of two (e8m0) for each 32; NVFP4 (Abecassis et al. 2025,
arXiv:2509.25149) an e4m3 scale for each 16, and one of the matrix, which compressed-tensors divides by
(``weight_global_scale``) and ModelOpt multiplies by (``weight_scale_2``). The bytes are ``weight_packed``, or
``weight`` in ModelOpt's and Quark's files; the groups' scales are ``weight_scale`` [N, K / g].
"""

from __future__ import annotations

import numpy as np

from jaxllm.layers.weight_storage import CodebookLayout, Layout
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.quantization.method import Found, StoredTensors, needs, packed_pairs

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
#: by the columns of a group
LAYOUTS = {
    32: CodebookLayout(table=E2M1, group=32, scale_dtype="uint8"),
    16: CodebookLayout(table=E2M1, group=16, scale_dtype="float8_e4m3fn", has_factors=True),
}
_STORED = {"uint8": "U8", "float8_e4m3fn": "F8_E4M3"}
_FACTORS = (".weight_global_scale", ".weight_scale_2")
#: what a matrix has, behind its module's name
TENSORS = (".weight", ".weight_packed", ".weight_scale", *_FACTORS, ".input_global_scale", ".input_scale")


def look(tensors: StoredTensors, module: str, group: int) -> Found:
    """The matrix of a module, in groups of so many columns. Raises WeightsError as `Method.find` does."""
    layout = LAYOUTS[group]
    rows, half = needs(tensors, packed_name(tensors, module), (None, None))
    if half * 2 % group:
        raise WeightsError(f"{module} has {half * 2} columns, which are no groups of {group}")
    needs(tensors, f"{module}.weight_scale", (rows, half * 2 // group))
    wanted = {packed_name(tensors, module): "U8", f"{module}.weight_scale": _STORED[layout.scale_dtype]}
    for name, dtype in wanted.items():
        if tensors.dtype(name) != dtype:
            raise WeightsError(f"tensor {name!r} has type {tensors.dtype(name)}, {dtype} is known here")
    if layout.has_factors and _factor(tensors, module) is None:
        raise WeightsError(f"the checkpoint has no tensor {module + _FACTORS[0]!r}, which its quantized matrix needs")
    return Found(layout, (rows, half * 2))


def array(tensors: StoredTensors, module: str, layout: Layout, rows: int, kind: str) -> np.ndarray:
    """One of the arrays of a module's matrix, of its layout without what is around it; see `Method.array`."""
    assert isinstance(layout, CodebookLayout)
    if kind == "packed":
        return packed_pairs(nibbles(tensors.raw(packed_name(tensors, module))), layout.group)
    if kind == "scales":
        return tensors.raw(f"{module}.weight_scale")
    name = _factor(tensors, module)
    assert name is not None
    factor = tensors.read(name).astype(np.float32).reshape(1, 1)
    return np.broadcast_to(factor if name.endswith("_2") else np.float32(1) / factor, (rows, 1))


def nibbles(stored: np.ndarray) -> np.ndarray:
    """The codes in bytes uint8 [N, K / 2]: uint8 [N, K]."""
    return np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)


def packed_name(tensors: StoredTensors, module: str) -> str:
    """Of the tensor that has a module's packed numbers."""
    packed = f"{module}.weight_packed"
    return packed if packed in tensors.names() else f"{module}.weight"


def _factor(tensors: StoredTensors, module: str) -> str | None:
    return next((module + end for end in _FACTORS if module + end in tensors.names()), None)
