"""Product with a weight that stays packed: which implementation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import Backend
from pallas_kernels.packed_matmul.cpu_ffi import kernel_of, packed_matmul_cpu, takes_many_rows
from pallas_kernels.packed_matmul.reference import packed_matmul_reference
from pallas_kernels.quantized import index

#: most rows of x for which a weight's numbers are made in registers; beyond, they are widened for many rows at once
MOST_ROWS = 32


def has_kernel(backend: Backend, weight: Any, *, rows: int = 1) -> bool:
    """Whether a product of so many rows with a weight, or with a tree of its shapes, has a kernel."""
    form = kernel_of(weight) if backend.cpu_kernels else None
    return form is not None and (rows <= MOST_ROWS or takes_many_rows(form, rows))


def packed_matmul(x: jax.Array, weight: Any, *, backend: Backend, layer: jax.Array | None = None) -> jax.Array:
    """``x @ dequantize(weight).T``.

    x: [M, K], bf16, f16 or f32. weight: a `Quantized` [N, K]; with ``layer``, an i32 scalar, a stack [L, N, K] of which
    that layer is meant, and read where it lies.
    Returns float32 [M, N], of the very numbers that the weight stands for: by the weight's kernel where `has_kernel`,
    which multiplies up to `MOST_ROWS` rows of 16 bits in integers (`rounding`) where the weight's numbers are
    some, else by the reference, which is differentiable.
    Raises ValueError where shapes do not fit together.
    """
    stack = "" if layer is None else "L, "
    if x.ndim != 2 or len(weight.shape) != 2 + (layer is not None) or weight.shape[-1] != x.shape[1]:
        raise ValueError(f"the weight must be [{stack}N, K] beside x [M, K], got {weight.shape} and {x.shape}")
    if not has_kernel(backend, weight, rows=x.shape[0]):
        return packed_matmul_reference(x, weight if layer is None else index(weight, layer))
    if layer is None:
        weight = jax.tree.map(lambda array: lax.expand_dims(array, [0]), weight)
    place = jnp.int32(0) if layer is None else layer
    return packed_matmul_cpu(x, weight, place, version=backend.cpu_kernels, many=x.shape[0] > MOST_ROWS)
