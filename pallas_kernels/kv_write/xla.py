"""New keys and values into their pages: a scatter."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.storage import quantize, to_storage


def write_kv(
    cache: jax.Array,
    key: jax.Array,
    value: jax.Array,
    layout: Layout,
    batch: AttentionBatch,
    kv_scales: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """As `reference.write_kv`; in place where the cache is donated."""
    pages, _, heads, block_size, dim = cache.shape
    tokens = key.shape[0]
    block = batch.block_tables[layout.group, batch.token_seq, batch.positions // block_size]
    page = jnp.where(batch.token_valid, block + layout.page_offset, 0)
    head = jnp.arange(2 * heads, dtype=jnp.int32)
    rows = ((page[:, None] * (2 * heads) + head) * block_size + (batch.positions % block_size)[:, None]).reshape(-1)
    new = jnp.concatenate([key, value], axis=1)
    if kv_scales is None:
        stored = to_storage(new, cache.dtype)
    else:
        stored, scales = quantize(new, cache.dtype)
        flat = kv_scales.reshape(pages * 2 * heads * block_size)
        kv_scales = flat.at[rows].set(scales.reshape(-1), mode="promise_in_bounds").reshape(kv_scales.shape)
    flat = cache.reshape(pages * 2 * heads * block_size, dim)
    flat = flat.at[rows].set(stored.reshape(tokens * 2 * heads, dim), mode="promise_in_bounds")
    return flat.reshape(cache.shape), kv_scales
