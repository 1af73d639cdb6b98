"""Paged latent attention by the kernels of `paged_attention`: their walk loads each piece of latents once, and takes it
for keys, then for values.

One KV head has all query heads, so a program's rows are heads at first, and tokens only where they are few. DeepSeek-V3
has 128 heads, 16 on each of eight devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.paged_attention.tiles import tiles
from pallas_kernels.paged_attention.triton_decode import decode_attention
from pallas_kernels.paged_attention.triton_prefill import prefill_attention
from pallas_kernels.paged_attention.triton_walk import product_dtypes


def paged_latent_attention(
    query: jax.Array,
    cache: jax.Array,
    layout: Layout,
    batch: AttentionBatch,
    *,
    scale: float,
    value_width: int,
    kv_scales: jax.Array | None = None,
) -> jax.Array:
    """As `reference.paged_latent_attention`: single tokens by one kernel, chunks and prompts by the other."""
    tokens, _, width = query.shape
    itemsize = max(dtype.itemsize for dtype in product_dtypes(query.dtype, cache.dtype))
    tile = tiles(batch.backend.device_kind, head_dim=width, itemsize=itemsize, operation="paged_latent_attention")
    arguments = query, cache, layout, batch
    how = {"scale": scale, "value_width": value_width, "kv_scales": kv_scales}
    decoded = decode_attention(*arguments, tile.decode, num_sms=tile.num_sms, **how)[:tokens]
    decoded = jnp.pad(decoded, ((0, tokens - decoded.shape[0]), (0, 0), (0, 0)))
    is_decode = (jnp.arange(tokens, dtype=jnp.int32) < batch.num_decodes)[:, None, None]
    if batch.decode_only:
        return jnp.where(is_decode, decoded, 0)
    prefilled = prefill_attention(*arguments, tile.prefill, **how)
    return jnp.where(is_decode, decoded, jnp.where(batch.token_valid[:, None, None], prefilled, 0))
