"""Matrix products. Models call `linear` and never see how a weight is stored."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.activation import ONE_PASS, gated
from jaxllm.layers.adapted import Adapted, adapter_term
from jaxllm.layers.context import Context, exchanged
from jaxllm.layers.observed import Observed
from jaxllm.layers.stacked_matrix import OneOfStacks, StackedMatrix, one_row_product
from pallas_kernels.dense_matmul.api import dense_matmul, gated_matmul
from pallas_kernels.dense_matmul.api import has_kernel as has_dense_kernel
from pallas_kernels.gguf_blocks import BlockWeight
from pallas_kernels.packed_matmul.api import has_kernel, packed_matmul
from pallas_kernels.quant_matmul.api import implementation_for, quant_matmul
from pallas_kernels.quant_matmul.layout import Int4Weight, halves
from pallas_kernels.quantized import Joined, Quantized, Reordered, RoundedInputs, ScaledWeight

#: numbers of a GGUF file's blocks that are widened at once, in whole rows
PIECE = 2**22
#: what a matrix can be stored as
Matrix = jax.Array | StackedMatrix | OneOfStacks | Quantized | Observed | Adapted


def linear(
    context: Context,
    x: jax.Array,
    weight: Matrix,
    bias: jax.Array | None = None,
    *,
    over: str | None = None,
) -> jax.Array:
    """``x [..., in] @ weight [out, in].T (+ bias [out])``, accumulated in float32, in x's dtype.

    Weights keep the checkpoint's orientation. A `StackedMatrix` stands for a weight that is read where it lies.

    Args:
        over: logical axis of the in-features that may be split over devices: each has a part of x and weight, and all
            get the sum.
    """
    y = _rounded(context, x, weight, x.dtype if bias is None else jnp.dtype(jnp.float32))
    axis = None if over is None else context.mesh_axis(over)
    if over is not None and axis is not None:
        with exchanged(over):
            y = lax.psum(y.astype(x.dtype), axis)
    if bias is not None:
        y = y.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def gated_linear(context: Context, x: jax.Array, weight: Matrix, bias: jax.Array | None, activation: str) -> jax.Array:
    """`activation.gated` of `linear`, [..., in] -> [..., out // 2] in x's dtype: in one pass, which rounds once, where
    the weight has a kernel for it.
    """
    if isinstance(weight, OneOfStacks):
        return lax.switch(
            weight.which, [lambda w=w: gated_linear(context, x, w, bias, activation) for w in weight.stacks]
        )
    (stored, layer), kind = _stored(weight), ONE_PASS.get(activation, "")
    if bias is None and kind and isinstance(stored, jax.Array) and _is_dense(context, x, stored, kind):
        return gated_matmul(x, stored, activation=kind, backend=context.backend, layer=layer, dtype=x.dtype)
    return gated(activation, linear(context, x, weight, bias))


def _rounded(context: Context, x: jax.Array, weight: Matrix, dtype: jnp.dtype) -> jax.Array:
    """`linear_f32` in a dtype: a dense product's kernel writes it."""
    if isinstance(weight, OneOfStacks):
        return lax.switch(weight.which, [lambda w=w: _rounded(context, x, w, dtype) for w in weight.stacks])
    stored, layer = _stored(weight)
    if isinstance(stored, jax.Array) and _is_dense(context, x, stored):
        return dense_matmul(x, stored, backend=context.backend, layer=layer, dtype=dtype)
    return linear_f32(context, x, weight).astype(dtype)


def _stored(weight: Matrix) -> tuple[Any, jax.Array | None]:
    """A matrix, or the stack that it lies in, and its place there."""
    return (weight.stored, weight.layer) if isinstance(weight, StackedMatrix) else (weight, None)


def linear_f32(context: Context, x: jax.Array, weight: Matrix) -> jax.Array:
    """`linear` without bias, its float32 accumulator returned as it is (logits).

    Where the context is deterministic, on a CPU, a row of the result is the same, to the bit, however many rows
    x [rows, in] has. `dense_matmul` adds up any row alike. XLA multiplies two rows and more by kernels that add up each
    number of the result from the first product to the last, a single row by another one, which keeps several sums, and
    with Intel's AMX three rows of bfloat16 by its own kernel, which rounds otherwise. Fewer rows get companions.
    """
    if isinstance(weight, Adapted):
        return linear_f32(context, x, weight.base) + adapter_term(context.backend, x, weight)
    if isinstance(weight, OneOfStacks):
        return lax.switch(weight.which, [lambda w=w: linear_f32(context, x, w) for w in weight.stacks])
    if isinstance(weight, StackedMatrix):
        if isinstance(weight.stored, jax.Array) and _is_dense(context, x, weight.stored):
            return dense_matmul(x, weight.stored, backend=context.backend, layer=weight.layer)
        if has_kernel(context.backend, weight.stored, rows=x.shape[0]):
            return packed_matmul(x, weight.stored, backend=context.backend, layer=weight.layer)
        if isinstance(weight.stored, RoundedInputs) and _has_quant_kernel(context, x, weight.stored):
            return _by_quant_kernel(context, x, weight.stored, weight.layer)
        if x.shape[0] == 1 and not context.deterministic and weight.has_one_row_product:
            return one_row_product(x, weight)
        weight = weight.whole()
    if isinstance(weight, Observed):
        weight.see(x)
        weight = weight.weight
    if not isinstance(weight, jax.Array):
        return _of_quantized(context, x, weight)
    if _is_dense(context, x, weight):
        return dense_matmul(x, weight, backend=context.backend)
    rows, least = x.shape[0], 4 if x.dtype == jnp.bfloat16 else 2
    if context.deterministic and rows < least:
        return linear_f32(context, _padded(x, least), weight)[:rows]
    if x.ndim == 2 and x.dtype == jnp.bfloat16:
        return lax.platform_dependent(x, weight, cpu=_on_cpu, default=_product)
    return _product(x, weight)


def _is_dense(context: Context, x: jax.Array, weight: jax.Array, activation: str = "") -> bool:
    """Whether `dense_matmul`, or `gated_matmul` by its name of an activation, has a kernel for it."""
    fits = x.ndim == 2 and x.dtype == weight.dtype
    return fits and has_dense_kernel(context.backend, weight, activation=activation)


def _of_quantized(context: Context, x: jax.Array, weight: Quantized) -> jax.Array:
    """`linear_f32` of a weight that is no array (`pallas_kernels.quantized`)."""
    if _has_quant_kernel(context, x, weight):
        return _by_quant_kernel(context, x, weight)
    if isinstance(weight, Joined):
        return jnp.concatenate([linear_f32(context, x, part) for part in weight.parts], axis=-1)
    if isinstance(weight, Reordered):
        return linear_f32(context, x[..., weight.order], weight.weight)
    if isinstance(weight, RoundedInputs):
        # integers and float8 numbers are exact in every dtype
        rounded, scales = weight.rounded(x)
        if scales.shape[-2] > 1:
            return linear_f32(context, (rounded * scales).reshape(x.shape).astype(x.dtype), weight.weight)
        return linear_f32(context, rounded.reshape(x.shape).astype(x.dtype), weight.weight) * scales[..., 0]
    if x.ndim == 2 and has_kernel(context.backend, weight, rows=x.shape[0]):
        return packed_matmul(x, weight, backend=context.backend)
    if isinstance(weight, ScaledWeight) and weight.one_scale_a_row:
        return linear_f32(context, x, weight.values.astype(x.dtype)) * weight.scales[:, 0].astype(jnp.float32)
    if isinstance(weight, Int4Weight) and not context.deterministic:
        return _of_halves(context, x, weight)
    if isinstance(weight, BlockWeight) and math.prod(weight.shape) > PIECE:
        return _of_pieces(context, x, weight)
    return linear_f32(context, x, weight.dequantize(x.dtype))


def _has_quant_kernel(context: Context, x: jax.Array, weight: Quantized) -> bool:
    """Whether `quant_matmul` has a kernel for it, on a GPU, or on a CPU of inputs that are rounded to int8."""
    kernels = "triton", "cpu_ffi"
    return x.ndim == 2 and implementation_for(context.backend, weight, rows=len(x), dtype=x.dtype) in kernels


def _by_quant_kernel(context: Context, x: jax.Array, weight: Quantized, layer: jax.Array | None = None) -> jax.Array:
    return quant_matmul(x, weight, backend=context.backend, layer=layer, out_dtype=jnp.dtype(jnp.float32))


def _of_pieces(context: Context, x: jax.Array, weight: BlockWeight) -> jax.Array:
    """A part of the rows after the other: no large matrix of a GGUF file is ever widened as a whole."""
    size, columns = weight.shape
    rows = max(PIECE // columns, 1)

    def piece(first: jax.Array | int, count: int) -> jax.Array:
        part = dataclasses.replace(weight, data=lax.dynamic_slice_in_dim(weight.data, first, count))
        return linear_f32(context, x, part.dequantize(x.dtype))

    def one(i: jax.Array, y: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(y, piece(i * rows, rows), i * rows, axis=-1)

    whole, rest = divmod(size, rows)
    y = lax.fori_loop(0, whole, one, jnp.zeros((*x.shape[:-1], size), jnp.float32))
    if rest:
        y = lax.dynamic_update_slice_in_dim(y, piece(whole * rows, rest), whole * rows, axis=-1)
    return y


def _of_halves(context: Context, x: jax.Array, weight: Int4Weight) -> jax.Array:
    """As two products, so that the bytes of a weight become numbers where they lie."""
    parts = x.reshape(x.shape[0], -1, 2, weight.group_size // 2)
    both = zip((parts[:, :, 0], parts[:, :, 1]), halves(weight, x.dtype), strict=True)
    low, high = (linear_f32(context, part.reshape(x.shape[0], -1), matrix) for part, matrix in both)
    return low + high


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=matmul_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )


def _on_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """XLA:CPU multiplies bfloat16 natively only with a float32 result, and a single row 17 times slower than two
    (measured on a head of 49152 x 576), so a single row gets a companion of zeros.

    It packs the second operand anew in every product: of some rows, x is the smaller one to pack (measured: all layers
    of SmolLM2 17% less time at 32 rows, 19% at 64; at 8 and at 128 rows it depends on the shape). The barrier keeps XLA
    from writing the transposed product as the product in the other order.
    """
    rows, (out_features, in_features) = x.shape[0], weight.shape
    if rows == 1:
        return _product(_padded(x, 2), weight)[:1]
    if 16 <= rows <= 64 or (8 <= rows <= 128 and in_features > out_features):
        return lax.optimization_barrier(_product(weight, x)).T
    return _product(x, weight)


def _padded(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))


def matmul_precision(dtype: jnp.dtype) -> lax.Precision | None:
    """float32 means float32: no TF32 on GPUs when a model runs in float32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None
