"""Token embeddings, whole or split by the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def embed(table: jax.Array, tokens: jax.Array, *, split_over: str | None = None) -> jax.Array:
    """Rows of `table` [V, d] of tokens i32 [T] -> [T, d].

    Args:
        split_over: mesh axis over which the vocabulary is split: `table` is this device's rows, the others' embeddings
            come from the others.
    """
    if split_over is None:
        return table[tokens]
    rows = table.shape[0]
    local = tokens - lax.axis_index(split_over) * rows
    here = (local >= 0) & (local < rows)
    found = jnp.where(here[:, None], table[jnp.where(here, local, 0)], 0)
    return lax.psum(found, split_over)
