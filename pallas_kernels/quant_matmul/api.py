"""Product with a quantized weight: which implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend
from pallas_kernels.quant_matmul.configurations import configurations
from pallas_kernels.quant_matmul.cpu_ffi import kernel_for, quant_matmul_cpu
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quant_matmul.reference import quant_matmul_reference
from pallas_kernels.quant_matmul.tiles import most_rows, tiles_for
from pallas_kernels.quant_matmul.walk import walk_of
from pallas_kernels.quant_matmul.xla import quant_matmul_xla
from pallas_kernels.quantized import Quantized, RoundedInputs, index

__all__ = ["configurations", "implementation_for", "quant_matmul"]

DTYPES = ("bfloat16", "float16", "float32")


def quant_matmul(
    x: jax.Array,
    weight: Quantized,
    *,
    backend: Backend,
    layer: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """``x @ weight.dequantize().T``, of x as `RoundedInputs` round it.

    x: [M, K], bf16, f16 or f32. weight: [N, K]; with ``layer``, an i32 scalar, a stack [L, N, K] of which that layer
    is meant (a scan over layers that slices the weights itself makes XLA copy them before a kernel).
    Returns [M, N] in ``out_dtype`` (None: x's), accumulated in float32.
    "triton" takes the kernel where `implementation_for` says so, and "xla" elsewhere; "xla" has one for CPUs. All but
    the kernels are differentiable in x and the scales.
    Raises ValueError where shapes or dtypes do not fit together.
    """
    _check(x, weight, layer)
    out_dtype = out_dtype or x.dtype
    if implementation_for(backend, weight, rows=x.shape[0], dtype=x.dtype) == "triton":
        return _by_kernel(x, weight, backend=backend, layer=layer, out_dtype=out_dtype)
    has_kernel = backend.implementation == "xla" and kernel_for(backend.cpu_int8, weight) is not None
    if has_kernel and isinstance(weight, RoundedInputs):
        return quant_matmul_cpu(backend.cpu_int8, x, weight, layer).astype(out_dtype)
    if layer is not None:
        weight = index(weight, layer)
    if backend.implementation == "reference":
        return quant_matmul_reference(x, weight).astype(out_dtype)
    return quant_matmul_xla(x, weight).astype(out_dtype)


def _by_kernel(
    x: jax.Array, weight: Quantized, *, backend: Backend, layer: jax.Array | None, out_dtype: jnp.dtype
) -> jax.Array:
    # not above: where no kernel is used, nothing of Pallas or Triton is loaded
    from pallas_kernels.quant_matmul.triton import quant_matmul_triton

    walk = walk_of(weight, x.dtype, backend)
    assert walk is not None
    tiles = tiles_for(rows=x.shape[0], n=weight.shape[-2], steps=walk.steps, device_kind=backend.device_kind)
    if backend.lowering == "jax-triton" and isinstance(weight, Int4Weight):
        from pallas_kernels.quant_matmul.jax_triton import quant_matmul_jax_triton

        return quant_matmul_jax_triton(x, weight, layer=layer, tiles=tiles, backend=backend).astype(out_dtype)
    x_scales, own = None, weight
    if isinstance(weight, RoundedInputs):
        x, x_scales = weight.codes(x, layer=layer, dtype=None if walk.native else x.dtype)
        own = weight.weight
    return quant_matmul_triton(
        x,
        own,  # pyright: ignore[reportArgumentType]
        walk=walk,
        x_scales=x_scales,
        layer=layer,
        tiles=tiles,
        out_dtype=out_dtype,
        interpret=backend.interpret,
    )


def implementation_for(backend: Backend, weight: Quantized, *, rows: int, dtype: jnp.dtype) -> str:
    """What is taken for x of so many rows and such a type: "reference", "xla" or, where it has a kernel, "triton", or
    "cpu_ffi" on a CPU.

    The kernel is the faster way up to some rows; where both sides are multiplied in eight bits, at any number.
    """
    if backend.implementation == "xla" and kernel_for(backend.cpu_int8, weight) is not None:
        return "cpu_ffi"
    if backend.implementation in ("reference", "xla"):
        return backend.implementation
    walk = walk_of(weight, dtype, backend)
    return "triton" if walk is not None and (walk.native or rows <= most_rows(backend.device_kind)) else "xla"


def _check(x: jax.Array, weight: Quantized, layer: jax.Array | None) -> None:
    stack = "" if layer is None else "L, "
    if x.ndim != 2 or len(weight.shape) != 2 + (layer is not None) or weight.shape[-1] != x.shape[1]:
        raise ValueError(f"the weight must be [{stack}N, K] beside x [M, K], got {weight.shape} and {x.shape}")
    if x.dtype.name not in DTYPES:
        raise ValueError(f"x must be one of {DTYPES}, got {x.dtype}")
    if layer is not None and (layer.shape or layer.dtype != jnp.int32):
        raise ValueError(f"layer must be an int32 scalar, got {layer.dtype} {layer.shape}")
