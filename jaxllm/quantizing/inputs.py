"""What a solver knows of the inputs of a matrix: their second moments, in which the error of its products is written.

With inputs x in the rows of X, and D the difference of two matrices, the products differ by

    sum over x of |D x|^2 = trace(D H D'),    H = X' X

which is a sum over the rows d of D, d H d': rows are independent of each other.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class InputMoments:
    """Sums over the inputs [T, K] of a matrix [N, K]."""

    #: float32 [K, K], of products
    gram: jax.Array
    #: float32 [K], of absolute values
    absolute: jax.Array

    def __add__(self, other: InputMoments) -> InputMoments:
        return jax.tree.map(jnp.add, self, other)


def moments(x: jax.Array) -> InputMoments:
    """Of inputs [..., K]."""
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return InputMoments(gram=products(x.T, x), absolute=jnp.abs(x).sum(axis=0))


def row_errors(difference: jax.Array, gram: jax.Array) -> jax.Array:
    """d H d' of each row d of [N, K]: float32 [N], not below zero."""
    return jnp.sum(products(difference, gram) * difference, axis=1).clip(min=0)


def products(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in float32, which on a GPU does not mean TF32."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
