"""GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1): columns are rounded one after the other, and what each
rounding changes in the products is made up for, as well as it goes, by the columns that are not rounded yet.

With H = X'X of the inputs, damped, and the upper triangular U of ``inv(H) = U'U``, rounding column i of a row w to q
leaves an error of ``(w[i] - q) / U[i, i]``, of which ``U[i, j]`` times is taken off each later column j. The columns of
a group are rounded with the scale that fits them when the first of them is reached. With act-order, columns with large
inputs come first, while there are most others to make up for them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.linalg import solve_triangular

from jaxllm.quantizing.compiled import compiled
from jaxllm.quantizing.grid import Grid, Rounded, better_rows
from jaxllm.quantizing.inputs import products, row_errors

Matrix = jax.Array | np.ndarray
#: of the mean of H's diagonal, added to it: what the paper takes
DAMPING = 0.01
#: columns after which the errors of all are taken off the rest in one product
BLOCK = 128


def gptq(grid: Grid, matrix: Matrix, gram: Matrix, *, act_order: bool) -> tuple[Rounded, np.ndarray | None]:
    """Round a matrix for its inputs. Rows for which rounding to the nearest does better are rounded so.

    Args:
        matrix: float32 [N, K].
        gram: float32 [K, K], `InputMoments.gram`.

    Returns:
        (rounded, order): with act-order the columns lie in this order, int32 [K]; else None.
    """
    order = None
    if act_order:
        order = np.argsort(-np.diagonal(gram), kind="stable").astype(np.int32)
        # within a group, where their order is for nobody to see, they lie as readers have them
        matrix, gram = np.asarray(matrix)[:, order], np.asarray(gram)[order][:, order]
    rounded = _solve(grid, matrix, gram, inverse_factor(np.asarray(gram)))
    if order is not None:
        inside = order.reshape(-1, grid.group).argsort(axis=1)
        places = (inside + np.arange(0, len(order), grid.group)[:, None]).ravel()
        rounded = dataclasses.replace(rounded, codes=np.asarray(rounded.codes)[:, places])
        order = order[places]
    return rounded, order


def inverse_factor(gram: np.ndarray) -> np.ndarray:
    """The upper triangular U, float32, of ``inv(H) = U'U`` with the damped H; computed in float64.

    It is the inverse of the upper triangular R of ``H = RR'``, which is the Cholesky factor of H with rows and columns
    from last to first, turned round.
    """
    damped = gram.astype(np.float64)
    diagonal = np.diagonal(damped).copy()
    # an input that is never there says nothing of its column, which is rounded by itself
    diagonal[diagonal == 0] = 1
    np.fill_diagonal(damped, diagonal + DAMPING * diagonal.mean())
    turned = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(turned, np.eye(len(turned)), check_finite=False).astype(np.float32)


@functools.partial(compiled, static_argnums=0)
def _solve(grid: Grid, matrix: Any, gram: Any, factor: Any) -> Rounded:
    rows, columns = matrix.shape
    group, groups = grid.group, columns // grid.group
    block = next(size for size in range(min(BLOCK, group), 0, -1) if group % size == 0)

    # all is transposed, [K, N], so that the numbers of a column are neighbours
    def of_column(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Column i of a block: its codes, and what they leave to the later ones."""
        part, corner, codes, errors, scales, zeros = state
        own = part[i]
        code = grid.codes(own, scales, zeros)
        error = (own - (code - zeros) * scales) / corner[i, i]
        return part - corner[i][:, None] * error, corner, codes.at[i].set(code), errors.at[i].set(error), scales, zeros

    def of_block(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rest, codes, scales, zeros = state
        first = i * block
        part = lax.dynamic_slice(rest, (first, 0), (block, rows))
        corner = lax.dynamic_slice(factor, (first, first), (block, block))
        empty = jnp.zeros_like(part)
        _, _, found, errors, _, _ = lax.fori_loop(0, block, of_column, (part, corner, empty, empty, scales, zeros))
        # left of the block U is zero
        rest -= products(lax.dynamic_slice(factor, (first, 0), (block, columns)).T, errors)
        return rest, lax.dynamic_update_slice(codes, found, (first, 0)), scales, zeros

    def of_group(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rest, codes, all_scales, all_zeros = state
        scales, zeros = grid.fit(lax.dynamic_slice(rest, (i * group, 0), (group, rows)).T)
        each = group // block
        rest, codes, _, _ = lax.fori_loop(i * each, (i + 1) * each, of_block, (rest, codes, scales, zeros))
        return rest, codes, all_scales.at[i].set(scales), all_zeros.at[i].set(zeros)

    none = jnp.zeros((groups, rows), jnp.float32)
    begin = matrix.T, jnp.zeros((columns, rows), jnp.float32), none, none
    _, codes, scales, zeros = lax.fori_loop(0, groups, of_group, begin)
    solved, nearest = Rounded(codes.T, scales.T, zeros.T), grid.round(matrix)
    errors = [row_errors(each.matrix() - matrix, gram) for each in (solved, nearest)]
    return better_rows(solved, nearest, errors[0] <= errors[1])
