"""Paged attention of chunks and prompts on Hopper: TMA brings pages into shared memory, a warpgroup of matrix products
reads them from there (FlashAttention-3; Shah et al. 2024, arXiv:2407.08608).

A block of threads has one tile of consecutive queries of one sequence and one head of the keys: 128 rows, the tile's
tokens times the heads that share a key (128 // group tokens; row r is token r // group, head r % group). Two warpgroups
compute, 64 rows each; a third only fetches, page by page, into a ring of shared memory that both read:

    fetches    K0 V0 K1 V1 | wait until slot 0 is free, K2 V2 ...
    compute    wait K0, s = q k^T, free K0, softmax, wait V0, o += p v, free V0, wait K1 ...

Every row has its own bounds (`seen_from`, `seen_to`), so that causality, windows and attention both ways are one
comparison; tiles of keys that all rows see whole skip it.

Proven without a GPU: results and races in Mosaic's interpreter, machine code for sm_90a. Not measured: speed. JAX's own
flash attention in Mosaic refuses causal masks with CUDA 12.8 to 12.9.0, whose ptxas miscompiles it. Whether that
touches this kernel is not known: prefer CUDA 12.9.1 or later.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.mosaic_call import SWIZZLE_COLUMNS, WARPGROUP, WGMMA_ROWS, Registers, matrix_tile, mosaic_call
from pallas_kernels.paged_attention.mosaic_tiles import (
    FIRST,
    LAST,
    ROW,
    ROWS,
    SEQUENCE,
    WHOLE_FROM,
    WHOLE_TO,
    WRITTEN_FROM,
    WRITTEN_TO,
    Shape,
    Tiles,
    why_not,
)

COMPUTE_WARPGROUPS = ROWS // WGMMA_ROWS
FETCH = COMPUTE_WARPGROUPS  # index of the warpgroup that fetches
SLOTS = 2
NEVER = -1e30  # a masked score: finite, so that a fully masked row stays free of NaN
LOG2E = math.log2(math.e)


def prefill_attention(
    query: jax.Array,
    cache: jax.Array,
    layout: Layout,
    batch: AttentionBatch,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of the tokens of sequences i with num_decodes <= i < num_seqs, on a GPU of compute capability 9.0.

    Args:
        query, cache, layout, batch, scale, softcap, causal, sinks: as in `reference.paged_attention`.

    Returns:
        [T, heads, head_dim] in query's dtype; rows of other tokens hold anything.

    Raises:
        ValueError: it is not for this shape, see `mosaic_tiles.why_not`.
    """
    tokens, heads, dim = query.shape
    pages, kv_heads, block_size = cache.shape[0], cache.shape[1] // 2, cache.shape[2]
    reason = why_not(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        block_size=block_size,
        query_dtype=query.dtype,
        cache_dtype=cache.dtype,
        scale=scale,
    )
    if reason:
        raise ValueError(f"prefill attention in Mosaic: {reason}; use the implementation 'triton'")
    shape = Shape(
        head_dim=dim,
        block_size=block_size,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        width=batch.block_tables.shape[2],
        dtype=cache.dtype,
        scale=scale,
        softcap=softcap,
        has_sinks=sinks is not None,
        interpret=batch.backend.interpret,
    )
    tiles = Tiles.of(batch, layout, causal=causal, shape=shape)
    # one head's rows are consecutive, and a tile that reaches over the end finds rows there
    rows = jnp.transpose(query.reshape(tokens, kv_heads, shape.group, dim), (1, 0, 2, 3))
    rows = jnp.pad(rows.reshape(kv_heads, tokens * shape.group, dim), ((0, 0), (0, ROWS), (0, 0)))
    table = jnp.clip(batch.block_tables[layout.group] + layout.page_offset, 0, pages - 1)
    sink_rows = ()
    if sinks is not None:
        sink_of_row = jnp.arange(ROWS, dtype=jnp.int32) % shape.group
        sink_rows = (sinks.astype(jnp.float32).reshape(kv_heads, shape.group)[:, sink_of_row] * LOG2E,)
    attended = _call(shape, tiles.info.shape[0])(
        tiles.info, tiles.seen_from, tiles.seen_to, table, *sink_rows, rows, cache.reshape(-1, block_size, dim)
    )
    used = attended[:, :, : shape.tokens * shape.group].reshape(-1, kv_heads, shape.tokens, shape.group, dim)
    return used[tiles.tile_of_token, :, tiles.place_of_token].reshape(tokens, heads, dim)


