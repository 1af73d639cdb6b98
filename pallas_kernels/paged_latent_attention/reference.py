"""Paged latent attention, written from the formula: every token gathers its whole context. The specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.storage import from_storage


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
    """softmax(mask(scale q c)) c[: value_width] of each token, over the latents c of its sequence's pages, this step's
    included: attention of all heads over one vector a position (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1, where
    the projections of keys and values are absorbed in the queries and in what follows).

    Args:
        query: [T, heads, width].
        cache: latents [pages, block_size, width], as in `pallas_kernels.storage`.
        scale: factor on the scores.
        value_width: the first so many numbers of a latent are its value; the others, which rotary embeddings turn, take
            part in the scores alone.
        kv_scales: f32 [pages, block_size], of int8 and float8 pages.

    Returns:
        [T, heads, value_width] in query's dtype; rows of padding tokens are zeros.
    """
    tokens, _, width = query.shape
    compute = jnp.promote_types(query.dtype, jnp.float32)
    pages = batch.block_tables[layout.group, batch.token_seq] + layout.page_offset  # [T, W]
    latents = from_storage(cache[pages], compute, batch.backend.numbers(cache.dtype)).astype(compute)
    if kv_scales is not None:
        latents = latents * kv_scales[pages].astype(compute)[..., None]
    latents = latents.reshape(tokens, -1, width)
    position = jnp.arange(latents.shape[1], dtype=jnp.int32)
    at = batch.positions[:, None]
    visible = (position <= at) & (position > at - layout.window) & (position >= layout.first)
    visible = visible & batch.token_valid[:, None]  # [T, context]
    # what nobody may see can be NaN, which no weight of zero silences, in a gradient neither
    latents = jnp.where(visible[..., None], latents, 0)
    scores = jnp.einsum("thd,tcd->thc", query.astype(compute), latents, precision=lax.Precision.HIGHEST) * scale
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum("thc,tcd->thd", weights, latents[..., :value_width], precision=lax.Precision.HIGHEST)
    return out.astype(query.dtype)
