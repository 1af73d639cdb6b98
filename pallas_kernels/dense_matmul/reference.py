"""What a product with a dense weight is, in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

FLOAT32 = jnp.dtype(jnp.float32)


def dense_matmul_reference(x: jax.Array, weight: jax.Array, dtype: jnp.dtype = FLOAT32) -> jax.Array:
    """``x [M, K] @ weight [N, K].T``: [M, N], all of it in float32, then rounded to a dtype. Differentiable."""
    wide = x.astype(jnp.float32), weight.astype(jnp.float32)
    return jnp.einsum("mk,nk->mn", *wide, precision=lax.Precision.HIGHEST).astype(dtype)


def gated_matmul_reference(x: jax.Array, weight: jax.Array, activation: str, dtype: jnp.dtype = FLOAT32) -> jax.Array:
    """The activation, "silu" or "gelu" (its tanh form), of x [M, K] by the first half of a weight [2 N, K], times x by
    the second half: [M, N], all of it in float32, then rounded to a dtype. Differentiable.
    """
    gate, up = jnp.split(dense_matmul_reference(x, weight), 2, axis=-1)
    return ((jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up).astype(dtype)
