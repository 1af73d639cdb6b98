"""Product with a quantized weight as a Pallas-Triton kernel: the weight is read as it is stored.

A program has ``block_n`` rows of the weight and ``block_m`` rows of x, and one of ``split_k`` parts of the steps along
K (`triton_walk`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quant_matmul.tiles import Tiles
from pallas_kernels.quant_matmul.triton_walk import Tile, masked_load
from pallas_kernels.quant_matmul.walk import Walk
from pallas_kernels.quantized import CodebookWeight, ScaledWeight
from pallas_kernels.triton_call import cdiv, triton_call


def quant_matmul_triton(
    x: jax.Array,
    weight: Int4Weight | ScaledWeight | CodebookWeight,
    *,
    walk: Walk,
    x_scales: jax.Array | None = None,
    layer: jax.Array | None = None,
    tiles: Tiles,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`quant_matmul_reference`, as a kernel, for weights of which `walk_of` knows a way.

    With ``layer``, an i32 scalar, weight is a stack [L, N, K] of which that layer is meant: the kernel reads it in
    place, where a slice would first be copied. With ``split_k`` above 1 the parts, f32 [split_k, M, N], are summed by
    XLA, always in the same order.

    Args:
        x: [M, K]; where the walk is native in the type of the weight's values.
        x_scales: f32 [M, groups], of x in eight bits.
    """
    (rows, _), n, split, out_dtype = x.shape, weight.shape[-2], tiles.split_k, out_dtype or x.dtype
    table = None
    if isinstance(weight, CodebookWeight):
        table = np.asarray(weight.table, np.float32)
    stacked = weight if layer is not None else jax.tree.map(lambda leaf: leaf[None], weight)
    place = jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1).astype(jnp.int32)
    operands, tree = jax.tree.flatten((x, x_scales, stacked, table, place))

    def kernel(*refs: Any) -> None:
        *inputs, out_ref = refs
        read: Any = tree.unflatten(inputs)
        _kernel(*read, out_ref, tiles=tiles, walk=walk)  # pyright: ignore[reportCallIssue]

    out = triton_call(
        kernel,
        name=f"quant_matmul_{tiles.block_m}x{tiles.block_n}_split{split}_step{walk.step}",
        out_shape=jax.ShapeDtypeStruct((split, rows, n), out_dtype if split == 1 else jnp.float32),
        # rows of x first: programs that share a block of the weight run together
        grid=(cdiv(rows, tiles.block_m), cdiv(n, tiles.block_n), split),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )(*operands)
    return out[0] if split == 1 else jnp.sum(out, axis=0).astype(out_dtype)


def _kernel(
    x_ref: Any,
    x_scales_ref: Any,
    weight: Any,
    table_ref: Any,
    place_ref: Any,
    out_ref: Any,
    *,
    tiles: Tiles,
    walk: Walk,
) -> None:
    """x_ref: [M, K]. x_scales_ref: [M, groups]. weight: of references to a stack [L, N, K]. table_ref: float32 [16].
    place_ref: i32 [1]. out_ref: [split_k, M, N]."""
    _, m, n = out_ref.shape
    part = pl.program_id(2)
    first_row = pl.program_id(0) * tiles.block_m
    first_column = pl.program_id(1) * tiles.block_n
    row_mask = first_row + jnp.arange(tiles.block_m) < m
    column_mask = first_column + jnp.arange(tiles.block_n) < n
    rows, columns = pl.ds(first_row, tiles.block_m), pl.ds(first_column, tiles.block_n)
    tile = Tile(
        walk=walk,
        weight=weight,
        table=table_ref,
        place=place_ref[0],
        rows=columns,
        mask=column_mask,
        load_x=functools.partial(load_x, x_ref, rows, row_mask),
        load_x_scale=None if x_scales_ref is None else functools.partial(load_x_scale, x_scales_ref, rows, row_mask),
    )
    per_part = cdiv(walk.steps, tiles.split_k)
    first = part * per_part
    out = tile.product(tiles.block_m, first, jnp.minimum(walk.steps - first, per_part))
    plt.store(
        out_ref.at[part, rows, columns], out.T.astype(out_ref.dtype), mask=row_mask[:, None] & column_mask[None, :]
    )


def load_x(x_ref: Any, rows: Any, mask: jax.Array, first: Any, size: int) -> jax.Array:
    """[rows, size] of x_ref [M, K] from the number ``first`` of K on; zeros where ``mask`` [rows] has none, and behind
    K."""
    inside = mask[:, None]
    if x_ref.shape[1] % size:
        inside = inside & (first + jnp.arange(size) < x_ref.shape[1])[None, :]
    return masked_load(x_ref.at[rows, pl.ds(first, size)], inside)


def load_x_scale(scales_ref: Any, rows: Any, mask: jax.Array, group: Any) -> jax.Array:
    """float32 [rows] of scales_ref [M, groups]."""
    return masked_load(scales_ref.at[rows, group], mask)
