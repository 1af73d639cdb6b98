"""A matrix of one layer, read where those of all layers lie, on a CPU: by kernels, and without one for a single row.

There a step of one token does little but read weights. XLA:CPU copies a layer's matrix out of the stack before it
multiplies it, and has no good product of one bfloat16 row; elementwise operations it compiles to loops that read the
stack as it is, in vectors and on all cores. Such a loop has the in-features in parts as wide as a few vectors, which
are multiplied and added up lane by lane; what the lanes hold is added up in the end. (In bfloat16, SmolLM2's layers: 8
ms instead of 14; its head: 2.9 instead of 4. In float32, the layers of Gemma 3 270M: 45 instead of 63.)

bfloat16 numbers are read as uint16: a slice of a bfloat16 array XLA:CPU widens to float32 and narrows again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quantized import Quantized, ScaledWeight, index, is_quantized
from pallas_kernels.storage import from_storage

#: in-features come in multiples of it: a vector
LANES = 16
#: most parts of the in-features, each a term of the compiled loop: more of them take longer to compile, fewer leave
#: more lanes to be added up
MAX_PARTS = 36
#: whose numbers can be read so
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedMatrix:
    """[out, in] of a layer: what `linear` takes in place of a weight, for x of one row, or of several where the weight
    has a kernel (`pallas_kernels.dense_matmul`, `pallas_kernels.packed_matmul`).
    """

    #: [L, out, in]: what has a kernel; else float32, or uint16, the bits of bfloat16, or quantized
    stored: jax.Array | Quantized
    #: i32 [], unknown to the compiler; None: of all layers
    layer: jax.Array | None = None
    #: [out, in], the same for x of several rows; None: there is no such x, or the weight has a kernel
    several: jax.Array | None = None

    def of_layer(self, layer: jax.Array) -> StackedMatrix:
        return dataclasses.replace(self, layer=layer)

    @property
    def has_one_row_product(self) -> bool:
        """Whether `one_row_product` takes it: what has a kernel as a whole may be split into parts without one."""
        if is_quantized(self.stored):
            return can_be_read(self.stored)
        stored: Any = self.stored
        return stored.dtype != jnp.bfloat16 and stored.shape[-1] % LANES == 0

    def whole(self) -> jax.Array | Quantized:
        """The layer's matrix by itself: it is copied, where it is not at hand."""
        if self.several is not None:
            return self.several
        assert self.layer is not None
        return index(self.stored, self.layer)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneOfStacks:
    """[out, in] of a layer of which it is unknown to the compiler in which of several stacks it lies: what `linear`
    takes where layers that are scanned together have matrices of different forms.
    """

    #: matrices of one layer each: a `StackedMatrix`, or a tree of them
    stacks: tuple[Any, ...]
    #: i32 [], the one that is meant; the layers of the others mean nothing
    which: jax.Array


def can_be_read(weight: Any) -> bool:
    """Whether a weight [L, out, in] or [out, in] can be a `StackedMatrix`, and its parts are narrow: lanes that are as
    wide as a row cost more than they save.
    """
    in_features = weight.shape[-1]
    if isinstance(weight, Int4Weight):
        return weight.group_size // 2 % LANES == 0
    if isinstance(weight, ScaledWeight):
        if not weight.one_scale_a_row or weight.values.dtype != jnp.int8:
            return False
    elif is_quantized(weight) or weight.dtype not in DTYPES:
        return False
    if in_features % LANES:
        return False
    width = _part_width(in_features)
    return width <= 4 * LANES or width * 8 <= in_features


def one_row_product(x: jax.Array, weight: StackedMatrix) -> jax.Array:
    """``x [1, in] @ weight [out, in].T`` -> float32 [1, out], accumulated in float32."""
    _, out_features, in_features = weight.stored.shape
    assert x.shape == (1, in_features) and weight.layer is not None
    row = x[0].astype(jnp.float32)
    if isinstance(weight.stored, Int4Weight):
        return _four_bit_product(row, weight.stored, weight.layer)
    stored: Any = weight.stored.values if isinstance(weight.stored, ScaledWeight) else weight.stored
    width = _part_width(in_features)
    lanes = jnp.zeros((out_features, width))
    for first in range(0, in_features, width):
        # out of the whole stack, not out of a layer's matrix: that would be copied, and widened as a whole
        part = lax.dynamic_slice(stored, (weight.layer, 0, first), (1, out_features, width))[0]
        lanes += from_storage(part, lanes.dtype) * row[first : first + width]
    product = _sum(lanes)
    if isinstance(weight.stored, ScaledWeight):
        scales = lax.dynamic_index_in_dim(weight.stored.scales, weight.layer, keepdims=False)
        product *= scales[:, 0].astype(product.dtype)
    return product[None]


def _four_bit_product(row: jax.Array, weight: Int4Weight, layer: jax.Array) -> jax.Array:
    """float32 [1, out]. A group's bytes are the lanes, of which each has a number in its low and one in its high bits;
    what the zero points make is taken off in the end.
    """
    _, out_features, half_row = weight.packed.shape
    half, groups = weight.group_size // 2, weight.scales.shape[-2]
    scales, zeros = (lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (weight.scales, weight.zeros))
    scales = scales.astype(jnp.float32)
    parts = row.reshape(groups, 2, half)

    def some(first: jax.Array | int, count: int) -> jax.Array:
        """Of so many groups: float32 [out]."""
        lanes = jnp.zeros((out_features, half))
        for i in range(count):
            group = first + i
            part = lax.dynamic_slice(weight.packed, (layer, 0, group * half), (1, out_features, half))[0]
            low, high = (codes.astype(jnp.float32) for codes in (part & 15, part >> 4))
            lanes += (low * parts[group, 0] + high * parts[group, 1]) * scales[group][:, None]
        return _sum(lanes)

    whole, rest = divmod(groups, MAX_PARTS)
    product = some(whole * MAX_PARTS, rest) if rest else jnp.zeros(out_features)
    if whole:
        product += lax.fori_loop(
            0, whole, lambda i, y: y + some(i * MAX_PARTS, MAX_PARTS), jnp.zeros(out_features, jnp.float32)
        )
    taken_off = jnp.sum(scales * zeros.astype(jnp.float32) * jnp.sum(parts, axis=(1, 2))[:, None], axis=0)
    return (product - taken_off)[None]


def _sum(lanes: jax.Array) -> jax.Array:
    """[out, width] -> [out]"""
    ones = jnp.ones((lanes.shape[1], 1))
    return lax.dot_general(lanes, ones, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)[:, 0]


def _part_width(in_features: int) -> int:
    """The narrowest that needs no more than `MAX_PARTS` parts."""
    widths = range(LANES, in_features + 1, LANES)
    return next(width for width in widths if in_features % width == 0 and in_features <= width * MAX_PARTS)
