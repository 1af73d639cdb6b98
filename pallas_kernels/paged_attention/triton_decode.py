"""Attention of sequences with one query token each, by Pallas-Triton.

Decode reads the whole context once for a single row of queries a head: it is bound by memory, and one program a
sequence would leave most of a GPU idle. So each context is split among programs (flash decoding; Dao et al. 2023,
https://pytorch.org/blog/flash-decoding), whose parts are merged by XLA.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.paged_attention.tiles import DecodeTile, decode_splits
from pallas_kernels.paged_attention.triton_walk import LEAST_ROWS, Geometry, Pages, Place, Softmax, load_queries, walk
from pallas_kernels.triton_call import cdiv, next_power_of_two, triton_call


def decode_attention(
    query: jax.Array,
    cache: jax.Array,
    layout: Layout,
    batch: AttentionBatch,
    tile: DecodeTile,
    *,
    num_sms: int,
    scale: float,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    splits: int | None = None,
    value_width: int | None = None,
) -> jax.Array:
    """Attention of tokens i < num_decodes, of which token i is the only one of sequence i.

    Args:
        query, cache, layout, batch, scale, softcap, sinks, kv_scales: as in `reference.paged_attention`.
        num_sms: multiprocessors of the device.
        splits: parts of a context; None: as many as keep the device busy.
        value_width: the cache has latents (`paged_latent_attention.reference`), whose values have so many numbers.

    Returns:
        [S, heads, numbers of a value] in query's dtype; rows from num_decodes on are not written.
    """
    geometry = Geometry.of(query, cache, scale=scale, softcap=softcap, causal=True, value_width=value_width)
    seqs, width = batch.block_tables.shape[1:]
    rows = min(max(next_power_of_two(geometry.group), LEAST_ROWS), tile.rows)
    head_blocks = cdiv(geometry.group, rows)
    programs = geometry.kv_heads * head_blocks
    if splits is None:
        splits = decode_splits(tile, seqs * programs, width * geometry.block_size, num_sms)
    heads, dim = geometry.heads, geometry.value_dim
    out_shape: Any = [jax.ShapeDtypeStruct((seqs, heads, dim), query.dtype)]
    if splits > 1:
        part = jax.ShapeDtypeStruct((splits, seqs, heads), jnp.float32)
        out_shape = [jax.ShapeDtypeStruct((splits, seqs, heads, dim), jnp.float32), part, part]
    kernel = functools.partial(
        _kernel,
        geometry=geometry,
        tile=tile,
        rows=rows,
        head_blocks=head_blocks,
        splits=splits,
        first_seen=layout.first,
        has_sinks=sinks is not None,
        has_scales=kv_scales is not None,
    )
    call = triton_call(
        kernel,
        name="paged_attention_decode",
        out_shape=out_shape,
        # sequences come longest first: all programs of the longest start before those of the next
        grid=(programs * splits, seqs),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=batch.backend.interpret,
    )
    arguments = [query, cache.reshape(-1, geometry.head_dim), batch.block_tables, batch.kv_lens]
    arguments += [x.reshape(1) for x in (layout.group, layout.page_offset, layout.window, batch.num_decodes)]
    if kv_scales is not None:
        arguments.append(kv_scales.reshape(-1))
    if sinks is not None:
        arguments.append(sinks.astype(jnp.float32))
    out = call(*arguments)
    return out[0] if splits == 1 else _merge(*out).astype(query.dtype)


def _merge(weighted: jax.Array, highest: jax.Array, total: jax.Array) -> jax.Array:
    """One result of the parts [splits, S, heads, ...] of each context; parts that saw nothing have a total of 0."""
    share = jnp.exp2(highest - jnp.max(highest, axis=0))
    share = share / jnp.sum(total * share, axis=0)
    return jnp.sum(weighted * share[..., None], axis=0)


def _kernel(
    query_ref,
    rows_ref,
    tables_ref,
    kv_lens_ref,
    group_ref,
    page_offset_ref,
    window_ref,
    num_decodes_ref,
    *refs,
    geometry: Geometry,
    tile: DecodeTile,
    rows: int,
    head_blocks: int,
    splits: int,
    first_seen: int,
    has_sinks: bool,
    has_scales: bool,
) -> None:
    refs = list(refs)
    scales_ref = refs.pop(0) if has_scales else None
    sinks_ref = refs.pop(0) if has_sinks else None
    g = geometry
    seq = pl.program_id(1)
    program = pl.program_id(0)
    split = program % splits
    kv_head = program // splits // head_blocks
    head_block = program // splits % head_blocks

    @pl.when(seq < num_decodes_ref[0])
    def _():
        in_group = head_block * rows + jnp.arange(rows, dtype=jnp.int32)
        head = kv_head * g.group + in_group
        column, exists = g.value.columns(in_group < g.group)
        at = (seq, head[:, None], column)
        query = load_queries(g, query_ref, seq, head, in_group < g.group)
        length = kv_lens_ref[seq]
        begin = jnp.maximum(length - window_ref[0], first_seen)
        first = begin // tile.block_n
        pieces = (length + (tile.block_n - 1)) // tile.block_n - first
        share = jnp.maximum((pieces + (splits - 1)) // splits, tile.least_pieces if splits > 1 else 1)
        start = jnp.minimum(split * share, pieces)
        stop = jnp.minimum(start + share, pieces)
        state = Softmax.zero(rows, g.value.padded)
        if sinks_ref is not None:
            sinks = plt.load(sinks_ref.at[head], mask=in_group < g.group, other=0.0)
            state = Softmax.of_sinks(sinks, split == 0, g.value.padded)
        state = walk(
            g,
            tile.block_n,
            Pages(rows_ref, scales_ref, tables_ref),
            Place(group_ref[0], page_offset_ref[0], seq, kv_head),
            query,
            state,
            (first + start, first + stop),
            bounds=(begin, length),
        )
        if splits == 1:
            (out_ref,) = refs
            plt.store(out_ref.at[at], state.result().astype(out_ref.dtype), mask=exists)
        else:
            weighted_ref, highest_ref, total_ref = refs
            plt.store(weighted_ref.at[(split, *at)], state.weighted, mask=exists)
            plt.store(highest_ref.at[split, seq, head], state.highest, mask=in_group < g.group)
            plt.store(total_ref.at[split, seq, head], state.total, mask=in_group < g.group)
