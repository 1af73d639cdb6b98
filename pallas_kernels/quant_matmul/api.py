"""Product with a four-bit weight (AWQ, GPTQ): which implementation, and every configuration of the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend
from pallas_kernels.case import KernelCase
from pallas_kernels.quant_matmul.layout import Int4Weight, int4_weight
from pallas_kernels.quant_matmul.reference import quant_matmul_reference
from pallas_kernels.quant_matmul.tiles import GROUP_SIZES, most_rows, tiles_for
from pallas_kernels.quant_matmul.xla import quant_matmul_xla
from pallas_kernels.quantized import Quantized

DTYPES = ("bfloat16", "float16", "float32")
#: (model, layers, ((projection, out, in), ...))
MODELS = (
    (
        "Llama-3.1-8B",
        32,
        (("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)),
    ),
    (
        "Qwen2.5-7B",
        28,
        (("qkv", 4608, 3584), ("o", 3584, 3584), ("gate_up", 37888, 3584), ("down", 3584, 18944)),
    ),
)
#: every entry of `tuned.json` is chosen by one of them
TOKENS = (1, 16, 32, 64, 256, 2048)


def quant_matmul(
    x: jax.Array,
    weight: Int4Weight,
    *,
    backend: Backend,
    layer: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """``x @ dequantize(weight).T``.

    x: [M, K], bf16, f16 or f32. weight: [N, K]; with ``layer``, an i32 scalar, a stack [L, N, K] of which that layer
    is meant (a scan over layers that slices the weights itself makes XLA copy them before a kernel).
    Returns [M, N] in ``out_dtype`` (None: x's), accumulated in float32.
    "triton" takes the kernel up to the number of rows where it is the faster way, and "xla" beyond, or where the
    kernel cannot take the group size or x is f32. All but the kernel are differentiable in x and the scales.
    Raises ValueError where shapes or dtypes do not fit together.
    """
    _check(x, weight, layer)
    out_dtype = out_dtype or x.dtype
    if implementation_for(backend, weight, rows=x.shape[0], dtype=x.dtype) == "triton":
        groups, n = weight.scales.shape[-2:]
        tiles = tiles_for(rows=x.shape[0], n=n, groups=groups, device_kind=backend.device_kind)
        # not above: where no kernel is used, nothing of Pallas or Triton is loaded
        if backend.lowering == "jax-triton":
            from pallas_kernels.quant_matmul.jax_triton import quant_matmul_jax_triton

            return quant_matmul_jax_triton(x, weight, layer=layer, tiles=tiles, backend=backend).astype(out_dtype)
        from pallas_kernels.quant_matmul.triton import quant_matmul_triton

        return quant_matmul_triton(
            x, weight, layer=layer, tiles=tiles, out_dtype=out_dtype, interpret=backend.interpret
        )
    if layer is not None:
        weight = weight.at(layer)
    if backend.implementation == "reference":
        return quant_matmul_reference(x, weight).astype(out_dtype)
    return quant_matmul_xla(x, weight).astype(out_dtype)


def implementation_for(backend: Backend, weight: Quantized, *, rows: int, dtype: jnp.dtype) -> str:
    """What is taken for x of so many rows and such a type: "reference", "xla" or, where it has a kernel, "triton"."""
    if backend.implementation in ("reference", "xla"):
        return backend.implementation
    # float32 has no tensor cores (TF32 is not float32), so there is nothing to gain
    takes = isinstance(weight, Int4Weight) and weight.group_size in GROUP_SIZES and dtype != jnp.float32
    return "triton" if takes and rows <= most_rows(backend.device_kind) else "xla"


def configurations(device_kind: str = "") -> list[KernelCase]:
    """The kernel at the shapes of `MODELS`, for each number of tokens in `TOKENS` with which it is chosen, in groups
    of 128, and in those of 64 and 32 at one shape.

    No case may need the memory of an unpacked weight: all temporaries are the float32 parts of a split K.
    """
    backend = Backend(implementation="triton", device_kind=device_kind)
    shapes = [(*model, 128) for model in MODELS]
    shapes += [("Llama-3.1-8B", 32, (("qkv", 6144, 4096),), group_size) for group_size in (64, 32)]

    def product(x: jax.Array, weight: Int4Weight, layer: jax.Array) -> jax.Array:
        return quant_matmul(x, weight, backend=backend, layer=layer)

    def case(model: str, layers: int, projection: str, n: int, k: int, group_size: int, tokens: int) -> KernelCase:
        groups = k // group_size
        per_group = lambda dtype: jax.ShapeDtypeStruct((layers, groups, n), dtype)  # noqa: E731
        weight = jax.eval_shape(
            int4_weight,
            jax.ShapeDtypeStruct((layers, n, k // 2), jnp.uint8),
            per_group(jnp.bfloat16),
            per_group(jnp.uint8),
        )
        split = tiles_for(rows=tokens, n=n, groups=groups, device_kind=device_kind).split_k
        return KernelCase(
            operation="quant_matmul",
            label=f"{model} {projection}, groups of {group_size}, {tokens} tokens",
            function=product,
            arguments=(
                jax.ShapeDtypeStruct((tokens, k), jnp.bfloat16),
                weight,
                jax.ShapeDtypeStruct((), jnp.int32),
            ),
            max_temporary_bytes=split * tokens * n * 4 if split > 1 else 0,
        )

    return [
        case(model, layers, projection, n, k, group_size, tokens)
        for model, layers, projections, group_size in shapes
        for projection, n, k in projections
        for tokens in TOKENS
        if tokens <= most_rows(device_kind)
    ]


def _check(x: jax.Array, weight: Int4Weight, layer: jax.Array | None) -> None:
    stack = "" if layer is None else "L, "
    if x.ndim != 2 or len(weight.shape) != 2 + (layer is not None) or weight.shape[-1] != x.shape[1]:
        raise ValueError(f"the weight must be [{stack}N, K] beside x [M, K], got {weight.shape} and {x.shape}")
    if x.dtype.name not in DTYPES:
        raise ValueError(f"x must be one of {DTYPES}, got {x.dtype}")
    if layer is not None and (layer.shape or layer.dtype != jnp.int32):
        raise ValueError(f"layer must be an int32 scalar, got {layer.dtype} {layer.shape}")
