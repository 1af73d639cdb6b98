"""Rounding to the nearest number of a grid: a few bits, a scale and a zero point for each group of a row's columns.

w[n, k] = (code[n, k] - zeros[n, k // g]) * scales[n, k // g],    code in 0 .. 2 ** bits - 1
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Which numbers a matrix may have. Hashable: a compiled solver is made for one of these."""

    bits: int
    #: columns that share a scale
    group: int
    #: whether the zero point is the middle of the codes, and the largest number decides on the scale
    symmetric: bool
    #: in which scales are stored
    scale_dtype: str = "float16"
    #: GPTQ's first format stores zero points less one, and readers differ in what they make of a zero less one
    least_zero: int = 0

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, groups: jax.Array, shrink: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array]:
        """The scales and zero points with which a group's lowest and highest number just have codes.

        Args:
            groups: float32 [..., g].
            shrink: a factor on these two numbers: what is beyond is clipped.

        Returns:
            (scales, zeros), float32 [...], the scales rounded to their dtype.
        """
        low = groups.min(axis=-1).clip(max=0) * shrink
        high = groups.max(axis=-1).clip(min=0) * shrink
        if self.symmetric:
            scales = self._stored(2 * jnp.maximum(-low, high) / self.largest)
            return scales, jnp.full_like(scales, 1 << (self.bits - 1))
        scales = self._stored((high - low) / self.largest)
        zeros = jnp.round(-low / _steps(scales)).clip(0, self.largest)
        if self.least_zero:
            raised = zeros < self.least_zero
            scales = jnp.where(raised, self._stored(high / (self.largest - self.least_zero)), scales)
            zeros = jnp.where(raised, self.least_zero, zeros)
        return scales, zeros

    def _stored(self, scales: jax.Array) -> jax.Array:
        return scales.astype(self.scale_dtype).astype(jnp.float32)

    def codes(self, numbers: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
        """The nearest codes, float32 in the numbers' shape, with which the others must go."""
        return (jnp.round(numbers / _steps(scales)) + zeros).clip(0, self.largest)

    def nearest(self, matrix: jax.Array, scales: jax.Array, zeros: jax.Array) -> Rounded:
        """A matrix [N, K] with the scales and zero points [N, K / g]."""
        groups = matrix.reshape(len(matrix), -1, self.group)
        return Rounded(self.codes(groups, scales[..., None], zeros[..., None]).reshape(matrix.shape), scales, zeros)

    def round(self, matrix: jax.Array, shrink: jax.Array | float = 1.0) -> Rounded:
        """A matrix [N, K] with the scales and zero points that `fit` finds."""
        return self.nearest(matrix, *self.fit(matrix.reshape(len(matrix), -1, self.group), shrink))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A matrix on a grid, of float32 numbers all of which the stored types have."""

    codes: jax.Array  # [N, K]
    scales: jax.Array  # [N, K / g]
    zeros: jax.Array  # [N, K / g]

    def matrix(self) -> jax.Array:
        """float32 [N, K]"""
        rows, columns = self.codes.shape
        codes = self.codes.reshape(rows, self.scales.shape[1], -1)
        return ((codes - self.zeros[..., None]) * self.scales[..., None]).reshape(rows, columns)


def better_rows(first: Rounded, second: Rounded, is_first: jax.Array) -> Rounded:
    """Of each row, one of two: `is_first` [N]."""
    return jax.tree.map(lambda a, b: jnp.where(is_first[:, None], a, b), first, second)


def _steps(scales: jax.Array) -> jax.Array:
    """What to divide by: groups of zeros have a scale of zero."""
    return jnp.where(scales == 0, 1.0, scales)
