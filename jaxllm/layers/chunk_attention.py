"""Attention of chunks of prompts over themselves, by keys and values that the cache does not keep."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.layers.attention import Layout
from jaxllm.layers.context import Context
from pallas_kernels.backend import LEAST_TRANSPOSED_BLOCK
from pallas_kernels.batch import AttentionBatch
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.paged_attention.api import paged_attention


def begin_their_sequences(batch: AttentionBatch) -> jax.Array:
    """bool []: whether no chunk of a step has context, so that it sees itself alone. Single tokens do not count."""
    seq = jnp.arange(batch.kv_lens.shape[0], dtype=jnp.int32)
    is_chunk = (seq >= batch.num_decodes) & (seq < batch.num_seqs)
    return ~jnp.any(is_chunk & (batch.kv_lens > jnp.diff(batch.query_start)))


def single_tokens(batch: AttentionBatch, rows: int) -> AttentionBatch:
    """The step's single tokens, which are the first ones, as a step of `rows` tokens: as many as it has sequences."""
    return dataclasses.replace(
        batch,
        token_seq=batch.token_seq[:rows],
        positions=batch.positions[:rows],
        token_valid=batch.token_valid[:rows],
        decode_only=True,
    )


def chunk_attention(
    context: Context,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: jax.Array,
    batch: AttentionBatch,
    *,
    stored: jnp.dtype,
    scale: float,
) -> jax.Array:
    """Attention of every chunk that begins its sequence.

    Keys and values get pages for the time of the call, each sequence its own, so that attention is that of any model.

    Args:
        query, key: [T, heads, D].
        value: [T, heads, V], V at most D.
        stored: dtype of the pages.
        scale: factor on the scores.

    Returns:
        [T, heads, V] in query's dtype. Rows of other tokens hold anything finite.
    """
    tokens, heads, width = key.shape
    size = LEAST_TRANSPOSED_BLOCK
    seqs = batch.kv_lens.shape[0]
    first = batch.query_start[:-1]
    # a chunk has fewer pages than lie between its first token's and the next chunk's; page 0 is trash
    begin = first // size + jnp.arange(1, seqs + 1, dtype=jnp.int32)
    last = tokens // size + seqs
    table = jnp.minimum(begin[:, None] + jnp.arange(-(-tokens // size), dtype=jnp.int32), last)
    own = dataclasses.replace(
        batch,
        positions=jnp.arange(tokens, dtype=jnp.int32) - first[batch.token_seq],
        kv_lens=jnp.diff(batch.query_start),
        block_tables=table[None],
        backend=context.backend,
    )
    nowhere = jnp.int32(0)
    place = Layout(group=nowhere, page_offset=nowhere, window=window)
    pages = jnp.zeros((last + 1, 2 * heads, size, width), stored)
    narrow = width - value.shape[2]
    pages, _ = write_kv(pages, key, jnp.pad(value, ((0, 0), (0, 0), (0, narrow))), place, own)
    return paged_attention(query, pages, place, own, scale=scale)[..., : value.shape[2]]
