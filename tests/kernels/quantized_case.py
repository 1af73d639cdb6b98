"""Random quantized weights of every form that has a kernel, and what they are in float64, by the forms' definitions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.quant_matmul.layout import int4_weight, pack
from pallas_kernels.quantized import CodebookWeight, RoundedInputs, ScaledWeight

#: of NF4 (Dettmers et al. 2023, arXiv:2305.14314, appendix E) rounded here: any sixteen numbers are a codebook
NF4 = (-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0)
#: the sixteen numbers of four bits with two of exponent (OCP Microscaling formats, version 1.0)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How a matrix [N, K] is stored, and how its inputs are rounded."""

    #: "int4", "nf4", "mxfp4", "int8" or "float8_e4m3fn"
    kind: str
    k: int
    n: int
    #: numbers of K with one scale; 0: all
    group: int = 0
    scale_dtype: str = "float32"
    has_zeros: bool = False
    #: whether inputs are rounded to eight bits, in groups of as many; None: they are not; 0: all of a row
    x_group: int | None = None
    x_dtype: str = "bfloat16"

    def draw(self, draw: np.random.Generator, *stack: int) -> tuple[Any, np.ndarray]:
        """A weight [*stack, N, K], and the same in float64."""
        groups = self.k // (self.group or self.k)
        scales = np.asarray(draw.normal(size=(*stack, self.n, groups)) / 8, jnp.dtype(self.scale_dtype))
        wide = scales.astype(np.float64)
        if self.kind in ("int4", "nf4", "mxfp4"):
            codes = draw.integers(0, 16, (*stack, self.n, self.k))
            packed = pack(jnp.asarray(codes), self.group)
            if self.kind == "int4":
                zeros = draw.integers(0, 17, scales.shape)
                per_group = (jnp.swapaxes(jnp.asarray(each), -1, -2) for each in (scales, zeros.astype(np.uint8)))
                weight = self._with_rounded_inputs(int4_weight(packed, *per_group))
                return weight, self._spread(wide, codes - self._repeat(zeros))
            table = E2M1 if self.kind == "mxfp4" else NF4
            if self.kind == "mxfp4":
                exponents = draw.integers(110, 130, scales.shape)
                scales, wide = exponents.astype(np.uint8), 2.0 ** (exponents - 127)
            weight = CodebookWeight(packed=packed, scales=jnp.asarray(scales), table=table)
            return weight, self._spread(wide, np.asarray(table)[codes])
        if self.kind == "int8":
            values = draw.integers(-128, 128, (*stack, self.n, self.k)).astype(np.int8)
        else:
            # every finite number, subnormal ones too
            bits = draw.integers(0, 255, (*stack, self.n, self.k)).astype(np.uint8)
            values = np.where(bits == 127, 0, bits).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
        zeros, numbers = None, values.astype(np.float64)
        if self.has_zeros:
            zeros = draw.integers(-128, 129, scales.shape).astype(np.int16)
            numbers = numbers - self._repeat(zeros)
            zeros = jnp.asarray(zeros)
        weight = ScaledWeight(values=jnp.asarray(values), scales=jnp.asarray(scales), zeros=zeros)
        return self._with_rounded_inputs(weight), self._spread(wide, numbers)

    def inputs(self, draw: np.random.Generator, rows: int) -> jax.Array:
        """x [rows, K]; where it is rounded, of numbers that eight bits have, so that rounding leaves them as they are:
        each group has the largest of them, and a power of two for a scale."""
        if self.x_group is None:
            return jnp.asarray(draw.normal(size=(rows, self.k)), self.x_dtype)
        groups = self.k // (self.x_group or self.k)
        if self.kind != "float8_e4m3fn":
            numbers = draw.integers(-126, 127, (rows, groups, self.k // groups)).astype(np.float64)
            numbers[..., 0] = 127
        else:
            bits = draw.integers(0, 126, (rows, groups, self.k // groups)).astype(np.uint8)
            numbers = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * draw.choice([-1, 1], bits.shape)
            numbers[..., 0] = 448
        scales = 2.0 ** draw.integers(-9, -5, (rows, groups, 1))
        return jnp.asarray((numbers * scales).reshape(rows, self.k), self.x_dtype)

    def _with_rounded_inputs(self, weight: Any) -> Any:
        if self.x_group is None:
            return weight
        dtype = self.kind if self.kind == "float8_e4m3fn" else "int8"
        return RoundedInputs(weight=weight, dtype=dtype, group=self.x_group)

    def _repeat(self, per_group: np.ndarray) -> np.ndarray:
        return np.repeat(per_group, self.group or self.k, axis=-1)

    def _spread(self, scales: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return numbers * self._repeat(scales)


def check_close(form: Form, out: np.ndarray, x: np.ndarray, w64: np.ndarray, *, rounds_weight: bool = True) -> None:
    """Whether out [M, N] is the product of x [M, K] and a weight.

    Of the bound, K products summed in float32, the scales' and their products' roundings there, one rounding to x's
    type, and of each number of the weight another, where it is rounded.
    """
    x64, eps = x.astype(np.float64), float(jnp.finfo(form.x_dtype).eps)
    expected, summed = x64 @ w64.T, np.abs(x64) @ np.abs(w64).T
    relative = (form.k + 4) * float(np.finfo(np.float32).eps) + (eps if rounds_weight else 0)
    assert out.shape == expected.shape
    assert np.all(np.abs(out - expected) <= relative * summed + eps * np.abs(expected))


def stacked(weight: Any, layers: int, layer: int) -> Any:
    """A stack in which the weight is one layer, and the others are NaN where their type has that."""

    def stack(leaf: jax.Array) -> jax.Array:
        other = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
        return jnp.full((layers, *leaf.shape), other, leaf.dtype).at[layer].set(leaf)

    return jax.tree.map(stack, weight)
