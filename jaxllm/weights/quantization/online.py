"""Quantization of an unquantized checkpoint while it is read: no device, and no more of the host than a few rows, ever
has the matrix as it was.

The largest number of a row, or of a group of its columns, becomes the largest that the format has. Matrices that cannot
be cut into groups stay as they are, and so do embeddings, heads, routers, and stacked experts whose tensors are called
otherwise than ``.weight``.
"""

from __future__ import annotations

import math

import numpy as np

from jaxllm.layers.weight_storage import CodebookLayout, Int4Layout, Layout, RoundedInputsLayout, ScaledLayout
from jaxllm.weights.quantization.bitsandbytes import BLOCK, NF4
from jaxllm.weights.quantization.fp8 import FLOAT8
from jaxllm.weights.quantization.method import HEADS, Found, Method, StoredTensors, inner, packed_pairs

#: columns that share a scale, the best first
INT4_GROUPS = (128, 64, 32)
LARGEST = {"int8": 127.0, FLOAT8: 448.0}


class Online(Method):
    """To "int8" with a scale a row; to "fp8" with one, and inputs in eight bits, too, with a scale a token; to "int4"
    in groups of 128, or fewer where these do not divide a row, with zero points; to "nf4" as bitsandbytes does, in
    groups of 64.
    """

    tensors = ()
    markers = ()
    whole_matrices = False
    in_files = False

    def __init__(self, name: str, *, only_experts: bool = False):
        own = "bitsandbytes" if name == "nf4" else name
        self.name = f"experts_{name}" if only_experts else own  # pyright: ignore[reportAttributeAccessIssue]
        self._form, self.only_experts = name, only_experts  # pyright: ignore[reportAttributeAccessIssue]

    def find(self, tensors: StoredTensors) -> dict[str, Found]:
        """Every matrix, of which those are quantized that `planned` takes."""
        return {}

    def look(self, tensors: StoredTensors, module: str) -> Found:
        raise AssertionError("no checkpoint has them")

    def planned(self, name: str, shape: tuple[int, int]) -> Layout | None:
        if name.startswith(HEADS) or not name.endswith(".weight") or name.endswith(".kv_b_proj.weight"):
            return None
        if self._form == "int4":
            group = next((group for group in INT4_GROUPS if shape[1] % group == 0), None)
            return None if group is None else Int4Layout(group=group, scale_dtype="float16")
        if self._form == "nf4":
            group = math.gcd(shape[1], BLOCK)
            return None if group % 2 else CodebookLayout(table=NF4, group=group, scale_dtype="float32")
        if self._form == "int8":
            return ScaledLayout(dtype="int8", group=0, scale_dtype="float32")
        own = ScaledLayout(dtype=FLOAT8, group=0, scale_dtype="float32")
        return RoundedInputsLayout(layout=own, dtype=FLOAT8)

    def array(
        self, tensors: StoredTensors, name: str, found: Found, kind: str, rows: slice, within: int | None
    ) -> np.ndarray:
        return rounded(tensors.read(name, rows, within).astype(np.float32), found.layout, kind)


def rounded(matrix: np.ndarray, layout: Layout, kind: str) -> np.ndarray:
    """One of the arrays of a layout that hold what a matrix is rounded to.

    Args:
        matrix: float32 [N, K].
        kind: a name of `Layout.shapes`.
    """
    layout = inner(layout)
    if isinstance(layout, Int4Layout):
        return _int4(matrix, layout.group, kind)
    if isinstance(layout, CodebookLayout):
        return _codebook(matrix, layout, kind)
    assert isinstance(layout, ScaledLayout)
    largest = LARGEST[layout.dtype]
    scales = (np.abs(matrix).max(axis=1, keepdims=True) / np.float32(largest)).astype(layout.scale_dtype)
    if kind == "scales":
        return scales
    scales = scales.astype(np.float32)
    scaled = np.clip(matrix / np.where(scales == 0, np.float32(1), scales), -largest, largest)
    return np.rint(scaled).astype(np.int8) if layout.dtype == "int8" else scaled.astype(layout.dtype)


def _int4(matrix: np.ndarray, group: int, kind: str) -> np.ndarray:
    """From the lowest number of a group to its highest in fifteen steps, zero among them."""
    rows, columns = matrix.shape
    groups = matrix.reshape(rows, columns // group, group)
    low, high = groups.min(axis=2).clip(max=0), groups.max(axis=2).clip(min=0)
    scales = ((high - low) / np.float32(15)).astype(np.float16)
    steps = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
    zeros = np.rint(-low / steps).clip(0, 15)
    if kind == "scales":
        return scales
    if kind == "zeros":
        return zeros.astype(np.uint8)
    codes = (np.rint(groups / steps[:, :, None]) + zeros[:, :, None]).clip(0, 15)
    return packed_pairs(codes.astype(np.uint8).reshape(rows, columns), group)


def _codebook(matrix: np.ndarray, layout: CodebookLayout, kind: str) -> np.ndarray:
    """The nearest of the table's numbers, which ascend, where the largest of a group is 1."""
    rows, columns = matrix.shape
    groups = matrix.reshape(rows, columns // layout.group, layout.group)
    scales = np.abs(groups).max(axis=2)
    if kind == "scales":
        return scales
    table = np.asarray(layout.table, np.float32)
    shares = groups / np.where(scales == 0, np.float32(1), scales)[:, :, None]
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, shares)
    return packed_pairs(codes.astype(np.uint8).reshape(rows, columns), layout.group)
