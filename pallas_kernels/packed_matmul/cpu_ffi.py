"""The kernels for CPUs (`kernel`), and the calls of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cpu_ffi.compiled import Kernels, target_name
from pallas_kernels.gguf_blocks import BlockWeight
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quantized import ScaledWeight

#: what `formats` has; said here, too, since reading it takes llvmlite
GROUPS, SCALE_DTYPES = (32, 64, 128), ("bfloat16", "float16", "float32")
BLOCKS = ("Q4_0", "Q4_1", "Q8_0")
#: columns of int8 that the kernel takes at once
INT8_COLUMNS = 32


def _module(name: str) -> Any:
    from pallas_kernels.packed_matmul.kernel import module

    return module(name)


KERNELS = Kernels(_module, [Path(__file__).parent])


def load(weights: Iterable[Any], folder: Path | None) -> str:
    """Load the kernels of weights, or of their shapes (`Kernels.load`); "" where they have none."""
    names = {name for weight in weights if (name := kernel_of(weight)) is not None}
    return KERNELS.load(names, folder) if names else ""


def kernel_of(weight: Any) -> str | None:
    """The name of the kernel that multiplies by a weight, which may be a tree of shapes; None: there is none."""
    if isinstance(weight, ScaledWeight):
        fits = weight.one_scale_a_row and weight.values.dtype == jnp.int8 and weight.shape[-1] % INT8_COLUMNS == 0
        return "int8" if fits else None
    if isinstance(weight, Int4Weight):
        dtype = jnp.dtype(weight.scales.dtype).name
        fits = weight.group_size in GROUPS and dtype in SCALE_DTYPES
        return f"int4_{weight.group_size}_{dtype}" if fits else None
    if isinstance(weight, BlockWeight):
        return weight.kind if weight.kind in BLOCKS else None
    return None


def packed_matmul_cpu(x: jax.Array, weight: Any, layer: jax.Array, *, version: str) -> jax.Array:
    """`packed_matmul_reference` of a layer of a stack [L, N, K], which is read where it lies. A row of the result has
    the same bits whatever other rows there are.
    """
    name = kernel_of(weight)
    assert name is not None
    n = weight.shape[-2]
    arrays = [weight.values] if isinstance(weight, ScaledWeight) else jax.tree.leaves(weight)
    call = jax.ffi.ffi_call(target_name(name, version), jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32))
    y = call(x.astype(jnp.float32), layer, *arrays)
    if isinstance(weight, ScaledWeight):
        scales = lax.dynamic_index_in_dim(weight.scales, layer, keepdims=False)
        y = y * scales[:, 0].astype(jnp.float32)
    return y
