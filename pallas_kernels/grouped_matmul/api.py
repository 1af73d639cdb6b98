"""Grouped matrix product (mixture of experts): which implementation, and every configuration of the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import Backend
from pallas_kernels.case import KernelCase
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.grouped_matmul.tiles import tiles_for
from pallas_kernels.grouped_matmul.xla import grouped_matmul_xla
from pallas_kernels.quantized import Quantized

DTYPES = ("bfloat16", "float16", "float32")
#: (model, experts per token, layers, experts, ((projection, out, in), ...))
MODELS = (
    ("Mixtral-8x7B", 2, 32, 8, (("gate_up", 28672, 4096), ("down", 4096, 14336))),
    ("Qwen3-30B-A3B", 8, 48, 128, (("gate_up", 1536, 2048), ("down", 2048, 768))),
)
#: every entry of `tuned.json` is chosen by one of them
TOKENS = (1, 16, 64, 128, 256, 512, 2048)


def grouped_matmul(
    x: jax.Array, w: jax.Array | Quantized, group_sizes: jax.Array, *, backend: Backend, layer: jax.Array | None = None
) -> jax.Array:
    """Every row by the weight of its own group: ``out[m] = w[g(m)] @ x[m]``.

    x: [M, K], rows sorted by group, bf16, f16 or f32. w: [E, N, K] of the same type, [out, in] as `linear` has them;
    with ``layer``, an i32 scalar, a stack [L, E, N, K] of which that layer is meant. (A scan over layers that slices
    the weights itself makes XLA copy every layer's experts before a kernel, on every step.)
    group_sizes: i32 [E], not negative, their sum at most M.
    A w that is quantized is multiplied by XLA, one group's matrix at a time.
    Returns [M, N] in x's dtype, accumulated in float32; rows beyond the sum are zeros.
    "reference" and "xla" are differentiable in x and w.
    Raises ValueError where shapes or dtypes do not fit together.
    """
    if not isinstance(w, jax.Array):
        return grouped_matmul_xla(x, w, group_sizes, layer=layer)
    _check(x, w, group_sizes, layer)
    if backend.implementation in ("triton", "mosaic"):
        # not above: where no kernel is used, nothing of Pallas is loaded
        from pallas_kernels.grouped_matmul.triton import grouped_matmul_triton

        *_, groups, n, k = w.shape
        tiles = tiles_for(
            rows=x.shape[0], groups=groups, n=n, k=k, itemsize=x.dtype.itemsize, device_kind=backend.device_kind
        )
        return grouped_matmul_triton(x, w, group_sizes, layer=layer, tiles=tiles, interpret=backend.interpret)
    if backend.implementation == "xla":
        return grouped_matmul_xla(x, w, group_sizes, layer=layer)
    if layer is not None:
        return grouped_matmul_reference(x, lax.dynamic_index_in_dim(w, layer, keepdims=False), group_sizes)
    return grouped_matmul_reference(x, w, group_sizes)


def configurations(device_kind: str = "") -> list[KernelCase]:
    """The kernel at the shapes of `MODELS`, for each number of tokens in `TOKENS`."""
    backend = Backend(implementation="triton", device_kind=device_kind)

    def product(x: jax.Array, w: jax.Array, group_sizes: jax.Array, layer: jax.Array) -> jax.Array:
        return grouped_matmul(x, w, group_sizes, backend=backend, layer=layer)

    return [
        KernelCase(
            operation="grouped_matmul",
            label=f"{model} {projection}, {tokens} tokens",
            function=product,
            arguments=(
                jax.ShapeDtypeStruct((tokens * active, k), jnp.bfloat16),
                jax.ShapeDtypeStruct((layers, experts, n, k), jnp.bfloat16),
                jax.ShapeDtypeStruct((experts,), jnp.int32),
                jax.ShapeDtypeStruct((), jnp.int32),
            ),
            max_temporary_bytes=0,
        )
        for model, active, layers, experts, projections in MODELS
        for projection, n, k in projections
        for tokens in TOKENS
    ]


def _check(x: jax.Array, w: jax.Array, group_sizes: jax.Array, layer: jax.Array | None) -> None:
    stack = "" if layer is None else "L, "
    if x.ndim != 2 or w.ndim != 3 + (layer is not None) or w.shape[-1] != x.shape[1]:
        raise ValueError(f"w must be [{stack}E, N, K] beside x [M, K], got w {w.shape} and x {x.shape}")
    if group_sizes.shape != w.shape[-3:-2] or group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes must be int32 [{w.shape[-3]}], got {group_sizes.dtype} {group_sizes.shape}")
    if x.dtype != w.dtype or x.dtype.name not in DTYPES:
        raise ValueError(f"x and w must have one dtype of {DTYPES}, got {x.dtype} and {w.dtype}")
    if layer is not None and (layer.shape or layer.dtype != jnp.int32):
        raise ValueError(f"layer must be an int32 scalar, got {layer.dtype} {layer.shape}")
