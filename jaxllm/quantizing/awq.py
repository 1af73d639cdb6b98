"""AWQ (Lin et al. 2023, arXiv:2306.00978): columns that large inputs meet are scaled up before they are rounded, which
rounds them more finely, and what makes these inputs is scaled down as much.

The scale of column k is the mean of the inputs' absolute values to the power a; of twenty a from 0 (rounding to the
nearest) to 1 that one is taken with which the products come out best (section 3.2). Then numbers of each group are
clipped, row by row, where that lowers the error of the row's products (as the authors' implementation does).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.quantizing.compiled import compiled
from jaxllm.quantizing.grid import Grid, Rounded, better_rows
from jaxllm.quantizing.inputs import row_errors

STRENGTHS = np.arange(20, dtype=np.float32) / 20
#: to which part of themselves a group's lowest and highest number are clipped
CLIPS = np.arange(20, 9, -1, dtype=np.float32) / 20
_SMALLEST = 1e-4


@functools.partial(compiled, static_argnums=0)
def column_scales(grid: Grid, matrices: list[jax.Array], grams: list[jax.Array], absolute: jax.Array) -> jax.Array:
    """What to multiply the columns of some matrices by, which have the same inputs.

    Args:
        matrices, grams: float32 [N, K] and [K, K] of each.
        absolute: float32 [K], `InputMoments.absolute`, or what else says how large a column's inputs are.

    Returns:
        float32 [K], above zero.
    """

    def scales(strength: jax.Array) -> jax.Array:
        found = jnp.maximum((absolute / jnp.maximum(absolute.mean(), 1e-30)) ** strength, _SMALLEST)
        return found / jnp.sqrt(found.max() * found.min())

    def error(strength: jax.Array) -> jax.Array:
        own = scales(strength)
        pairs = zip(matrices, grams, strict=True)
        return sum(row_errors(grid.round(m * own).matrix() / own - m, gram).sum() for m, gram in pairs)  # pyright: ignore

    return scales(jnp.asarray(STRENGTHS)[jnp.argmin(lax.map(error, jnp.asarray(STRENGTHS)))])


@functools.partial(compiled, static_argnums=0)
def clipped(grid: Grid, matrix: jax.Array, gram: jax.Array) -> Rounded:
    """Round a matrix, some of whose groups are clipped.

    Args:
        matrix: float32 [N, K].
        gram: float32 [K, K].
    """
    rows, columns = matrix.shape
    groups = matrix.reshape(rows, -1, grid.group)
    places = jnp.arange(columns).reshape(-1, grid.group)
    blocks = gram[places[:, :, None], places[:, None, :]]

    def error(clip: jax.Array) -> jax.Array:
        difference = grid.round(matrix, clip).matrix().reshape(groups.shape) - groups
        found = jnp.einsum("ngi,gij->ngj", difference, blocks, precision=lax.Precision.HIGHEST)
        return jnp.sum(found * difference, axis=2)

    best = jnp.asarray(CLIPS)[jnp.argmin(lax.map(error, jnp.asarray(CLIPS)), axis=0)]
    tight, nearest = grid.round(matrix, best), grid.round(matrix)
    errors = [row_errors(each.matrix() - matrix, gram) for each in (tight, nearest)]
    return better_rows(tight, nearest, errors[0] < errors[1])
