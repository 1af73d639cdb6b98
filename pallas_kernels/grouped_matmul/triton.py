"""Grouped matrix product as one Pallas-Triton kernel: every tile of rows belongs to one group.

Where the groups end is known only on the device, so the grid is the most tiles that any sizes can need, and each
program finds its tile: with ``block_m = 4`` and ``group_sizes = [5, 0, 3]`` of ten rows,

    sizes, the remainder last   5  0  3  2
    tiles                       2  0  1  1     running sum 2 2 3 4
    tile                        0     1     2     3     4
    group = how many sums <= it 0     0     2     3     4
    rows                        0..3  4     5..7  8..9  none

The remainder (rows that belong to nobody) is a group whose programs write zeros without reading anything; programs
beyond the last tile end at once. A group without rows has no tile, so its weight is never read.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.grouped_matmul.tiles import Tiles, max_tiles
from pallas_kernels.triton_call import cdiv, next_power_of_two, triton_call

#: tiles of rows that take turns on one block of columns, so that they find its weights in the L2 cache
TILES_IN_TURN = 8


def grouped_matmul_triton(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    layer: jax.Array | None = None,
    tiles: Tiles,
    interpret: bool = False,
) -> jax.Array:
    """`grouped_matmul_reference`, as a kernel.

    With ``layer``, an i32 scalar, w is [L, E, N, K] and ``w[layer]`` is meant: the kernel reads it in place, where a
    slice would first be copied.
    """
    stacked = w if layer is not None else w[None]
    _, groups, n, k = stacked.shape
    rows = x.shape[0]
    columns = cdiv(n, tiles.block_n)
    # the remainder is one more group
    row_tiles = max_tiles(rows, groups + 1, tiles.block_m)
    kernel = functools.partial(_kernel, tiles=tiles, row_tiles=row_tiles)
    return triton_call(
        kernel,
        name=f"grouped_matmul_{tiles.block_m}x{tiles.block_n}x{tiles.block_k}",
        out_shape=jax.ShapeDtypeStruct((rows, n), x.dtype),
        grid=(row_tiles * columns,),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )(x, stacked, group_sizes, jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1).astype(jnp.int32))


def _kernel(x_ref: Any, w_ref: Any, sizes_ref: Any, layer_ref: Any, out_ref: Any, *, tiles: Tiles, row_tiles: int):
    """x_ref: [M, K]. w_ref: [L, E, N, K]. sizes_ref: i32 [E]. layer_ref: i32 [1]. out_ref: [M, N]."""
    m, k = x_ref.shape
    _, groups, n, _ = w_ref.shape
    tile, column = in_turn(pl.program_id(0), row_tiles, cdiv(n, tiles.block_n))
    group, start, end = find_tile(tile, sizes_ref, rows=m, groups=groups, block_m=tiles.block_m)
    rows = start + jnp.arange(tiles.block_m)
    row_mask = (rows < end)[:, None]
    first_column = column * tiles.block_n
    columns = first_column + jnp.arange(tiles.block_n)
    column_mask = columns < n
    expert = jnp.minimum(group, groups - 1)
    layer = layer_ref[0]
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def add(step: Any, acc: jax.Array) -> jax.Array:
        first = step * tiles.block_k
        x_mask, w_mask = row_mask, column_mask[:, None]
        if k % tiles.block_k:
            inside = (first + jnp.arange(tiles.block_k) < k)[None, :]
            x_mask, w_mask = x_mask & inside, w_mask & inside
        window = pl.ds(first, tiles.block_k)
        x = plt.load(x_ref.at[pl.ds(start, tiles.block_m), window], mask=x_mask, other=0.0)
        w = plt.load(w_ref.at[layer, expert, pl.ds(first_column, tiles.block_n), window], mask=w_mask, other=0.0)
        return acc + plt.dot(x, w, trans_b=True, precision=precision)

    steps = (group < groups).astype(jnp.int32) * cdiv(k, tiles.block_k)
    acc = lax.fori_loop(0, steps, add, jnp.zeros((tiles.block_m, tiles.block_n), jnp.float32))
    target = out_ref.at[pl.ds(start, tiles.block_m), pl.ds(first_column, tiles.block_n)]
    plt.store(target, acc.astype(out_ref.dtype), mask=row_mask & column_mask[None, :])


def in_turn(program: Any, row_tiles: int, columns: int) -> tuple[Any, Any]:
    """(tile of rows, block of columns) of a program: `TILES_IN_TURN` tiles go through the columns together."""
    turn = TILES_IN_TURN * columns
    first = program // turn * TILES_IN_TURN
    together = jnp.minimum(row_tiles - first, TILES_IN_TURN)
    within = program % turn
    return first + within % together, within // together


def find_tile(tile: Any, sizes_ref: Any, *, rows: int, groups: int, block_m: int) -> tuple[Any, Any, Any]:
    """(group, first row, end of the group's rows) of a tile; groups: the remainder; beyond it: no rows."""
    padded = next_power_of_two(groups + 1)
    index = jnp.arange(padded)
    sizes = plt.load(sizes_ref.at[pl.ds(0, padded)], mask=index < groups, other=0)
    sizes = jnp.where(index == groups, rows - jnp.sum(sizes), sizes)
    tiles = (sizes + (block_m - 1)) // block_m
    group = jnp.sum((lax.cumsum(tiles) <= tile).astype(jnp.int32))
    before = index < group
    first = jnp.sum(jnp.where(before, sizes, 0))
    end = first + jnp.sum(jnp.where(index == group, sizes, 0))
    return group, first + (tile - jnp.sum(jnp.where(before, tiles, 0))) * block_m, end
