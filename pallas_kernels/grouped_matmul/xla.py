"""Grouped matrix product by XLA: a scan over tiles of rows, each one dense product with its own group's weight.

Not `lax.ragged_dot`: XLA expands that to one product of all rows per group. Measured on two CPU cores, 64 experts of
[768, 1024] in bfloat16: 8 rows 309 ms, 2048 rows 3.8 s; this scan takes 3 ms and 48 ms.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.tiles import max_tiles
from pallas_kernels.quantized import Quantized, dense, index

#: rows of a tile: where groups are large, more of them use a weight that has been fetched
LEAST_ROWS, MOST_ROWS = 8, 128


def grouped_matmul_xla(
    x: jax.Array, w: jax.Array | Quantized, group_sizes: jax.Array, *, layer: jax.Array | None = None
) -> jax.Array:
    """`grouped_matmul_reference`; with ``layer``, an i32 scalar, of that layer of a stack [L, E, N, K], which is read
    in place. Weights of groups without rows are not read, and of quantized ones a group's own is made. Differentiable
    in x and w."""
    *stack, n, _ = w.shape
    groups = stack[-1]
    # all layers' experts, one after the other
    experts = jax.tree.map(lambda array: array.reshape(-1, *array.shape[len(stack) :]), w)
    first_expert = 0 if layer is None else layer * groups
    rows = x.shape[0]
    block = min(MOST_ROWS, max(LEAST_ROWS, 1 << (rows // groups).bit_length()))
    tiles = (group_sizes + (block - 1)) // block
    ends, tile_ends = jnp.cumsum(group_sizes), jnp.cumsum(tiles)
    # the last tile of the last group may reach beyond the rows that there are
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def multiply(out: jax.Array, tile: jax.Array) -> jax.Array:
        group = jnp.sum(tile_ends <= tile)
        within = tile - (tile_ends[group] - tiles[group])
        start = ends[group] - group_sizes[group] + within * block
        own = (start + jnp.arange(block) < ends[group])[:, None]
        y = lax.dot_general(
            # rows of nobody may be NaN, which would reach the weight's gradient
            jnp.where(own, lax.dynamic_slice_in_dim(padded, start, block), 0),
            dense(index(experts, first_expert + group), x.dtype),
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        # what follows the group's own rows is the next tile's to write, or stays zero
        return lax.dynamic_update_slice_in_dim(out, jnp.where(own, y, 0), start, 0)

    def next_tile(out: jax.Array, tile: jax.Array) -> tuple[jax.Array, None]:
        return lax.cond(tile < tile_ends[-1], multiply, lambda out, _: out, out, tile), None

    zeros = jnp.zeros((rows + block, n), jnp.float32)
    out, _ = lax.scan(next_tile, zeros, jnp.arange(max_tiles(rows, groups, block)))
    return out[:rows].astype(x.dtype)
