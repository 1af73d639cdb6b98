"""Paged latent attention in plain XLA: the tiles of `paged_attention.xla`, with one KV head whose values are the first
numbers of its keys.
"""

from __future__ import annotations

import jax

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.paged_attention import xla


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
    """As `reference.paged_latent_attention`."""
    return xla.paged_attention(query, cache, layout, batch, scale=scale, value_width=value_width, kv_scales=kv_scales)
