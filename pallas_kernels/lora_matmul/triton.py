"""What adapters add to a product as two Pallas-Triton kernels, grouped by slot.

The first makes `low`, a's product of each row, the second b's product of that. A tile of rows is multiplied by the
matrices of each slot that has a row in it, and of no other, and the rows of other slots are left out on both sides. So
a slot's matrices are read once a tile, rows need no sorting, and nothing is gathered: in a step of single tokens all
rows are one tile; in prompts, whose tokens lie side by side, a tile has one slot or two.

    rows of a tile    0 1 2 3 4 5 6 7
    slots             2 2 0 2 - 0 0 2
    first kernel      programs of slot 0 write rows 2 5 6, those of slot 2 write 0 1 3 7, those of slot 1 end at once
    second kernel     a program goes through slots 0, 1, 2 and chooses each row's own; row 4 is zeros

With few rows the in-features are split, whose sums the second kernel adds up, always in the same order.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.lora_matmul.tiles import Tiles
from pallas_kernels.triton_call import cdiv, triton_call


def lora_matmul_triton(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    slots: jax.Array,
    parts: tuple[int, ...],
    *,
    layer: jax.Array | None = None,
    tiles: Tiles,
    interpret: bool = False,
) -> jax.Array:
    """`lora_matmul_reference`, as kernels; whatever belongs to other slots may be NaN.

    With ``layer``, an i32 scalar, a and b are stacks of which that layer is meant: they are read in place, where a
    slice would first be copied.
    """
    place = jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1).astype(jnp.int32)
    a, b = (array.reshape(math.prod(array.shape[:-3]), *array.shape[-3:]) for array in (a, b))
    rows, (_, num_slots, ranks, _), features = x.shape[0], a.shape, b.shape[-1]
    # adapters are exact in the wider type, and x is: what is multiplied is either's
    dtype = jnp.promote_types(x.dtype, a.dtype)
    call = functools.partial(triton_call, num_warps=tiles.num_warps, num_stages=tiles.num_stages, interpret=interpret)
    low = call(
        functools.partial(_low_kernel, tiles=tiles, dtype=dtype),
        name=f"lora_matmul_low_{tiles.block_t}x{tiles.block_r}x{tiles.block_k}_split{tiles.split_k}",
        out_shape=jax.ShapeDtypeStruct((tiles.split_k, rows, ranks), jnp.float32),
        grid=(cdiv(rows, tiles.block_t), num_slots * tiles.split_k, cdiv(ranks, tiles.block_r)),
    )(x, a, slots, place)
    columns = sum(cdiv(size, tiles.block_n) for size in parts)
    return call(
        functools.partial(_out_kernel, tiles=tiles, dtype=dtype, parts=parts),
        name=f"lora_matmul_out_{tiles.block_t}x{tiles.block_n}x{tiles.block_r}",
        out_shape=jax.ShapeDtypeStruct((rows, features), jnp.float32),
        grid=(cdiv(rows, tiles.block_t), columns),
    )(low, b, slots, place)


def _low_kernel(
    x_ref: Any, a_ref: Any, slots_ref: Any, place_ref: Any, low_ref: Any, *, tiles: Tiles, dtype: jnp.dtype
) -> None:
    """x_ref: [T, K]. a_ref: [L, S, R, K]. slots_ref: i32 [T]. place_ref: i32 [1]. low_ref: f32 [split_k, T, R]."""
    k, ranks = x_ref.shape[1], a_ref.shape[2]
    slot, part = pl.program_id(1) // tiles.split_k, pl.program_id(1) % tiles.split_k
    rows, own = _rows_of(slots_ref, pl.program_id(0), tiles.block_t)
    own = own == slot
    first_rank = pl.program_id(2) * tiles.block_r
    rank_window = pl.ds(first_rank, tiles.block_r)
    rank_mask = first_rank + jnp.arange(tiles.block_r) < ranks
    steps_of_part = cdiv(cdiv(k, tiles.block_k), tiles.split_k)
    first_step = part * steps_of_part

    def add(step: Any, acc: jax.Array) -> jax.Array:
        first = (first_step + step) * tiles.block_k
        window = pl.ds(first, tiles.block_k)
        inside = (first + jnp.arange(tiles.block_k) < k)[None, :]
        x = plt.load(x_ref.at[rows, window], mask=own[:, None] & inside, other=0.0)
        a = plt.load(a_ref.at[place_ref[0], slot, rank_window, window], mask=rank_mask[:, None] & inside, other=0.0)
        return acc + _dot(x.astype(dtype), a.astype(dtype), turned=True)

    # without a row of the slot nothing is read
    steps = jnp.max(own.astype(jnp.int32)) * steps_of_part
    low = lax.fori_loop(0, steps, add, jnp.zeros((tiles.block_t, tiles.block_r), jnp.float32))
    plt.store(low_ref.at[part, rows, rank_window], low, mask=own[:, None] & rank_mask[None, :])


def _out_kernel(
    low_ref: Any,
    b_ref: Any,
    slots_ref: Any,
    place_ref: Any,
    out_ref: Any,
    *,
    tiles: Tiles,
    dtype: jnp.dtype,
    parts: tuple[int, ...],
) -> None:
    """low_ref: f32 [split_k, T, P * r]. b_ref: [L, S, r, N]. slots_ref: i32 [T]. place_ref: i32 [1]. out_ref: f32
    [T, N]."""
    rank = b_ref.shape[2]
    rows, slots = _rows_of(slots_ref, pl.program_id(0), tiles.block_t)
    first_column, behind, first_low = _columns_of(pl.program_id(1), parts, tiles.block_n, rank)
    columns = pl.ds(first_column, tiles.block_n)
    column_mask = first_column + jnp.arange(tiles.block_n) < behind

    def add_slot(slot: Any, out: jax.Array) -> jax.Array:
        own = slots == slot
        # of a slot without a row in the tile every load is masked
        any_own = jnp.max(own.astype(jnp.int32)) > 0

        def add_ranks(step: Any, acc: jax.Array) -> jax.Array:
            first = step * tiles.block_r
            inside = first + jnp.arange(tiles.block_r) < rank
            mask = own[:, None] & inside[None, :]

            def add_part(part: Any, low: jax.Array) -> jax.Array:
                at = low_ref.at[part, rows, pl.ds(first_low + first, tiles.block_r)]
                return low + plt.load(at, mask=mask, other=0.0)

            low = lax.fori_loop(0, tiles.split_k, add_part, jnp.zeros((tiles.block_t, tiles.block_r), jnp.float32))
            at = b_ref.at[place_ref[0], slot, pl.ds(first, tiles.block_r), columns]
            b = plt.load(at, mask=inside[:, None] & (column_mask & any_own)[None, :], other=0.0)
            return acc + _dot(low.astype(dtype), b.astype(dtype), turned=False)

        zeros = jnp.zeros((tiles.block_t, tiles.block_n), jnp.float32)
        return jnp.where(own[:, None], lax.fori_loop(0, cdiv(rank, tiles.block_r), add_ranks, zeros), out)

    # slots that the tile has; with none of them the loop is empty
    least = jnp.min(jnp.where(slots < 0, b_ref.shape[1], slots))
    out = lax.fori_loop(least, jnp.max(slots) + 1, add_slot, jnp.zeros((tiles.block_t, tiles.block_n), jnp.float32))
    row_mask = pl.program_id(0) * tiles.block_t + jnp.arange(tiles.block_t) < out_ref.shape[0]
    plt.store(out_ref.at[rows, columns], out, mask=row_mask[:, None] & column_mask[None, :])


def _rows_of(slots_ref: Any, tile: Any, block_t: int) -> tuple[Any, jax.Array]:
    """The window of a tile's rows, and their slots; -1 behind the last."""
    first = tile * block_t
    inside = first + jnp.arange(block_t) < slots_ref.shape[0]
    rows = pl.ds(first, block_t)
    return rows, plt.load(slots_ref.at[rows], mask=inside, other=-1)


def _columns_of(program: Any, parts: tuple[int, ...], block_n: int, rank: int) -> tuple[Any, Any, Any]:
    """(first out-feature of a program, the one behind its part's last, first number of `low` that the part takes)."""
    first, behind, first_low = jnp.int32(0), jnp.int32(0), jnp.int32(0)
    blocks = start = 0
    for number, size in enumerate(parts):
        of_part = program >= blocks
        first = jnp.where(of_part, start + (program - blocks) * block_n, first)
        behind = jnp.where(of_part, start + size, behind)
        first_low = jnp.where(of_part, number * rank, first_low)
        blocks, start = blocks + cdiv(size, block_n), start + size
    return first, behind, first_low


def _dot(x: jax.Array, weight: jax.Array, *, turned: bool) -> jax.Array:
    """x [T, K] by weight [K, N], or, turned, [N, K]."""
    return plt.dot(x, weight, trans_b=turned, precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)