def _call(shape: Shape, tiles: int) -> Any:
    ring = (SLOTS, shape.keys, shape.head_dim)
    return mosaic_call(
        lambda *refs: _kernel(shape, *refs) if shape.has_sinks else _kernel(shape, *refs[:4], None, *refs[4:]),
        name="paged_attention_prefill",
        out_type=jax.ShapeDtypeStruct((tiles, shape.kv_heads, ROWS, shape.head_dim), shape.dtype),
        grid=(tiles, shape.kv_heads),
        grid_names=("tile", "head"),
        num_warpgroups=COMPUTE_WARPGROUPS + 1,
        interpret=shape.interpret,
        scratch_types=[
            matrix_tile((COMPUTE_WARPGROUPS, WGMMA_ROWS, shape.head_dim), shape.dtype),
            matrix_tile(ring, shape.dtype),
            matrix_tile(ring, shape.dtype),
            plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),  # queries are there
            plgpu.Barrier(num_arrivals=shape.copies, num_barriers=SLOTS),  # keys are
            plgpu.Barrier(num_arrivals=shape.copies, num_barriers=SLOTS),  # values are
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=SLOTS),  # keys are done with
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=SLOTS),  # values are
            plgpu.Barrier(num_arrivals=shape.copies),  # values are there, to be cleaned
        ],
    )


def _kernel(shape: Shape, info, seen_from, seen_to, table, sinks, query, cache, out, *scratch) -> None:
    queries, keys, values, q_ready, k_ready, v_ready, k_free, v_free, landed = scratch
    tile, head, warpgroup = lax.axis_index("tile"), lax.axis_index("head"), lax.axis_index(WARPGROUP)
    first, last = info[tile, FIRST], info[tile, LAST]

    @pl.when((last > first) & (warpgroup != FETCH))
    def _compute():
        plgpu.set_max_registers(shape.registers[0], action="increase")
        mine = pl.ds(warpgroup * WGMMA_ROWS, WGMMA_ROWS)
        q = queries.at[warpgroup]
        start = info[tile, ROW] + warpgroup * WGMMA_ROWS
        plgpu.copy_gmem_to_smem(query.at[head, pl.ds(start, WGMMA_ROWS)], q, q_ready.at[warpgroup])
        attended = _attend(
            shape,
            q,
            (keys, values),
            (q_ready.at[warpgroup], k_ready, v_ready, k_free, v_free),
            bounds=(first, last, info[tile, WHOLE_FROM], info[tile, WHOLE_TO]),
            seen=(seen_from.at[tile, mine], seen_to.at[tile, mine]),
            sinks=None if sinks is None else sinks.at[head, mine],
        )
        q[...] = attended.astype(shape.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, out.at[tile, head, mine])
        plgpu.wait_smem_to_gmem(0)

    @pl.when((last > first) & (warpgroup == FETCH))
    def _fetch():
        plgpu.set_max_registers(shape.registers[1], action="decrease")
        written = info[tile, WRITTEN_FROM], info[tile, WRITTEN_TO]
        row = table.at[info[tile, SEQUENCE]]

        @pl.loop(first, last)
        def _step(step):
            slot = lax.rem(step - first, SLOTS)
            used = step - first >= SLOTS
            sources = _sources(shape, row, cache, head, step)
            pl.when(used)(lambda: plgpu.barrier_wait(k_free.at[slot]))
            for source, place in sources:
                plgpu.copy_gmem_to_smem(source(0), keys.at[slot, place], k_ready.at[slot])
            pl.when(used)(lambda: plgpu.barrier_wait(v_free.at[slot]))
            foreign = (step * shape.keys < written[0]) | ((step + 1) * shape.keys > written[1])

            @pl.when(jnp.logical_not(foreign))
            def _():
                for source, place in sources:
                    plgpu.copy_gmem_to_smem(source(1), values.at[slot, place], v_ready.at[slot])

            @pl.when(foreign)
            def _():
                for source, place in sources:
                    plgpu.copy_gmem_to_smem(source(1), values.at[slot, place], landed)
                plgpu.barrier_wait(landed)
                _clean(shape, values.at[slot], written, step * shape.keys)
                plgpu.commit_smem()
                for _ in sources:
                    plgpu.barrier_arrive(v_ready.at[slot])

        for slot in range(SLOTS):  # a barrier's every phase is seen by whoever waits for it

            @pl.when(last - first > slot)
            def _drain(slot=slot):
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])


