"""Which implementation writes a step's keys and values."""

from __future__ import annotations

import jax

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.kv_write import reference, xla

_IMPLEMENTATIONS = {"reference": reference.write_kv, "xla": xla.write_kv}


def write_kv(
    cache: jax.Array,
    key: jax.Array,
    value: jax.Array,
    layout: Layout,
    batch: AttentionBatch,
    kv_scales: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`reference.write_kv` by `batch.backend`'s implementation; in place where the cache is donated."""
    write = _IMPLEMENTATIONS.get(batch.backend.implementation, xla.write_kv)
    return write(cache, key, value, layout, batch, kv_scales)
