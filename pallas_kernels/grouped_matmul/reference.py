"""What a grouped matrix product is, in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def grouped_matmul_reference(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Every row by the weight of its own group: ``out[m] = w[g(m)] @ x[m]``.

    x: [M, K], rows sorted by group. w: [E, N, K], the groups' weights, [out, in] as `linear` has them.
    group_sizes: i32 [E], not negative, their sum at most M; group 0 has the first ``group_sizes[0]`` rows and so on.
    Returns [M, N] in x's dtype, accumulated in float32; rows beyond the sum are zeros, whatever x holds there.
    Differentiable in x and w.
    """
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    rows = jnp.arange(x.shape[0])[:, None]
    precision = lax.Precision.HIGHEST

    def add_group(out: jax.Array, group: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        weight, start, end = group
        own = (start <= rows) & (rows < end)
        # both sides of the product are chosen: what belongs to nobody may be NaN, which no factor of zero removes
        mine = jnp.where(own, x, 0)
        y = jnp.einsum("mk,nk->mn", mine, weight, precision=precision, preferred_element_type=jnp.float32)
        return jnp.where(own, y, out), None

    zeros = jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
    out, _ = lax.scan(add_group, zeros, (w, starts, ends))
    return out.astype(x.dtype)
