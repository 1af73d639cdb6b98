"""Attention of chunks and prompts, by Pallas-Triton: a tile is some consecutive query tokens of one sequence, times the
query heads of one KV head.

Tiles are numbered so that a sequence's first one is known without counting the tiles of those before it: sequence s
has the tiles from ``query_start[s] // block_q + s`` on, as many as its tokens could touch. A tile that turns out empty
costs a program that returns at once; there are ``T // block_q + S`` of them in all, whatever the lengths are.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.paged_attention.tiles import PrefillTile
from pallas_kernels.paged_attention.triton_walk import Geometry, Pages, Place, Softmax, load_queries, walk
from pallas_kernels.triton_call import cdiv, next_power_of_two, triton_call


def prefill_attention(
    query: jax.Array,
    cache: jax.Array,
    layout: Layout,
    batch: AttentionBatch,
    tile: PrefillTile,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    value_width: int | None = None,
) -> jax.Array:
    """Attention of the tokens of sequences i with num_decodes <= i < num_seqs.

    Args:
        query, cache, layout, batch, scale, softcap, causal, sinks, kv_scales: as in `reference.paged_attention`.
        value_width: the cache has latents (`paged_latent_attention.reference`), whose values have so many numbers.

    Returns:
        [T, heads, numbers of a value] in query's dtype; rows of other tokens are not written.
    """
    geometry = Geometry.of(query, cache, scale=scale, softcap=softcap, causal=causal, value_width=value_width)
    tokens, heads, dim = query.shape
    seqs = batch.kv_lens.shape[0]
    # a wide group is cut where little of the tile is padding
    group_rows = min(next_power_of_two(geometry.group), 16)
    block_q = max(tile.rows // group_rows, 1)
    head_blocks = cdiv(geometry.group, group_rows)
    tiles = tokens // block_q + seqs
    kernel = functools.partial(
        _kernel,
        geometry=geometry,
        tile=tile,
        block_q=block_q,
        group_rows=group_rows,
        head_blocks=head_blocks,
        tiles=tiles,
        seqs=seqs,
        first_seen=layout.first,
        has_sinks=sinks is not None,
        has_scales=kv_scales is not None,
        has_seen_to=causal and batch.seen_to is not None,
    )
    call = triton_call(
        kernel,
        name="paged_attention_prefill",
        out_shape=jax.ShapeDtypeStruct((tokens, heads, geometry.value_dim), query.dtype),
        grid=(tiles, geometry.kv_heads * head_blocks),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=batch.backend.interpret,
    )
    arguments = [query, cache.reshape(-1, dim), batch.block_tables, batch.kv_lens, batch.query_start]
    arguments += [
        x.reshape(1) for x in (layout.group, layout.page_offset, layout.window, batch.num_decodes, batch.num_seqs)
    ]
    if kv_scales is not None:
        arguments.append(kv_scales.reshape(-1))
    if sinks is not None:
        arguments.append(sinks.astype(jnp.float32))
    if causal and batch.seen_to is not None:
        arguments.append(batch.seen_to)
    return call(*arguments)


def _kernel(
    query_ref,
    rows_ref,
    tables_ref,
    kv_lens_ref,
    query_start_ref,
    group_ref,
    page_offset_ref,
    window_ref,
    num_decodes_ref,
    num_seqs_ref,
    *refs,
    geometry: Geometry,
    tile: PrefillTile,
    block_q: int,
    group_rows: int,
    head_blocks: int,
    tiles: int,
    seqs: int,
    first_seen: int,
    has_sinks: bool,
    has_scales: bool,
    has_seen_to: bool,
) -> None:
    *optional, out_ref = refs
    scales_ref = optional.pop(0) if has_scales else None
    sinks_ref = optional.pop(0) if has_sinks else None
    seen_to_ref = optional.pop(0) if has_seen_to else None
    g = geometry
    # the last tiles of a prompt have the most to do: they come first
    index = tiles - 1 - pl.program_id(0)
    kv_head = pl.program_id(1) // head_blocks
    head_block = pl.program_id(1) % head_blocks
    num_seqs = num_seqs_ref[0]
    shift = block_q.bit_length() - 1
    candidate = jnp.arange(next_power_of_two(seqs), dtype=jnp.int32)
    starts = plt.load(query_start_ref.at[candidate], mask=candidate < num_seqs, other=0)
    begun = (candidate < num_seqs) & ((starts >> shift) + candidate <= index)
    seq = jnp.maximum(jnp.sum(begun.astype(jnp.int32)) - 1, 0)
    start, stop = query_start_ref[seq], query_start_ref[seq + 1]
    first_token = start + (index - ((start >> shift) + seq)) * block_q

    @pl.when((first_token < stop) & (seq >= num_decodes_ref[0]) & (seq < num_seqs))
    def _():
        row = jnp.arange(block_q * group_rows, dtype=jnp.int32)
        token = first_token + (row >> (group_rows.bit_length() - 1))
        in_group = head_block * group_rows + (row & (group_rows - 1))
        head = kv_head * g.group + in_group
        exists = (token < stop) & (in_group < g.group)
        column, written = g.value.columns(exists)
        at = (token[:, None], head[:, None], column)
        query = load_queries(g, query_ref, token[:, None], head, exists)
        length = kv_lens_ref[seq]
        before = length - stop  # a token's position is its index plus this
        last_token = jnp.minimum(first_token + block_q, stop) - 1
        position = token + before
        seen_from = jnp.maximum(position - window_ref[0] + 1, first_seen)
        begin = jnp.maximum(first_token + before - window_ref[0] + 1, first_seen)
        if g.causal:
            seen_to = position + 1
            end = last_token + before + 1
            # all rows see every position before the first row's
            full_end = first_token + before + 1
            if seen_to_ref is not None:
                own = plt.load(seen_to_ref.at[token], mask=token < stop, other=0)
                seen_to, end = jnp.maximum(seen_to, own), jnp.maximum(end, jnp.max(own))
        else:
            seen_to = None
            end = full_end = length
        n = tile.block_n
        first, last = begin // n, (end + (n - 1)) // n
        # pieces that every row sees in full need no masks
        full_first = (jnp.maximum(last_token + before - window_ref[0] + 1, first_seen) + (n - 1)) // n
        full_first = jnp.minimum(jnp.maximum(full_first, first), last)
        full_last = jnp.maximum(full_end // n, full_first)
        state = Softmax.zero(block_q * group_rows, g.value.padded)
        if sinks_ref is not None:
            sinks = plt.load(sinks_ref.at[head], mask=exists, other=0.0)
            state = Softmax.of_sinks(sinks, jnp.bool_(True), g.value.padded)
        pages = Pages(rows_ref, scales_ref, tables_ref)
        place = Place(group_ref[0], page_offset_ref[0], seq, kv_head)
        masks: dict[str, Any] = dict(bounds=(begin, end), seen_from=seen_from, seen_to=seen_to)
        state = walk(g, n, pages, place, query, state, (first, full_first), **masks)
        state = walk(g, n, pages, place, query, state, (full_first, full_last))
        state = walk(g, n, pages, place, query, state, (full_last, last), **masks)
        plt.store(out_ref.at[at], state.result().astype(out_ref.dtype), mask=written)
