"""What a product with a packed weight is, in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized import Quantized


def packed_matmul_reference(x: jax.Array, weight: Quantized) -> jax.Array:
    """``x [M, K] @ dequantize(weight) [N, K].T``: float32 [M, N], all of it in float32. Differentiable in x."""
    if 0 in weight.shape:  # sums of nothing, of groups that have no size
        return jnp.zeros((x.shape[0], weight.shape[-2]), jnp.float32)
    w = weight.dequantize(jnp.dtype(jnp.float32))
    return jnp.einsum("mk,nk->mn", x.astype(jnp.float32), w, precision=lax.Precision.HIGHEST)
