"""The loop that the kernels of quantized weights share: along K, through some rows of one matrix.

The weight is the left operand (out^T = w x^T): it comes out of arithmetic in registers, and tensor cores take only the
left operand from there. Every step's product is in float32 (int32 of int8 by int8) before a scale multiplies it, so
nothing is rounded that the reference does not round, but for a codebook's numbers to x's type.

Four bits: the low halves of a group's bytes are multiplied with the first half of the group of x, the high halves with
the second (see `layout`). What enters a product is ``q - zero``, an integer from -16 to 15, or the number that a
codebook has for q.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quant_matmul.walk import Walk
from pallas_kernels.quantized import CodebookWeight, ScaledWeight, power_of_two

#: (integer type, its bits, the number whose mantissa they end): bits | n is exactly number + n for n in 0..15.
#: An OR, where converting an integer to a float takes one of a few slow units
_MAGIC = {
    "bfloat16": (jnp.uint16, 0x4300, 128),
    "float16": (jnp.uint16, 0x6400, 1024),
    "float32": (jnp.uint32, 0x4B000000, 2**23),
}
#: the same for n in 0..255, in float32
_BITS, _NUMBER = 0x4B000000, 2**23
#: what an e4m3 number is too small by where its bits are read as float16's, whose exponents are 8 less
_TOO_SMALL = 256.0

Factors = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Rows of a matrix, some of which may lie behind its last, and the x that they are multiplied with."""

    walk: Walk
    #: an Int4Weight, ScaledWeight or CodebookWeight of references to a stack of them
    weight: Any
    #: reference to a codebook's numbers, float32 [16]
    table: Any
    #: of the matrix in the stack
    place: Any
    #: `pl.ds` of its rows; and bool [rows], which of them there are
    rows: Any
    mask: jax.Array
    #: (first number of K, how many) -> [block_m, so many]
    load_x: Callable[[Any, int], jax.Array]
    #: (group) -> float32 [block_m]; None: x has no scales
    load_x_scale: Callable[[Any], jax.Array] | None

    def product(self, block_m: int, first: Any, count: Any) -> jax.Array:
        """float32 [rows, block_m], of ``count`` steps from ``first`` on."""
        walk = self.walk
        scaled_in_steps = bool(walk.steps_a_scale or walk.steps_an_x_scale)
        integers = walk.native and self.weight.values.dtype == jnp.int8 and not scaled_in_steps

        def add(i: Any, carry: tuple[jax.Array, Factors]) -> tuple[jax.Array, Factors]:
            acc, factors = carry
            step = first + i
            product = self._step(step, factors)
            if walk.steps_an_x_scale:
                assert self.load_x_scale is not None
                product = product.astype(jnp.float32) * self.load_x_scale(step // walk.steps_an_x_scale)[None, :]
            # Triton loads the wide tiles ahead of their use by itself, but nothing as narrow as these
            ahead = self._factors(jnp.minimum(step + 1, walk.steps - 1)) if walk.steps_a_scale else factors
            return acc + product, ahead

        acc = jnp.zeros((self.rows.size, block_m), jnp.int32 if integers else jnp.float32)
        factors = self._factors(jnp.minimum(first, walk.steps - 1))
        acc, _ = lax.fori_loop(0, count, add, (acc, factors))
        acc = acc.astype(jnp.float32)
        if not walk.steps_a_scale:
            acc = acc * self._of_group(self.weight.scales, jnp.int32(0)).astype(jnp.float32)[:, None]
        if self.load_x_scale is not None and not walk.steps_an_x_scale:
            acc = acc * self.load_x_scale(jnp.int32(0))[None, :]
        return acc * _TOO_SMALL if walk.by_bits else acc

    def _factors(self, step: Any) -> Factors:
        """The zeros, if there are any, and the scales of a step, [rows]; no scales where a row has one for all."""
        walk, weight = self.walk, self.weight
        group = step // walk.steps_a_scale if walk.steps_a_scale else jnp.int32(0)
        zeros = None if isinstance(weight, CodebookWeight) else weight.zeros
        scales = weight.scales if walk.steps_a_scale else None
        return tuple(self._of_group(each, group) for each in (zeros, scales) if each is not None)

    def _of_group(self, ref: Any, group: Any) -> jax.Array:
        """[rows] of what a group has one of; an `Int4Weight` has the groups first."""
        index = (group, self.rows) if isinstance(self.weight, Int4Weight) else (self.rows, group)
        return masked_load(ref.at[self.place, *index], self.mask)

    def _step(self, step: Any, factors: Factors) -> jax.Array:
        """A step's product, [rows, block_m], with its scale where it has its own."""
        *zeros, scale = factors if self.walk.steps_a_scale else (*factors, None)
        if isinstance(self.weight, ScaledWeight):
            product = self._of_bytes(step, *zeros)
        else:
            product = self._of_nibbles(step, *zeros)
        if scale is None:
            return product
        scale = power_of_two(scale) if scale.dtype == jnp.uint8 else scale.astype(jnp.float32)
        return product.astype(jnp.float32) * scale[:, None]

    def _of_nibbles(self, step: Any, zero: jax.Array | None = None) -> jax.Array:
        size = self.walk.step
        half = size // 2
        packed = masked_load(self.weight.packed.at[self.place, self.rows, pl.ds(step * half, half)], self.mask[:, None])
        low, high = self.load_x(step * size, half), self.load_x(step * size + half, half)
        if zero is None:
            widened = lambda codes: plt.load(self.table.at[codes.astype(jnp.int32)]).astype(low.dtype)  # noqa: E731
        else:
            integers, bits, number = _MAGIC[low.dtype.name]
            packed = packed.astype(integers)
            shifted = (zero.astype(jnp.float32) + number).astype(low.dtype)[:, None]
            widened = lambda q: lax.bitcast_convert_type(q | integers(bits), low.dtype) - shifted  # noqa: E731
        four = packed.dtype.type(4)
        return _dot(widened(packed & packed.dtype.type(15)), low) + _dot(widened(packed >> four), high)

    def _of_bytes(self, step: Any, zero: jax.Array | None = None) -> jax.Array:
        size = self.walk.step
        first = step * size
        x = self.load_x(first, size)
        values = self._values(first)
        if self.walk.native:
            return _dot(values, x)
        if values.dtype == jnp.int8:
            unsigned = lax.bitcast_convert_type(values, jnp.uint8) ^ jnp.uint8(128)
            wide = lax.bitcast_convert_type(unsigned.astype(jnp.uint32) | jnp.uint32(_BITS), jnp.float32)
            wide = wide - (_NUMBER + 128.0 if zero is None else zero.astype(jnp.float32)[:, None] + (_NUMBER + 128.0))
            return _dot(wide.astype(x.dtype), x)
        if self.walk.by_bits:
            bits = lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.uint16)
            bits = (bits & jnp.uint16(0x80)) << jnp.uint16(8) | (bits & jnp.uint16(0x7F)) << jnp.uint16(7)
            values = lax.bitcast_convert_type(bits, jnp.float16)
        return _dot(values.astype(x.dtype), x)

    def _values(self, first: Any) -> jax.Array:
        """[rows, step], zeros behind K."""
        ref, size = self.weight.values, self.walk.step
        mask = self.mask[:, None]
        if ref.shape[-1] % size:
            mask = mask & (first + jnp.arange(size) < ref.shape[-1])[None, :]
        return masked_load(ref.at[self.place, self.rows, pl.ds(first, size)], mask)


def masked_load(ref: Any, mask: jax.Array) -> jax.Array:
    """Zeros where ``mask`` is not."""
    return plt.load(ref, mask=mask, other=0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0)


def _dot(weight: jax.Array, x: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return plt.dot(weight, x, trans_b=True, precision=precision)
