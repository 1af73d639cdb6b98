"""Product with a four-bit weight as a Pallas-Triton kernel: the weight is read as it is stored.

A program has ``block_n`` rows of the weight and ``block_m`` rows of x, and goes through its groups of K. Of each group
it takes the bytes [block_n, g / 2] once, and multiplies the low halves with the first half of the group of x and the
high halves with the second (see `layout`). What enters a product is ``q - zero``, an integer from -16 to 15, exact in
any type; the scale multiplies the group's float32 sum. So nothing is rounded that the reference does not round.

The weight is the left operand (out^T = w x^T): it comes out of arithmetic in registers, and tensor cores take only the
left operand from there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quant_matmul.tiles import GROUP_SIZES, Tiles
from pallas_kernels.triton_call import cdiv, triton_call

#: (integer type, its bits, the number whose mantissa they end): bits | n is exactly number + n for n in 0..15.
#: An OR, where converting an integer to a float takes one of a few slow units
_MAGIC = {
    "bfloat16": (jnp.uint16, 0x4300, 128),
    "float16": (jnp.uint16, 0x6400, 1024),
    "float32": (jnp.uint32, 0x4B000000, 2**23),
}


def quant_matmul_triton(
    x: jax.Array,
    weight: Int4Weight,
    *,
    layer: jax.Array | None = None,
    tiles: Tiles,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`quant_matmul_reference`, as a kernel, for group sizes in `GROUP_SIZES`.

    With ``layer``, an i32 scalar, weight is a stack [L, N, K] of which that layer is meant: the kernel reads it in
    place, where a slice would first be copied. With ``split_k`` above 1 the parts, f32 [split_k, M, N], are summed by
    XLA, always in the same order.
    """
    if weight.group_size not in GROUP_SIZES:
        raise ValueError(f"the kernel takes groups of {GROUP_SIZES} elements, got {weight.group_size}")
    if x.dtype.name not in _MAGIC:
        raise ValueError(f"x must be one of {tuple(_MAGIC)}, got {x.dtype}")
    stacked = weight if layer is not None else jax.tree.map(lambda leaf: leaf[None], weight)
    rows, n, out_dtype = x.shape[0], stacked.shape[1], out_dtype or x.dtype
    split = tiles.split_k
    kernel = functools.partial(_kernel, tiles=tiles, group_size=weight.group_size)
    out = triton_call(
        kernel,
        name=f"quant_matmul_{tiles.block_m}x{tiles.block_n}_split{split}_group{weight.group_size}",
        out_shape=jax.ShapeDtypeStruct((split, rows, n), out_dtype if split == 1 else jnp.float32),
        # rows of x first: programs that share a block of the weight run together
        grid=(cdiv(rows, tiles.block_m), cdiv(n, tiles.block_n), split),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )(
        x,
        stacked.packed,
        stacked.scales,
        stacked.zeros,
        jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1).astype(jnp.int32),
    )
    return out[0] if split == 1 else jnp.sum(out, axis=0).astype(out_dtype)


def _kernel(
    x_ref: Any,
    packed_ref: Any,
    scales_ref: Any,
    zeros_ref: Any,
    layer_ref: Any,
    out_ref: Any,
    *,
    tiles: Tiles,
    group_size: int,
) -> None:
    """x_ref: [M, K]. packed_ref: uint8 [L, N, K / 2]. scales_ref, zeros_ref: [L, K / g, N]. layer_ref: i32 [1].
    out_ref: [split_k, M, N]."""
    m, _ = x_ref.shape
    _, groups, n = scales_ref.shape
    half = group_size // 2
    part = pl.program_id(2)
    layer = layer_ref[0]
    first_row = pl.program_id(0) * tiles.block_m
    first_column = pl.program_id(1) * tiles.block_n
    row_mask = (first_row + jnp.arange(tiles.block_m) < m)[:, None]
    column_mask = first_column + jnp.arange(tiles.block_n) < n
    rows, columns = pl.ds(first_row, tiles.block_m), pl.ds(first_column, tiles.block_n)
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    integers, bits, number = _MAGIC[x_ref.dtype.name]

    def product(q: jax.Array, zero: jax.Array, first: Any) -> jax.Array:
        """[block_n, block_m]: half a group's integers by its half of x."""
        x = plt.load(x_ref.at[rows, pl.ds(first, half)], mask=row_mask, other=0.0)
        centred = lax.bitcast_convert_type(q | integers(bits), x_ref.dtype) - zero
        return plt.dot(centred, x, trans_b=True, precision=precision)

    def of_group(group: Any) -> tuple[jax.Array, jax.Array]:
        """The group's scales and zeros, [block_n]."""
        scale = plt.load(scales_ref.at[layer, group, columns], mask=column_mask, other=0.0)
        return scale, plt.load(zeros_ref.at[layer, group, columns], mask=column_mask, other=0)

    def add_group(step: Any, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        acc, scale, zero = carry
        group = first_group + step
        packed = plt.load(
            packed_ref.at[layer, columns, pl.ds(group * half, half)], mask=column_mask[:, None], other=0
        ).astype(integers)
        shifted_zero = (zero.astype(jnp.float32) + number).astype(x_ref.dtype)[:, None]
        low = product(packed & integers(15), shifted_zero, group * group_size)
        high = product(packed >> integers(4), shifted_zero, group * group_size + half)
        # Triton loads the wide tiles ahead of their use by itself, but nothing as narrow as these
        return acc + (low + high) * scale.astype(jnp.float32)[:, None], *of_group(jnp.minimum(group + 1, groups - 1))

    per_part = cdiv(groups, tiles.split_k)
    first_group = part * per_part
    steps = jnp.minimum(groups - first_group, per_part)
    zeros = jnp.zeros((tiles.block_n, tiles.block_m), jnp.float32)
    acc, _, _ = lax.fori_loop(0, steps, add_group, (zeros, *of_group(jnp.minimum(first_group, groups - 1))))
    plt.store(out_ref.at[part, rows, columns], acc.T.astype(out_ref.dtype), mask=row_mask & column_mask[None, :])
