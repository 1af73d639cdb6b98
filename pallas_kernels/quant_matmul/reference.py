"""What a product with a four-bit weight is, in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quant_matmul.layout import Int4Weight, dequantize


def quant_matmul_reference(x: jax.Array, weight: Int4Weight) -> jax.Array:
    """``x [M, K] @ dequantize(weight) [N, K].T``: [M, N] in x's dtype, all of it in float32 before.

    Differentiable in x and in the weight's scales.
    """
    w = dequantize(weight, jnp.dtype(jnp.float32))
    y = jnp.einsum("mk,nk->mn", x.astype(jnp.float32), w, precision=lax.Precision.HIGHEST)
    return y.astype(x.dtype)
