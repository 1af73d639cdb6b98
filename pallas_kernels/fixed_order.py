"""Sums whose bits do not depend on what else is summed in the same step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

#: numbers that are added to as many others at once
LANES = 64


def row_sum(x: jax.Array) -> jax.Array:
    """The sum over the last axis, which stays: [..., n] -> [..., 1].

    XLA:CPU adds a row's numbers in an order that depends on how many rows there are, so there the order is spelled out:
    `LANES` by `LANES` from the left, then the right half to the left one. Elsewhere the compiler chooses it.
    """
    return lax.platform_dependent(x, cpu=_in_order, default=lambda x: jnp.sum(x, axis=-1, keepdims=True))


def _in_order(x: jax.Array) -> jax.Array:
    lanes = x[..., :LANES]
    for first in range(LANES, x.shape[-1], LANES):
        lanes = _add(lanes, x[..., first : first + LANES])
    while (length := lanes.shape[-1]) > 1:
        half = 1 << ((length - 1).bit_length() - 1)
        lanes = _add(lanes[..., :half], lanes[..., half:])
    return lanes


def _add(wide: jax.Array, narrow: jax.Array) -> jax.Array:
    """`narrow` to the first numbers of `wide`."""
    length = narrow.shape[-1]
    if length == wide.shape[-1]:
        return wide + narrow
    return jnp.concatenate([wide[..., :length] + narrow, wide[..., length:]], axis=-1)
