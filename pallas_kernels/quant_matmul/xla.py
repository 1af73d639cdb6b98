"""Product with a four-bit weight by XLA: unpack, scale, multiply."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quant_matmul.layout import Int4Weight, halves


def quant_matmul_xla(x: jax.Array, weight: Int4Weight) -> jax.Array:
    """`quant_matmul_reference` through the whole weight in x's dtype, each element rounded once; x.dtype [M, N].

    The low halves of all groups are one matrix, and the high halves another, each multiplied with its part of x: so
    bytes become numbers where they lie, and nothing is shuffled. XLA fuses no product with that: N * K elements are
    written and read again, which pays for itself where M is large (the product is then the library's own) and is what
    the kernel avoids where it is not.
    """
    parts = x.reshape(x.shape[0], -1, 2, weight.group_size // 2)

    def product(part: jax.Array, matrix: jax.Array) -> jax.Array:
        return lax.dot_general(
            part.reshape(x.shape[0], -1),
            matrix,
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    low, high = halves(weight, x.dtype)
    return (product(parts[:, :, 0], low) + product(parts[:, :, 1], high)).astype(x.dtype)
