"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fixed_order import row_sum


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
    scale = lax.rsqrt(row_sum(x32 * x32) / x.shape[-1] + eps)
    return (x32 * scale * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Layer norm over the last axis, computed in float32 (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: [..., d].
        weight, bias: [d].
        eps: added to the variance.

    Returns:
        [..., d] in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - row_sum(x32) / x.shape[-1]
    scale = lax.rsqrt(row_sum(centred * centred) / x.shape[-1] + eps)
    return (centred * scale * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
