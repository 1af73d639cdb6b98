"""Grouped matrix product with quantized weights: a tile of rows finds its group as in `triton`, and walks its weight,
as it is stored, as in `quant_matmul.triton_walk`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.grouped_matmul.tiles import max_tiles
from pallas_kernels.grouped_matmul.triton import find_tile, in_turn
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quant_matmul.tiles import Tiles
from pallas_kernels.quant_matmul.triton import load_x, load_x_scale
from pallas_kernels.quant_matmul.triton_walk import Tile
from pallas_kernels.quant_matmul.walk import Walk
from pallas_kernels.quantized import CodebookWeight, ScaledWeight
from pallas_kernels.triton_call import cdiv, triton_call


def grouped_matmul_triton_quantized(
    x: jax.Array,
    w: Int4Weight | ScaledWeight | CodebookWeight,
    group_sizes: jax.Array,
    *,
    walk: Walk,
    x_scales: jax.Array | None = None,
    layer: jax.Array | None = None,
    tiles: Tiles,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`grouped_matmul_reference` of the weights' values, as a kernel.

    Args:
        w: [E, N, K]; with ``layer``, an i32 scalar, a stack of them, which is read in place.
        x_scales: f32 [M, groups], of x in eight bits.
        tiles: of which K is not split.
        out_dtype: None: x's.
    """
    *stack, n, _ = w.shape
    rows, groups = x.shape[0], stack[-1]
    table = np.asarray(w.table, np.float32) if isinstance(w, CodebookWeight) else None
    matrices = jax.tree.map(lambda leaf: leaf.reshape(math.prod(stack), *leaf.shape[len(stack) :]), w)
    of_stack = jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1).astype(jnp.int32)
    operands, tree = jax.tree.flatten((x, x_scales, matrices, table, group_sizes, of_stack))
    # the remainder is one more group
    row_tiles = max_tiles(rows, groups + 1, tiles.block_m)

    def kernel(*refs: Any) -> None:
        *inputs, out_ref = refs
        read: Any = tree.unflatten(inputs)
        _kernel(*read, out_ref, tiles=tiles, walk=walk, row_tiles=row_tiles)  # pyright: ignore[reportCallIssue]

    return triton_call(
        kernel,
        name=f"grouped_matmul_{tiles.block_m}x{tiles.block_n}_step{walk.step}",
        out_shape=jax.ShapeDtypeStruct((rows, n), out_dtype or x.dtype),
        grid=(row_tiles * cdiv(n, tiles.block_n),),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )(*operands)


def _kernel(
    x_ref: Any,
    x_scales_ref: Any,
    weight: Any,
    table_ref: Any,
    sizes_ref: Any,
    layer_ref: Any,
    out_ref: Any,
    *,
    tiles: Tiles,
    walk: Walk,
    row_tiles: int,
) -> None:
    """x_ref: [M, K]. x_scales_ref: [M, groups]. weight: of references to [places, N, K]. table_ref: float32 [16].
    sizes_ref: i32 [E]. layer_ref: i32 [1]. out_ref: [M, N]."""
    m, n = out_ref.shape
    groups = sizes_ref.shape[0]
    number, column = in_turn(pl.program_id(0), row_tiles, cdiv(n, tiles.block_n))
    group, start, end = find_tile(number, sizes_ref, rows=m, groups=groups, block_m=tiles.block_m)
    row_mask = start + jnp.arange(tiles.block_m) < end
    first_column = column * tiles.block_n
    column_mask = first_column + jnp.arange(tiles.block_n) < n
    rows, columns = pl.ds(start, tiles.block_m), pl.ds(first_column, tiles.block_n)
    # of the remainder nothing is read
    own_rows = row_mask & (group < groups)
    tile = Tile(
        walk=walk,
        weight=weight,
        table=table_ref,
        place=layer_ref[0] * groups + jnp.minimum(group, groups - 1),
        rows=columns,
        mask=column_mask & (group < groups),
        load_x=functools.partial(load_x, x_ref, rows, own_rows),
        load_x_scale=None if x_scales_ref is None else functools.partial(load_x_scale, x_scales_ref, rows, own_rows),
    )
    out = tile.product(tiles.block_m, 0, (group < groups).astype(jnp.int32) * walk.steps)
    plt.store(out_ref.at[rows, columns], out.T.astype(out_ref.dtype), mask=row_mask[:, None] & column_mask[None, :])
