"""Which implementation writes a step's keys and values."""

from __future__ import annotations

import jax

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.kv_write import reference, xla
from pallas_kernels.kv_write.configurations import configurations
from pallas_kernels.storage import check_addressable, check_latents, check_operands

__all__ = ["configurations", "write_kv"]


def write_kv(
    cache: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    layout: Layout,
    batch: AttentionBatch,
    kv_scales: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`reference.write_kv` by `batch.backend`'s implementation; in place where the cache is donated.

    Raises:
        ValueError: the arrays do not belong together (`storage.check_operands`, `storage.check_latents`), or the
            kernels cannot address such a cache (`storage.check_addressable`).
    """
    tokens = batch.token_seq.shape[0]
    if value is None:
        check_latents(cache, kv_scales, tokens, "key", key, heads=1)
    else:
        check_operands(cache, kv_scales, tokens, {"key": key, "value": value}, exact_heads=True)
    implementation = batch.backend.implementation
    if implementation == "reference":
        write = reference.write_kv
    elif implementation == "xla" or not batch.backend.supports(cache.dtype):
        write = xla.write_kv
    else:
        # Pallas is slow to import, and a CPU needs none of it
        from pallas_kernels.kv_write import triton

        check_addressable(cache)
        write = triton.write_kv
    return write(cache, key, value, layout, batch, kv_scales)
