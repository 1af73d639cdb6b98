"""What a product with a quantized weight is, in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized import Quantized, RoundedInputs


def quant_matmul_reference(x: jax.Array, weight: Quantized) -> jax.Array:
    """``x [M, K] @ weight.dequantize() [N, K].T``: [M, N] in x's dtype, all of it in float32 before.

    Of `RoundedInputs`, x is rounded first. Differentiable in x and in the weight's scales.
    """
    w = weight.dequantize(jnp.dtype(jnp.float32))
    wide = x.astype(jnp.float32)
    if isinstance(weight, RoundedInputs):
        rounded, scales = weight.rounded(x)
        wide = (rounded * scales).reshape(x.shape)
    return jnp.einsum("mk,nk->mn", wide, w, precision=lax.Precision.HIGHEST).astype(x.dtype)
