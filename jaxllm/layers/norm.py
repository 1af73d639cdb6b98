"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, *, offset: float = 0.0) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32 (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x: [..., d].
        weight: [d].
        eps: added to the mean square.
        offset: added to the weight (Gemma stores weight - 1).

    Returns:
        [..., d] in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * (weight.astype(jnp.float32) + offset)).astype(x.dtype)
