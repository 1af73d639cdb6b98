"""What adapters of low rank add to a product, in plain jnp."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax


def lora_matmul_reference(
    x: jax.Array, a: jax.Array, b: jax.Array, slots: jax.Array, parts: tuple[int, ...]
) -> jax.Array:
    """Every row by the adapter of its slot (Hu et al. 2021, arXiv:2106.09685): ``out[t] = b[s].T @ (a[s] @ x[t])``.

    x: [T, in]. a: [S, P * r, in]. b: [S, r, out]. slots: i32 [T], s of each row; -1: none, the row is zeros.
    parts: out-features of each of the P matrices that lie joined in b (queries, keys and values, say), their sum is
    `out`. Part p is multiplied by the p-th r numbers of a's product.
    Returns float32 [T, out], all sums and what lies between the products in float32. Differentiable in x, a and b.
    """
    own_product = lambda y, matrix: jnp.einsum(  # noqa: E731
        "tk,nk->tn", y, matrix.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )

    def add_slot(out: jax.Array, slot: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        number, a, b = slot
        own = (slots == number)[:, None]
        # both sides of the products are chosen: what belongs to others may be NaN, which no factor of zero removes
        low = own_product(jnp.where(own, x, 0).astype(jnp.float32), a)
        made = [own_product(low[:, ranks], b[:, columns].T) for columns, ranks in places(parts, len(b))]
        return jnp.where(own, jnp.concatenate(made, axis=1), out), None

    zeros = jnp.zeros((x.shape[0], b.shape[2]), jnp.float32)
    return lax.scan(add_slot, zeros, (jnp.arange(len(a), dtype=jnp.int32), a, b))[0]


def places(parts: tuple[int, ...], rank: int) -> Iterator[tuple[slice, slice]]:
    """Of each part, its columns of b and its numbers of a's product."""
    bounds = itertools.pairwise((0, *itertools.accumulate(parts)))
    for number, (first, behind) in enumerate(bounds):
        yield slice(first, behind), slice(number * rank, (number + 1) * rank)
