"""Which implementation computes a step's attention."""

from __future__ import annotations

import jax

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.paged_attention import reference, xla

_IMPLEMENTATIONS = {"reference": reference.paged_attention, "xla": xla.paged_attention}


def paged_attention(
    query: jax.Array,
    cache: jax.Array,
    layout: Layout,
    batch: AttentionBatch,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
) -> jax.Array:
    """`reference.paged_attention` by `batch.backend`'s implementation; rows of padding tokens hold anything finite."""
    compute = _IMPLEMENTATIONS.get(batch.backend.implementation, xla.paged_attention)
    return compute(
        query, cache, layout, batch, scale=scale, softcap=softcap, causal=causal, sinks=sinks, kv_scales=kv_scales
    )
