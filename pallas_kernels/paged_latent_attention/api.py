"""Which implementation computes a step's attention over latents."""

from __future__ import annotations

import jax

from pallas_kernels.backend import MAX_LATENT_WIDTHS
from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.paged_latent_attention import reference, xla
from pallas_kernels.paged_latent_attention.configurations import configurations
from pallas_kernels.storage import check_addressable, check_latents

__all__ = ["configurations", "paged_latent_attention"]


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
    """`reference.paged_latent_attention` by `batch.backend`'s implementation; rows of padding tokens hold anything
    finite.

    "triton" computes pages of a power of two of positions and latents of up to `MAX_LATENT_WIDTHS` numbers, and leaves
    the rest to "xla"; "mosaic" has no kernel of its own, and leaves all to "triton".

    Raises:
        ValueError: the arrays do not belong together (`storage.check_latents`), or the kernels cannot address such a
            cache (`storage.check_addressable`).
    """
    check_latents(cache, kv_scales, batch.token_seq.shape[0], "query", query)
    if not 0 < value_width < cache.shape[2]:
        raise ValueError(f"value_width must be between 0 and the latents' {cache.shape[2]} numbers, got {value_width}")
    implementation = batch.backend.implementation
    if implementation == "reference":
        attend = reference.paged_latent_attention
    elif implementation == "xla" or not (_has_kernels(cache, value_width) and batch.backend.supports(cache.dtype)):
        attend = xla.paged_latent_attention
    else:
        # Pallas is slow to import, and a CPU needs none of it
        from pallas_kernels.paged_latent_attention import triton

        check_addressable(cache)
        attend = triton.paged_latent_attention
    return attend(query, cache, layout, batch, scale=scale, value_width=value_width, kv_scales=kv_scales)


def _has_kernels(cache: jax.Array, value_width: int) -> bool:
    block_size, width = cache.shape[1:]
    most_value, most_rest = MAX_LATENT_WIDTHS
    fits = value_width <= most_value and width - value_width <= most_rest
    return fits and block_size & (block_size - 1) == 0
