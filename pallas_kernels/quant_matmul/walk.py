"""How kernels go along K through the rows of a quantized weight: what is known of it before anything is traced.

A step takes as many numbers of each row as lie in one group, or a part of one, so that a step's float32 product has
one scale a row of the weight. Numbers of eight bits are widened to x's type, in which all of them are exact, or, where
x is rounded to the same eight bits, multiplied as they are.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels.backend import Backend
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quantized import CodebookWeight, Quantized, RoundedInputs, ScaledWeight

#: groups of four-bit codes that kernels take: half a group is a product's inner dimension, a power of two from 16 up
GROUP_SIZES = (32, 64, 128, 256)
#: numbers of eight bits of a step: a line of the caches, and the least that a product of bytes takes
MOST_BYTES, LEAST_BYTES = 128, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """Static: a kernel is traced with one of these."""

    #: numbers of K that a step takes
    step: int
    #: of K, the last of which may be partly beyond it
    steps: int
    #: steps that have one scale of the weight; 0: a row has one scale for all
    steps_a_scale: int
    #: the same of x; 0: a row of x has one scale, or none
    steps_an_x_scale: int = 0
    #: whether both sides are multiplied in eight bits
    native: bool = False
    #: whether float8 numbers are widened by arithmetic on their bits, where a GPU has no instruction for it
    by_bits: bool = False


def walk_of(weight: Quantized, dtype: jnp.dtype, backend: Backend) -> Walk | None:
    """How kernels multiply x of a type, bf16 or f16, by a weight; None: they cannot.

    Not by `Joined` and `Reordered` ones, nor blocks of GGUF files.
    """
    own, x_group = (weight.weight, weight.group) if isinstance(weight, RoundedInputs) else (weight, 0)
    # float32 has no tensor cores (TF32 is not float32), so there is nothing to gain
    if dtype not in (jnp.bfloat16, jnp.float16) or not isinstance(own, (Int4Weight, ScaledWeight, CodebookWeight)):
        return None
    if isinstance(own, CodebookWeight) and own.factors is not None:
        return None
    k = own.shape[-1]
    x_group = x_group or k
    group = k // own.scales.shape[-2 if isinstance(own, Int4Weight) else -1]
    native = by_bits = False
    if isinstance(own, ScaledWeight):
        step = _step(k, math.gcd(group, x_group))
        stored = own.values.dtype
        by_bits = stored == jnp.float8_e4m3fn and not backend.supports(stored)
        native = isinstance(weight, RoundedInputs) and stored == weight.dtype and own.zeros is None and not by_bits
    else:
        step = group if group in GROUP_SIZES and x_group % group == 0 else None
    if step is None:
        return None
    return Walk(
        step=step,
        steps=-(-k // step),
        steps_a_scale=0 if isinstance(own, ScaledWeight) and group == k else group // step,
        steps_an_x_scale=0 if x_group == k else x_group // step,
        native=native,
        by_bits=by_bits,
    )


def _step(k: int, group: int) -> int | None:
    """A power of two that divides a group of numbers, unless that is all K."""
    if group == k:
        return max(LEAST_BYTES, min(MOST_BYTES, 1 << (k - 1).bit_length()))
    step = min(MOST_BYTES, group & -group)
    return step if step >= LEAST_BYTES else None
