"""Matrix products. Models call `linear` and never see how a weight is stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """``x [..., in] @ weight [out, in].T (+ bias [out])``, accumulated in float32, in x's dtype.

    Weights keep the checkpoint's orientation. XLA:CPU has native bf16 products only with a float32 result, and is
    slow when the left side has a single row, so such a row is doubled there.
    """
    y = linear_f32(x, weight)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def linear_f32(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`linear` without bias, its float32 accumulator returned as it is (logits)."""
    return lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=matmul_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )


def matmul_precision(dtype: jnp.dtype) -> lax.Precision | None:
    """float32 means float32: no TF32 on GPUs when a model runs in float32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None
