"""`triton.py`'s kernel in Triton's own language, compiled by Triton through jax-triton: the way out when JAX no longer
has Pallas' Triton lowering.

It needs jax-triton (the extra ``triton``), which needs JAX's CUDA plugin to be importable, but no GPU.
"""
# The names of the packages are those of modules beside this one.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels.backend import Backend
from pallas_kernels.gpu_only import gpu_only
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quant_matmul.tiles import Tiles
from pallas_kernels.quant_matmul.walk import GROUP_SIZES

#: of x -> (the bits of the number whose mantissa an integer ends, that number), as in `triton.py`
_MAGIC = {"bfloat16": (0x4300, 128), "float16": (0x6400, 1024)}


def quant_matmul_jax_triton(
    x: jax.Array, weight: Int4Weight, *, layer: jax.Array | None = None, tiles: Tiles, backend: Backend
) -> jax.Array:
    """`triton.quant_matmul_triton`, with the same arguments and results, for x in bfloat16 or float16.

    Args:
        backend: says the compute capability to compile for; where it does not, the GPU that is here.
    """
    if weight.group_size not in GROUP_SIZES:
        raise ValueError(f"the kernel takes groups of {GROUP_SIZES} elements, got {weight.group_size}")
    if x.dtype.name not in _MAGIC:
        raise ValueError(f"x must be one of {tuple(_MAGIC)}, got {x.dtype}")
    stacked = weight if layer is not None else jax.tree.map(lambda leaf: leaf[None], weight)
    (rows, k), (_, n, _), split = x.shape, stacked.shape, tiles.split_k
    bits, number = _MAGIC[x.dtype.name]
    capability = backend.compute_capability

    def call(*operands: jax.Array) -> jax.Array:
        return jax_triton.triton_call(
            *operands,
            kernel=_kernel,
            name=f"quant_matmul_{tiles.block_m}x{tiles.block_n}_split{split}_group{weight.group_size}",
            out_shape=jax.ShapeDtypeStruct((split, rows, n), x.dtype if split == 1 else jnp.float32),
            # rows of x first: programs that share a block of the weight run together
            grid=(triton.cdiv(rows, tiles.block_m), triton.cdiv(n, tiles.block_n), split),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            compute_capability=None if capability is None else capability[0] * 10 + capability[1],
            m=rows,
            n=n,
            k=k,
            group_size=weight.group_size,
            split_k=split,
            block_m=tiles.block_m,
            block_n=tiles.block_n,
            bits=bits,
            number=number,
        )

    out = gpu_only(call, name="quant_matmul", implementation="jax-triton")(
        x,
        stacked.packed,
        stacked.scales,
        stacked.zeros,
        jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1).astype(jnp.int32),
    )
    return out[0] if split == 1 else jnp.sum(out, axis=0).astype(x.dtype)


@triton.jit
def _kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    layer_ptr,
    out_ptr,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
    group_size: tl.constexpr,
    split_k: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    bits: tl.constexpr,
    number: tl.constexpr,
):
    """x: [M, K]. packed: uint8 [L, N, K / 2]. scales, zeros: [L, K / g, N]. layer: i32 [1]. out: [split_k, M, N]."""
    half: tl.constexpr = group_size // 2
    groups: tl.constexpr = k // group_size
    per_part: tl.constexpr = (groups + split_k - 1) // split_k
    dtype = x_ptr.dtype.element_ty
    layer = tl.load(layer_ptr).to(tl.int64)
    part = tl.program_id(2)
    rows = tl.program_id(0) * block_m + tl.arange(0, block_m)
    columns = tl.program_id(1) * block_n + tl.arange(0, block_n)
    numbers = tl.arange(0, half)
    row_mask, column_mask = rows < m, columns < n
    packed_rows = packed_ptr + (layer * n + columns[:, None]) * (k // 2) + numbers[None, :]
    x_columns = x_ptr + rows[None, :] * k + numbers[:, None]
    of_groups = layer * groups * n + columns
    first = part * per_part
    acc = tl.zeros((block_n, block_m), tl.float32)
    for group in range(first, tl.minimum(first + per_part, groups)):
        packed = tl.load(packed_rows + group * half, mask=column_mask[:, None], other=0).to(tl.uint16)
        scale = tl.load(scales_ptr + of_groups + group * n, mask=column_mask, other=0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + of_groups + group * n, mask=column_mask, other=0).to(tl.float32)
        shifted = (zero + number).to(dtype)[:, None]
        low = ((packed & 15) | bits).to(dtype, bitcast=True) - shifted
        high = ((packed >> 4) | bits).to(dtype, bitcast=True) - shifted
        x_low = tl.load(x_columns + group * group_size, mask=row_mask[None, :], other=0.0)
        x_high = tl.load(x_columns + group * group_size + half, mask=row_mask[None, :], other=0.0)
        acc += (tl.dot(low, x_low) + tl.dot(high, x_high)) * scale[:, None]
    out = out_ptr + (part * m + rows[:, None]) * n + columns[None, :]
    tl.store(out, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])
