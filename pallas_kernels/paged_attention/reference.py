"""Paged attention, written from the formula: every token gathers its whole context. The specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.storage import from_storage


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
    """softmax(mask(cap(scale q k))) v of each token, over its sequence's pages (this step's keys and values included).

    Args:
        query: [T, heads, head_dim]; heads is a multiple of the cache's kv_heads.
        cache: see `pallas_kernels.storage`.
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        causal: a token sees itself and those before it, or what `batch.seen_to` says; otherwise the whole sequence,
            which this step must complete.
        sinks: float [heads], a score of each head that takes part in the softmax and has no value (attention sinks;
            Xiao et al. 2023, arXiv:2309.17453, as gpt-oss has them).
        kv_scales: f32 [pages, 2 * kv_heads, block_size], of int8 and float8 pages.

    Returns:
        [T, heads, head_dim] in query's dtype; rows of padding tokens are zeros.
    """
    tokens, heads, dim = query.shape
    kv_heads, block_size = cache.shape[1] // 2, cache.shape[2]
    compute = jnp.promote_types(query.dtype, jnp.float32)
    pages = batch.block_tables[layout.group, batch.token_seq] + layout.page_offset  # [T, W]
    context = pages.shape[1] * block_size
    numbers = batch.backend.numbers(cache.dtype)
    stored = from_storage(cache[pages], compute, numbers).astype(compute)  # [T, W, 2 * KH, block, D]
    if kv_scales is not None:
        stored = stored * kv_scales[pages].astype(compute)[..., None]
    halves = stored.reshape(*pages.shape, 2, kv_heads, block_size, dim)
    keys, values = jnp.transpose(halves, (2, 0, 3, 1, 4, 5)).reshape(2, tokens, kv_heads, context, dim)
    position = jnp.arange(context, dtype=jnp.int32)
    seen_to = batch.positions + 1 if batch.seen_to is None else batch.seen_to
    if not causal:
        seen_to = batch.kv_lens[batch.token_seq]
    visible = (position < seen_to[:, None]) & (position > (batch.positions - layout.window)[:, None])
    visible = visible & (position >= layout.first) & batch.token_valid[:, None]  # [T, context]
    # what nobody may see can be NaN, which no weight of zero silences, in a gradient neither
    keys, values = (jnp.where(visible[:, None, :, None], x, 0) for x in (keys, values))
    grouped = query.astype(compute).reshape(tokens, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("tkgd,tkcd->tkgc", grouped, keys, precision=lax.Precision.HIGHEST) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    sink = jnp.full(heads, -jnp.inf) if sinks is None else sinks
    sink = jnp.broadcast_to(sink.astype(compute).reshape(kv_heads, heads // kv_heads, 1), (*scores.shape[:3], 1))
    highest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink)
    highest = lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0))
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - highest)
    weights = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum("tkgc,tkcd->tkgd", weights, values, precision=lax.Precision.HIGHEST)
    return out.reshape(tokens, heads, dim).astype(query.dtype)
