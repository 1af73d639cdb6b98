"""Product with a dense weight: which implementation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import Backend
from pallas_kernels.dense_matmul.cpu_ffi import ACTIVATIONS, dense_matmul_cpu, kernel_for
from pallas_kernels.dense_matmul.reference import FLOAT32, dense_matmul_reference, gated_matmul_reference


def has_kernel(backend: Backend, weight: Any, *, activation: str = "") -> bool:
    """Whether a product of rows with a weight [..., N, K], or with one of its shape, has a kernel.

    Args:
        activation: one of `cpu_ffi.ACTIVATIONS`, of a gated product; "": of one as it is.
    """
    if not isinstance(weight, jax.Array | jax.ShapeDtypeStruct):
        return False
    return kernel_for(backend.cpu_dense, weight, activation) is not None


def dense_matmul(
    x: jax.Array,
    weight: jax.Array,
    *,
    backend: Backend,
    layer: jax.Array | None = None,
    dtype: jnp.dtype = FLOAT32,
) -> jax.Array:
    """``x @ weight.T``, [M, N], summed up in float32 and rounded to a dtype.

    x: [M, K]; weight: [N, K]; with ``layer``, an i32 scalar, a stack [L, N, K] of which that
    layer is meant, and read where it lies.
    A kernel writes float32 or bfloat16; by AMX, numbers too small for a normal one are zeros.
    By a kernel where `has_kernel` and both have one dtype; else by the reference, which is differentiable.
    Raises ValueError where shapes do not fit together.
    """
    _check(x, weight, layer)
    kernel = kernel_for(backend.cpu_dense, weight)
    if kernel is not None and x.dtype == weight.dtype:
        return dense_matmul_cpu(kernel, x, weight, layer, dtype)
    return dense_matmul_reference(x, _of_layer(weight, layer), dtype)


def gated_matmul(
    x: jax.Array,
    weight: jax.Array,
    *,
    activation: str,
    backend: Backend,
    layer: jax.Array | None = None,
    dtype: jnp.dtype = FLOAT32,
) -> jax.Array:
    """The activation, one of `cpu_ffi.ACTIVATIONS`, of x by the first half of a weight's rows, times x by the second
    half: [M, N], in float32, and rounded once, to a dtype.

    x: [M, K]; weight: [2 N, K], or a stack [L, 2 N, K], as in `dense_matmul`.
    Raises ValueError where shapes do not fit together, or the activation is another one.
    """
    _check(x, weight, layer)
    if activation not in ACTIVATIONS or weight.shape[-2] % 2:
        raise ValueError(f"a gated product is {' or '.join(ACTIVATIONS)} of halves, got {activation!r}, {weight.shape}")
    kernel = kernel_for(backend.cpu_dense, weight, activation)
    if kernel is not None and x.dtype == weight.dtype:
        return dense_matmul_cpu(kernel, x, weight, layer, dtype, is_gated=True)
    return gated_matmul_reference(x, _of_layer(weight, layer), activation, dtype)


def _check(x: jax.Array, weight: jax.Array, layer: jax.Array | None) -> None:
    stack = "" if layer is None else "L, "
    if x.ndim != 2 or weight.ndim != 2 + (layer is not None) or weight.shape[-1] != x.shape[1]:
        raise ValueError(f"the weight must be [{stack}N, K] beside x [M, K], got {weight.shape} and {x.shape}")


def _of_layer(weight: jax.Array, layer: jax.Array | None) -> jax.Array:
    return weight if layer is None else lax.dynamic_index_in_dim(weight, layer, keepdims=False)
