"""Writing keys and values, as one indexed assignment. The specification."""

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
    """Write this step's keys and values to their positions' places in the pages; padding tokens go to page 0.

    Args:
        cache: see `pallas_kernels.storage`.
        key, value: [T, kv_heads, head_dim]; or key [T, 1, width] and no value: latents.
        kv_scales: f32 [pages, 2 * kv_heads, block_size], of latents [pages, block_size], of int8 and float8 pages;
            written too.

    Returns:
        (cache, kv_scales).
    """
    block_size = cache.shape[-2]
    block = batch.block_tables[layout.group, batch.token_seq, batch.positions // block_size]
    page = jnp.where(batch.token_valid, block + layout.page_offset, 0)
    slot = batch.positions % block_size
    if value is None:
        at, new = (page, slot), key[:, 0]
    else:
        at, new = (page, slice(None), slot), jnp.concatenate([key, value], axis=1)  # [T, 2 * kv_heads, head_dim]
    if kv_scales is None:
        return cache.at[at].set(to_storage(new, cache.dtype)), None
    stored, scales = quantize(new, cache.dtype, batch.backend.numbers(cache.dtype))
    return cache.at[at].set(stored), kv_scales.at[at].set(scales)
