"""Product with a four-bit weight by XLA: unpack, scale, multiply."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quant_matmul.layout import Int4Weight, dequantize


def quant_matmul_xla(x: jax.Array, weight: Int4Weight) -> jax.Array:
    """`quant_matmul_reference` through the whole weight in x's dtype, each element rounded once.

    XLA fuses nothing of that: N * K elements are written and read again, which pays for itself where M is large (the
    product is then the library's own) and is what the kernel avoids where it is not.
    """
    y = lax.dot_general(
        x,
        dequantize(weight, x.dtype),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)
