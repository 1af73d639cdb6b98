"""Product with a quantized weight by XLA: unpack, scale, multiply."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quant_matmul.layout import Int4Weight, halves
from pallas_kernels.quantized import Quantized, RoundedInputs


def quant_matmul_xla(x: jax.Array, weight: Quantized) -> jax.Array:
    """`quant_matmul_reference` through the whole weight in x's dtype, each element rounded once; x.dtype [M, N].

    Four bits in groups are two matrices, the low halves of all groups and the high halves, each multiplied with its
    part of x: so bytes become numbers where they lie, and nothing is shuffled. XLA fuses no product with that: N * K
    elements are written and read again, which pays for itself where M is large (the product is then the library's own)
    and is what the kernel avoids where it is not.
    """
    if isinstance(weight, RoundedInputs):
        rounded, scales = weight.rounded(x)
        return quant_matmul_xla((rounded * scales).reshape(x.shape).astype(x.dtype), weight.weight)
    if not isinstance(weight, Int4Weight):
        return _product(x, weight.dequantize(x.dtype)).astype(x.dtype)
    parts = x.reshape(x.shape[0], -1, 2, weight.group_size // 2)
    both = zip((parts[:, :, 0], parts[:, :, 1]), halves(weight, x.dtype), strict=True)
    low, high = (_product(part.reshape(x.shape[0], -1), matrix) for part, matrix in both)
    return (low + high).astype(x.dtype)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return lax.dot_general(
        x,
        matrix,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
