"""Weights that stay quantized in memory: pytrees that stand in a matrix's place.

Each is a matrix [N, K] ([out, in]), and its arrays may have further dimensions in front, the same for all: experts, and
a stack of layers. `shape` is the matrix's own, and `dequantize` the matrix. Four bits in groups have a type of
their own beside their kernel (`quant_matmul.layout.Int4Weight`).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quant_matmul.layout import Int4Weight, unpack

Weight = TypeVar("Weight")


@runtime_checkable
class Quantized(Protocol):
    """What all quantized weights can do."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., N, K): the weight's own."""
        ...

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        """The weight itself, [..., N, K], computed in float32 and rounded once to ``dtype``."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledWeight:
    """Eight-bit numbers and scales: ``w[n, k] = (values[n, k] - zeros[n, k // g]) * scales[n, k // g]``."""

    #: int8 or float8_e4m3fn [..., N, K]
    values: jax.Array
    #: bf16, f16 or f32 [..., N, K / g]
    scales: jax.Array
    #: int16 [..., N, K / g]; None: zero
    zeros: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def one_scale_a_row(self) -> bool:
        """Whether a row has one scale, which then is a factor of the product, too."""
        return self.scales.shape[-1] == 1 and self.zeros is None

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        *rest, k = self.values.shape
        groups = self.scales.shape[-1]
        values = self.values.astype(jnp.float32).reshape(*rest, groups, k // groups)
        if self.zeros is not None:
            values = values - self.zeros.astype(jnp.float32)[..., None]
        return (values * self.scales.astype(jnp.float32)[..., None]).reshape(*rest, k).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookWeight:
    """Four-bit codes into a table of sixteen numbers, and a scale for each group of g along K:
    ``w[n, k] = table[q[n, k]] * scales[n, k // g] * factors[n, 0]``.
    """

    #: uint8 [..., N, K / 2], each group as `quant_matmul.layout.pack` has it
    packed: jax.Array
    #: f32 [..., N, K / g]; or float8_e4m3fn; or uint8, exponents of two that are 127 too large (e8m0)
    scales: jax.Array
    #: f32 [..., N, 1], what scales of eight bits are multiplied by; None: one
    factors: jax.Array | None = None
    table: tuple[float, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], self.packed.shape[-1] * 2)

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        *rest, k = self.shape
        groups = self.scales.shape[-1]
        values = jnp.asarray(self.table, jnp.float32)[unpack(self.packed, k // groups)]
        scales = power_of_two(self.scales) if self.scales.dtype == jnp.uint8 else self.scales.astype(jnp.float32)
        if self.factors is not None:
            scales = scales * self.factors
        return (values.reshape(*rest, groups, k // groups) * scales[..., None]).reshape(*rest, k).astype(dtype)


def power_of_two(exponents: jax.Array) -> jax.Array:
    """float32 ``2 ** (e - 127)`` of uint8 exponents (e8m0): the exponent's bits, but for 0, which is subnormal."""
    bits = jnp.where(exponents == 0, jnp.uint32(1 << 22), exponents.astype(jnp.uint32) << 23)
    return lax.bitcast_convert_type(bits, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reordered:
    """A weight whose columns lie in another order (GPTQ's act-order): column i of `weight` is column order[i]."""

    weight: Quantized
    #: i32 [..., K]
    order: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        place = jnp.argsort(self.order, axis=-1)[..., None, :]
        return jnp.take_along_axis(self.weight.dequantize(dtype), place, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedInputs:
    """A weight whose inputs are quantized, too."""

    weight: Quantized
    #: f32 [..., parts], of inputs that have one scale for good, of which the largest counts; None: each token has its
    #: own
    scales: jax.Array | None = None
    #: "int8" or "float8_e4m3fn"
    dtype: str = dataclasses.field(metadata={"static": True})
    #: numbers of a token that have a scale of their own; 0: all of them share one
    group: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        return self.weight.dequantize(dtype)

    def rounded(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., K] in eight bits: numbers, float32 [..., groups, K / groups], and their scales [..., groups, 1]."""
        largest = 127.0 if self.dtype == "int8" else 448.0
        wide = x.astype(jnp.float32)
        grouped = wide.reshape(*x.shape[:-1], -1, self.group or x.shape[-1])
        if self.scales is None:
            scales = jnp.max(jnp.abs(grouped), axis=-1, keepdims=True) / largest
        else:
            scales = jnp.full((*grouped.shape[:-1], 1), jnp.max(self.scales))
        scaled = jnp.clip(grouped / jnp.where(scales == 0, 1.0, scales), -largest, largest)
        rounded = jnp.round(scaled) if self.dtype == "int8" else scaled.astype(self.dtype).astype(jnp.float32)
        return rounded, scales

    def codes(
        self, x: jax.Array, *, layer: jax.Array | None = None, dtype: jnp.dtype | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """x [M, K] in eight bits, [M, K] of ``dtype`` (None: of `dtype`), and their scales, float32 [M, groups].

        Args:
            layer: i32 scalar; the weight is a stack of which that layer is meant.
            dtype: in which all these numbers are exact.
        """
        own = self if layer is None or self.scales is None else dataclasses.replace(self, scales=self.scales[layer])
        rounded, scales = own.rounded(x)
        return rounded.reshape(x.shape).astype(dtype or self.dtype), scales[..., 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joined:
    """Weights that are multiplied by the same input and stored in different forms, one below the other."""

    parts: tuple[jax.Array | Quantized, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        *rest, _, k = self.parts[0].shape
        return (*rest, sum(part.shape[-2] for part in self.parts), k)

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        return jnp.concatenate([dense(part, dtype) for part in self.parts], axis=-2)


def dense(weight: jax.Array | Quantized, dtype: jnp.dtype) -> jax.Array:
    """The matrix that a weight is; of an array itself, in its own dtype."""
    return weight.dequantize(dtype) if is_quantized(weight) else weight  # pyright: ignore


def is_quantized(weight: object) -> bool:
    """Whether it stands in a matrix's place, and is no array."""
    return hasattr(weight, "dequantize")


def rows(weight: Weight, places: jax.Array) -> Weight:
    """Some rows of a matrix [N, K], i32 [...], as a matrix [..., K] that is stored as it is."""
    if isinstance(weight, Int4Weight):
        scales, zeros = (array[:, places] for array in (weight.scales, weight.zeros))
        return dataclasses.replace(weight, packed=weight.packed[places], scales=scales, zeros=zeros)
    if isinstance(weight, RoundedInputs | Reordered):
        return dataclasses.replace(weight, weight=rows(weight.weight, places))
    return jax.tree.map(lambda array: array[places], weight)


def index(weight: Weight, place: jax.Array) -> Weight:
    """The matrix at ``place``, an i32 scalar, of matrices that are stacked on their first axis."""
    return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, place, keepdims=False), weight)
