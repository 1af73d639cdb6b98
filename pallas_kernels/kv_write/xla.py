"""New keys and values into their pages: a scatter."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.storage import quantize, to_storage


def write_kv(
    cache: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    layout: Layout,
    batch: AttentionBatch,
    kv_scales: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """As `reference.write_kv`; in place where the cache is donated."""
    heads, (block_size, dim) = key.shape[1], cache.shape[-2:]
    halves = [key] if value is None else [key, value]
    block = batch.block_tables[layout.group, batch.token_seq, batch.positions // block_size]
    page = jnp.where(batch.token_valid, block + layout.page_offset, 0)[:, None]
    slot = (batch.positions % block_size)[:, None]
    if page.shape[0] * heads == 1:
        # A scatter of one row XLA:CPU compiles to an update which it fuses with each of the cache's users, and for each
        # it copies the whole cache. So one row gets a companion, of zeros for the trash page.
        page, slot = (jnp.pad(array, ((0, 1), (0, 0))) for array in (page, slot))
        halves = [jnp.pad(array, ((0, 1), (0, 0), (0, 0))) for array in halves]
    for half, new in enumerate(halves):
        head = (page * len(halves) + half) * heads + jnp.arange(heads, dtype=jnp.int32)  # [T, heads]
        row = head * block_size + slot
        if kv_scales is None:
            stored = to_storage(new, cache.dtype)
        else:
            stored, scales = quantize(new, cache.dtype, batch.backend.numbers(cache.dtype))
            kv_scales = kv_scales.reshape(-1).at[row].set(scales, mode="promise_in_bounds").reshape(kv_scales.shape)
        if value is not None and half == 0 and batch.backend.transposes_keys(block_size):
            flat = cache.reshape(-1, dim, block_size).at[head, :, slot].set(stored, mode="promise_in_bounds")
        else:
            flat = cache.reshape(-1, dim).at[row].set(stored, mode="promise_in_bounds")
        cache = flat.reshape(cache.shape)
    return cache, kv_scales
