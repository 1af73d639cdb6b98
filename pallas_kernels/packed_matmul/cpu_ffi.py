"""The kernels for CPUs (`kernel`), and the calls of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import gguf_blocks
from pallas_kernels.cpu_ffi.compiled import Kernels, target_name
from pallas_kernels.gguf_blocks import BlockWeight
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quantized import ScaledWeight

#: what `formats` has; said here, too, since reading it takes llvmlite
GROUPS, SCALE_DTYPES = (32, 64, 128), ("bfloat16", "float16", "float32")
BLOCKS = tuple(gguf_blocks.BLOCKS)
#: columns of x that share a scale; no kernel takes fewer at once
GROUP = 32


def _module(name: str) -> Any:
    from pallas_kernels.packed_matmul.kernel import module

    return module(name)


KERNELS = Kernels(_module, [Path(__file__).parent, Path(gguf_blocks.__file__)])


def load(weights: Iterable[Any], dtype: jnp.dtype, folder: Path | None) -> str:
    """Load the kernels of weights, or of their shapes, for x of a dtype (`Kernels.load`); "" where they have none."""
    forms = {name for weight in weights if (name := kernel_of(weight)) is not None}
    names = {f"{'rounded' if rounds(dtype) else 'exact'}_{form}" for form in forms}
    return KERNELS.load(names, folder) if names else ""


def kernel_of(weight: Any) -> str | None:
    """The name of the kernel that multiplies by a weight, which may be a tree of shapes; None: there is none."""
    if isinstance(weight, ScaledWeight):
        fits = weight.one_scale_a_row and weight.values.dtype == jnp.int8 and weight.shape[-1] % GROUP == 0
        return "int8" if fits else None
    if isinstance(weight, Int4Weight):
        dtype = jnp.dtype(weight.scales.dtype).name
        fits = weight.group_size in GROUPS and dtype in SCALE_DTYPES
        return f"int4_{weight.group_size}_{dtype}" if fits else None
    if isinstance(weight, BlockWeight):
        return weight.kind if weight.kind in BLOCKS else None
    return None


def rounds(dtype: jnp.dtype) -> bool:
    """Whether x of a dtype is multiplied in integers of 16 bits, and not in float32."""
    return dtype != jnp.float32


def in_16_bits(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [M, K], int16, and the scale and the sum of each `GROUP` of columns, float32 [M, K / GROUP].

    A scale is the power of two that gives a group's largest number 15 bits. So bfloat16's numbers, which have 8, come
    out as they are down to a 128th of the largest, and others are off by 2 ** -16 of it at most.
    """
    grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, GROUP)
    # of the bits, whose order is that of the numbers: XLA:CPU's maximum of floats may lose a NaN
    largest = jnp.max(lax.bitcast_convert_type(grouped, jnp.uint32) & 0x7FFFFFFF, axis=-1, keepdims=True)
    # the exponent, no less than what keeps the scale's reciprocal finite
    exponent = jnp.maximum(largest >> 23, 30)
    scale = lax.bitcast_convert_type((exponent - 14) << 23, jnp.float32)
    # of a group with a NaN or an infinity the result is NaN
    scale = jnp.where(exponent == 255, jnp.nan, scale)
    inverse = lax.bitcast_convert_type((254 - (exponent - 14)) << 23, jnp.float32)
    integers = jnp.clip(jnp.round(grouped * inverse), -32767, 32767).astype(jnp.int32)
    sums = jnp.sum(integers, axis=-1).astype(jnp.float32) * scale[..., 0]
    return integers.astype(jnp.int16).reshape(x.shape), scale[..., 0], sums


def packed_matmul_cpu(x: jax.Array, weight: Any, layer: jax.Array, *, version: str) -> jax.Array:
    """`packed_matmul_reference` of a layer of a stack [L, N, K], which is read where it lies. A row of the result has
    the same bits whatever other rows there are.
    """
    form, n = kernel_of(weight), weight.shape[-2]
    arrays = [weight.values] if isinstance(weight, ScaledWeight) else jax.tree.leaves(weight)
    inputs = in_16_bits(x) if rounds(x.dtype) else (x,)
    name = f"{'rounded' if rounds(x.dtype) else 'exact'}_{form}"
    call = jax.ffi.ffi_call(target_name(name, version), jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32))
    y = call(*inputs, layer, *arrays)
    if isinstance(weight, ScaledWeight):
        scales = lax.dynamic_index_in_dim(weight.scales, layer, keepdims=False)
        y = y * scales[:, 0].astype(jnp.float32)
    return y
