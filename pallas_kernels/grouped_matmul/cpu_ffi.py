"""Grouped matrix product by the kernels for CPUs: every row by its own group's matrix, read where those of all layers
lie (`packed_matmul.kernel`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend
from pallas_kernels.packed_matmul.cpu_ffi import grouped_kernel_of, packed_matmul_cpu
from pallas_kernels.quantized import Quantized

#: most rows, in the mean, of a group for which the kernels are the faster way
MOST_ROWS = 16


def has_grouped_kernel(backend: Backend, w: Any, mean_rows: int) -> bool:
    """Whether a product of so many rows, in the mean, with each of the matrices [..., E, N, K], or with a tree of their
    shapes, has a kernel.
    """
    return bool(backend.cpu_grouped) and mean_rows <= MOST_ROWS and grouped_kernel_of(w) is not None


def grouped_matmul_cpu(
    x: jax.Array, w: jax.Array | Quantized, group_sizes: jax.Array, *, layer: jax.Array | None, version: str
) -> jax.Array:
    """`grouped_matmul_reference`, of a layer of a stack [L, E, N, K] or of [E, N, K] where layer is None. A row of the
    result has the same bits whatever other rows there are.
    """
    *stack, _, _ = w.shape
    groups = stack[-1]
    # all layers' matrices, one after the other
    matrices = jax.tree.map(lambda array: array.reshape(-1, *array.shape[len(stack) :]), w)
    group = jnp.sum(jnp.cumsum(group_sizes) <= jnp.arange(len(x))[:, None], axis=1, dtype=jnp.int32)
    own = group < groups
    places = jnp.where(own, group + (0 if layer is None else layer * groups), -1)
    y = packed_matmul_cpu(x, matrices, places, version=version)
    return jnp.where(own[:, None], y, 0).astype(x.dtype)
