"""Which implementation computes a step's attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.backend import MAX_HEAD_DIM
from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.paged_attention import reference, xla
from pallas_kernels.paged_attention.configurations import configurations
from pallas_kernels.paged_attention.mosaic_tiles import why_not
from pallas_kernels.storage import check_addressable, check_operands

__all__ = ["configurations", "paged_attention"]


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
    """`reference.paged_attention` by `batch.backend`'s implementation; rows of padding tokens hold anything finite.

    "triton" computes pages of a power of two of positions and heads of up to `MAX_HEAD_DIM` numbers, and leaves the
    rest to "xla"; "mosaic" computes chunks and prompts of shapes for which `mosaic_tiles.why_not` has no reason
    against it, and leaves the rest to "triton".

    Raises:
        ValueError: the arrays do not belong together (`storage.check_operands`), or the kernels cannot address such a
            cache (`storage.check_addressable`).
    """
    check_operands(cache, kv_scales, batch.token_seq.shape[0], {"query": query}, exact_heads=False)
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"sinks must be of shape [{query.shape[1]}], one a query head, got {list(sinks.shape)}")
    implementation = batch.backend.implementation
    if implementation == "reference":
        compute = reference.paged_attention
    elif implementation == "xla" or not _has_kernels(query, cache, batch):
        compute = xla.paged_attention
    else:
        check_addressable(cache)
        compute = _by_kernels
    return compute(
        query, cache, layout, batch, scale=scale, softcap=softcap, causal=causal, sinks=sinks, kv_scales=kv_scales
    )


def _has_kernels(query: jax.Array, cache: jax.Array, batch: AttentionBatch) -> bool:
    """Whether the kernels can do it: pages of a power of two of positions, heads of up to `MAX_HEAD_DIM` numbers."""
    block_size, dim = cache.shape[2:]
    return block_size & (block_size - 1) == 0 and dim <= MAX_HEAD_DIM and batch.backend.supports(cache.dtype)


def _in_mosaic(query: jax.Array, cache: jax.Array, *, scale: float) -> bool:
    kv_heads, block_size, dim = cache.shape[1] // 2, *cache.shape[2:]
    reason = why_not(
        heads=query.shape[1],
        kv_heads=kv_heads,
        head_dim=dim,
        block_size=block_size,
        query_dtype=query.dtype,
        cache_dtype=cache.dtype,
        scale=scale,
    )
    return reason is None


def _by_kernels(query, cache, layout, batch: AttentionBatch, *, scale, softcap, causal, sinks, kv_scales) -> jax.Array:
    """Single tokens by one kernel, chunks and prompts by the other, each for the rows that are its own."""
    # Pallas is slow to import, and a CPU needs none of it
    from pallas_kernels.paged_attention.tiles import tiles
    from pallas_kernels.paged_attention.triton_decode import decode_attention
    from pallas_kernels.paged_attention.triton_walk import product_dtypes

    tokens, dim = query.shape[0], query.shape[2]
    itemsize = max(dtype.itemsize for dtype in product_dtypes(query.dtype, cache.dtype))
    tile = tiles(batch.backend.device_kind, head_dim=dim, itemsize=itemsize)
    how = dict(scale=scale, softcap=softcap, sinks=sinks, kv_scales=kv_scales)
    decoded = decode_attention(query, cache, layout, batch, tile.decode, num_sms=tile.num_sms, **how)
    decoded = jnp.pad(decoded[:tokens], ((0, max(tokens - decoded.shape[0], 0)), (0, 0), (0, 0)))
    token = jnp.arange(tokens, dtype=jnp.int32)
    is_decode = (token < batch.num_decodes)[:, None, None]
    if batch.decode_only:
        return jnp.where(is_decode, decoded, 0)
    if batch.backend.implementation == "mosaic" and _in_mosaic(query, cache, scale=scale):
        from pallas_kernels.paged_attention import mosaic_prefill

        prefilled = mosaic_prefill.prefill_attention(
            query, cache, layout, batch, scale=scale, softcap=softcap, causal=causal, sinks=sinks
        )
    else:
        from pallas_kernels.paged_attention import triton_prefill

        prefilled = triton_prefill.prefill_attention(query, cache, layout, batch, tile.prefill, causal=causal, **how)
    # who sees nothing gets NaN of "mosaic"
    seen_to = batch.positions + 1 if batch.seen_to is None else batch.seen_to
    has_result = batch.token_valid & (seen_to > layout.first) if layout.first else batch.token_valid
    return jnp.where(is_decode, decoded, jnp.where(has_result[:, None, None], prefilled, 0))
