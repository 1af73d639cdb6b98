"""What a product with a packed weight is, in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized import Quantized


def packed_matmul_reference(x: jax.Array, weight: Quantized) -> jax.Array:
    """``x [M, K] @ dequantize(weight) [N, K].T``: float32 [M, N], all of it in float32. Differentiable in x."""
    w = weight.dequantize(jnp.dtype(jnp.float32))
    return jnp.einsum("mk,nk->mn", x.astype(jnp.float32), w, precision=lax.Precision.HIGHEST)
