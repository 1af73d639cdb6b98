"""Normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fixed_order import row_sum


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, *, offset: float = 0.0) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32 (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x: [..., d].
        weight: [d], or what broadcasts to x.
        eps: added to the mean square.
        offset: added to the weight (Gemma stores weight - 1).

    Returns:
        [..., d] in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(row_sum(x32 * x32) / x.shape[-1] + eps)
    return (x32 * scale * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def joint_rms_norm(
    vectors: Sequence[jax.Array], weights: Sequence[jax.Array], eps: float, *, mesh_axis: str | tuple[str, ...] | None
) -> list[jax.Array]:
    """`rms_norm` of several arrays [..., n], each with its weight [n], whose last axes may be split over devices.

    Args:
        mesh_axis: over which they are split, into equal parts; what neighbours hold twice counts twice. None: they are
            whole.
    """
    wide = [x.astype(jnp.float32) for x in vectors]
    means = jnp.concatenate([row_sum(x * x) / x.shape[-1] for x in wide], axis=-1)
    if mesh_axis is not None:
        means = lax.pmean(means, mesh_axis)
    scales = jnp.split(lax.rsqrt(means + eps), len(wide), axis=-1)
    return [
        (x * scale * weight.astype(jnp.float32)).astype(given.dtype)
        for given, x, scale, weight in zip(vectors, wide, scales, weights, strict=True)
    ]


def layer_norm(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, eps: float, *, offset: float = 0.0
) -> jax.Array:
    """Layer norm over the last axis, computed in float32 (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: [..., d].
        weight, bias: [d], or what broadcasts to x; without a bias nothing is added.
        eps: added to the variance.
        offset: added to the weight (Nemotron stores weight - 1).

    Returns:
        [..., d] in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - row_sum(x32) / x.shape[-1]
    scale = lax.rsqrt(row_sum(centred * centred) / x.shape[-1] + eps)
    normed = centred * scale * (weight.astype(jnp.float32) + offset)
    return (normed if bias is None else normed + bias.astype(jnp.float32)).astype(x.dtype)
