"""Attention as the models call it: keys and values into their pages, then attention over them; or, in training,
attention over whole sequences, without pages.

The cache is an array of pages, or `ScaledPages`; models hand on either. How pages lie in it is said in
`pallas_kernels.storage`, what a batch is in `pallas_kernels.batch`.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp

from jaxllm.layers.context import Context, StepBatch
from jaxllm.layers.dense_attention import WholeSequences, dense_attention
from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.kv_write import api as kv_write
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_latent_attention.api import paged_latent_attention

__all__ = ["Cache", "Layout", "ScaledPages", "attention", "latent_attention", "write_kv", "write_latents"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledPages:
    """Pages of 8-bit numbers, and the scale of each key and each value of a head, or of each latent."""

    numbers: jax.Array  # int8, float8 or uint8 [pages, 2 * kv_heads, block_size, head_dim]; [pages, block_size, width]
    scales: jax.Array  # f32 [pages, 2 * kv_heads, block_size]; [pages, block_size]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.numbers.shape


Cache = jax.Array | ScaledPages


def write_kv(
    context: Context, cache: Cache, key: jax.Array, value: jax.Array, layout: Layout, batch: StepBatch
) -> Cache:
    """Write this step's keys and values [T, kv_heads, head_dim] into their pages; in place, as the cache is donated."""
    if isinstance(batch.attention, WholeSequences):
        return jnp.stack([key, value])
    return _written(context, cache, key, value, layout, batch)


def attention(
    context: Context,
    query: jax.Array,
    cache: Cache,
    layout: Layout,
    batch: StepBatch,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    windows: bool = False,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of every query token over its sequence's pages (this step's keys and values included).

    Args:
        query: [T, heads, head_dim]; heads is a multiple of the cache's kv_heads.
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        causal: a token sees itself and those before it; otherwise the whole sequence, which this step must complete.
        windows: whether some layer's tokens see a window; if not `causal`, it reaches as far ahead as back.
        sinks: [heads], a score of each head that takes part in the softmax and has no value.

    Returns:
        [T, heads, head_dim] in query's dtype; rows of padding tokens hold anything finite.
    """
    if isinstance(batch.attention, WholeSequences):
        key, value = cast(jax.Array, cache)
        return dense_attention(
            query, key, value, layout.window, batch.attention, scale=scale, softcap=softcap, causal=causal, sinks=sinks
        )
    attended = _for_kernels(context, batch)
    if windows and not causal:
        ahead = jnp.minimum(attended.positions + layout.window, attended.kv_lens[attended.token_seq])
        attended, causal = dataclasses.replace(attended, seen_to=ahead), True
    pages, kv_scales = _apart(cache)
    return paged_attention(
        query, pages, layout, attended, scale=scale, softcap=softcap, causal=causal, sinks=sinks, kv_scales=kv_scales
    )


def write_latents(context: Context, cache: Cache, latents: jax.Array, layout: Layout, batch: StepBatch) -> Cache:
    """Write this step's latents [T, 1, width] into their pages; in place, as the cache is donated."""
    if isinstance(batch.attention, WholeSequences):
        return latents[None]
    return _written(context, cache, latents, None, layout, batch)


def latent_attention(
    context: Context,
    query: jax.Array,
    cache: Cache,
    layout: Layout,
    batch: StepBatch,
    *,
    scale: float,
    rank: int,
) -> jax.Array:
    """Attention of every query token over its sequence's latents (this step's included), of which a part are values.

    Args:
        query: [T, heads, width].
        scale: factor on the scores.
        rank: numbers of a value.

    Returns:
        [T, heads, rank] in query's dtype; rows of padding tokens hold anything finite.
    """
    if isinstance(batch.attention, WholeSequences):
        (latents,) = cast(jax.Array, cache)
        values = latents[..., :rank]
        return dense_attention(
            query, latents, values, layout.window, batch.attention, scale=scale, softcap=None, causal=True
        )
    attended = _for_kernels(context, batch)
    pages, kv_scales = _apart(cache)
    return paged_latent_attention(query, pages, layout, attended, scale=scale, value_width=rank, kv_scales=kv_scales)


def _written(
    context: Context, cache: Cache, key: jax.Array, value: jax.Array | None, layout: Layout, batch: StepBatch
) -> Cache:
    """The cache with a step's keys and values, or with its latents alone."""
    pages, kv_scales = _apart(cache)
    numbers, scales = kv_write.write_kv(pages, key, value, layout, _for_kernels(context, batch), kv_scales)
    return numbers if scales is None else ScaledPages(numbers, scales)


def _apart(cache: Cache) -> tuple[jax.Array, jax.Array | None]:
    return (cache.numbers, cache.scales) if isinstance(cache, ScaledPages) else (cache, None)


def _for_kernels(context: Context, batch: StepBatch) -> AttentionBatch:
    """The kernels find their implementation in their batch."""
    assert isinstance(batch.attention, AttentionBatch)
    return dataclasses.replace(batch.attention, backend=context.backend)