def _sources(shape: Shape, row, cache, head, step) -> list[Any]:
    """Where the pieces of a tile of keys (0) and values (1) come from, and their places in the tile."""
    pieces = []
    for i in range(shape.copies):
        key = step * shape.keys + i * shape.rows_per_copy
        column = jnp.minimum(lax.div(key, shape.block_size), shape.width - 1)
        index = row[column] * (2 * shape.kv_heads) + head
        inside = pl.ds(lax.rem(key, shape.block_size), shape.rows_per_copy)
        pieces.append(
            (
                lambda kind, index=index, inside=inside: cache.at[index + kind * shape.kv_heads, inside],
                pl.ds(i * shape.rows_per_copy, shape.rows_per_copy),
            )
        )
    return pieces


def _clean(shape: Shape, values, written, position) -> None:
    """Zeros where another sequence may have left a NaN, which a weight of zero does not silence."""
    registers = Registers(interpret=shape.interpret)
    square = (WGMMA_ROWS, SWIZZLE_COLUMNS)
    for i in range(0, shape.keys, WGMMA_ROWS):
        at = registers.row_index(square) + (position + i)
        for j in range(0, shape.head_dim, SWIZZLE_COLUMNS):
            part = values.at[pl.ds(i, WGMMA_ROWS), pl.ds(j, SWIZZLE_COLUMNS)]
            kept = registers.load_matrix(part)
            part[...] = jnp.where((at >= written[0]) & (at < written[1]), kept, jnp.zeros_like(kept))


def _attend(shape: Shape, query, ring, barriers, *, bounds, seen, sinks):
    """One warpgroup's rows -> float32 [64, head_dim]."""
    registers = Registers(interpret=shape.interpret)
    keys, values = ring
    q_ready, k_ready, v_ready, k_free, v_free = barriers
    first, last, whole_from, whole_to = bounds
    seen_from, seen_to = registers.load_rows(seen[0]), registers.load_rows(seen[1])
    scores_shape = (WGMMA_ROWS, shape.keys)
    # powers of two: the maximum is kept in units that exp2 takes
    factor = (shape.scale if shape.softcap is None else 1.0) * LOG2E
    plgpu.barrier_wait(q_ready)

    def step(i, state):
        attended, highest, total = state
        slot = lax.rem(i - first, SLOTS)
        plgpu.barrier_wait(k_ready.at[slot])
        scores = registers.product_transposed(query, keys.at[slot])
        plgpu.barrier_arrive(k_free.at[slot])
        if shape.softcap is not None:
            scores = shape.softcap * _tanh(scores * (shape.scale / shape.softcap))

        def masked(scores):
            column = registers.column_index(scores_shape)
            base = i * shape.keys
            visible = column < registers.over_columns(seen_to - base, shape.keys)
            visible = visible & (column >= registers.over_columns(seen_from - base, shape.keys))
            return jnp.where(visible, scores, NEVER)

        scores = lax.cond((i < whole_from) | (i >= whole_to), masked, lambda scores: scores, scores)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=1) * factor)
        keep = jnp.exp2(highest - new_highest)
        weights = jnp.exp2(scores * factor - registers.over_columns(new_highest, shape.keys))
        total = total * keep + jnp.sum(weights, axis=1)
        attended = attended * registers.over_columns(keep, shape.head_dim)
        plgpu.barrier_wait(v_ready.at[slot])
        attended = registers.add_product(attended, weights.astype(shape.dtype), values.at[slot])
        plgpu.barrier_arrive(v_free.at[slot])
        return attended, new_highest, total

    if sinks is None:
        highest, total = registers.full((WGMMA_ROWS,), NEVER), registers.full((WGMMA_ROWS,), 0.0)
    else:  # as if a position of this score, and no value, came first
        highest, total = registers.load_rows(sinks), registers.full((WGMMA_ROWS,), 1.0)
    attended = registers.full((WGMMA_ROWS, shape.head_dim), 0.0)
    attended, _, total = lax.fori_loop(first, last, step, (attended, highest, total))
    return attended / registers.over_columns(total, shape.head_dim)


def _tanh(x: jax.Array) -> jax.Array:
    """By exp2, which is exact enough: the hardware's own tanh errs by 2**-11, and a cap multiplies that."""
    return 1.0 - 2.0 / (jnp.exp2(x * (2 * LOG2E)) + 1.0)
