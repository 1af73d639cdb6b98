"""Grouped matrix product (mixture of experts): which implementation, and every configuration of the kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import Backend
from pallas_kernels.case import KernelCase
from pallas_kernels.grouped_matmul.cpu_ffi import grouped_matmul_cpu, has_grouped_kernel
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.grouped_matmul.tiles import tiles_for
from pallas_kernels.grouped_matmul.xla import grouped_matmul_xla
from pallas_kernels.quant_matmul.configurations import FORMS
from pallas_kernels.quant_matmul.tiles import tiles_for as quantized_tiles_for
from pallas_kernels.quant_matmul.walk import walk_of
from pallas_kernels.quantized import Quantized, Reordered, RoundedInputs, index

DTYPES = ("bfloat16", "float16", "float32")
#: (model, experts per token, layers, experts, ((projection, out, in), ...))
MODELS = (
    ("Mixtral-8x7B", 2, 32, 8, (("gate_up", 28672, 4096), ("down", 4096, 14336))),
    ("Qwen3-30B-A3B", 8, 48, 128, (("gate_up", 1536, 2048), ("down", 2048, 768))),
)
#: every entry of `tuned.json` is chosen by one of them
TOKENS = (1, 16, 64, 128, 256, 512, 2048)
#: the same of quantized weights, whose tiles are those of `quant_matmul`; forms that both projections are compiled with
QUANTIZED_TOKENS = (1, 2048)
MOST_FORMS = ("int4 in groups of 128", "fp8 in blocks of 128 by fp8", "mxfp4")


def grouped_matmul(
    x: jax.Array,
    w: jax.Array | Quantized,
    group_sizes: jax.Array,
    *,
    backend: Backend,
    layer: jax.Array | None = None,
    mean_rows: int | None = None,
) -> jax.Array:
    """Every row by the weight of its own group: ``out[m] = w[g(m)] @ x[m]``.

    x: [M, K], rows sorted by group, bf16, f16 or f32. w: [E, N, K] of the same type, [out, in] as `linear` has them;
    with ``layer``, an i32 scalar, a stack [L, E, N, K] of which that layer is meant. (A scan over layers that slices
    the weights itself makes XLA copy every layer's experts before a kernel, on every step.)
    group_sizes: i32 [E], not negative, their sum at most M.
    mean_rows: of a group, as far as is known beforehand, by which CPUs choose their way; None: M / E.
    A w that is quantized is read by the kernel as it is stored, where that knows the way (`quant_matmul.walk`, on CPUs
    `packed_matmul.formats`); XLA makes one group's matrix at a time. x is rounded as `RoundedInputs` say.
    Returns [M, N] in x's dtype, accumulated in float32; rows beyond the sum are zeros.
    "reference" and "xla", without kernels for CPUs, are differentiable in x and w.
    Raises ValueError where shapes or dtypes do not fit together.
    """
    _check(x, w, group_sizes, layer)
    mean_rows = -(-len(x) // w.shape[-3]) if mean_rows is None else mean_rows
    if has_grouped_kernel(backend, w, mean_rows):
        return grouped_matmul_cpu(x, w, group_sizes, layer=layer, version=backend.cpu_grouped)
    if not isinstance(w, jax.Array):
        return _of_quantized(x, w, group_sizes, backend=backend, layer=layer, mean_rows=mean_rows)
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


def _of_quantized(
    x: jax.Array, w: Quantized, group_sizes: jax.Array, *, backend: Backend, layer: jax.Array | None, mean_rows: int
) -> jax.Array:
    own, x_scales, dtype = w, None, x.dtype
    kernels = backend.implementation in ("triton", "mosaic")
    walk = walk_of(w, dtype, backend) if kernels else None
    if walk is None:
        if isinstance(w, RoundedInputs):
            codes, scales = w.codes(x, layer=layer, dtype=jnp.dtype(jnp.float32))
            x, own = (codes * jnp.repeat(scales, x.shape[1] // scales.shape[1], axis=1)).astype(dtype), w.weight
        inner = own.weight if isinstance(own, Reordered) else own
        if isinstance(own, Reordered) and (kernels or has_grouped_kernel(backend, inner, mean_rows)):
            order = own.order if layer is None else index(own.order, layer)
            group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(x)), side="right")
            x, own = jnp.take_along_axis(x, order[jnp.minimum(group, len(order) - 1)], axis=1), own.weight
        if own is not w:
            return grouped_matmul(x, own, group_sizes, backend=backend, layer=layer, mean_rows=mean_rows)
        return grouped_matmul_xla(x, w, group_sizes, layer=layer)
    if isinstance(w, RoundedInputs):
        own = w.weight
        x, x_scales = w.codes(x, layer=layer, dtype=None if walk.native else dtype)
    # not above: where no kernel is used, nothing of Pallas is loaded
    from pallas_kernels.grouped_matmul.triton_quantized import grouped_matmul_triton_quantized

    *_, groups, n, _ = w.shape
    # those of a product with as many rows as a group has in the mean
    tiles = quantized_tiles_for(rows=-(-len(x) // groups), n=n, steps=walk.steps, device_kind=backend.device_kind)
    return grouped_matmul_triton_quantized(
        x,
        own,  # pyright: ignore[reportArgumentType]
        group_sizes,
        walk=walk,
        x_scales=x_scales,
        layer=layer,
        tiles=tiles,
        out_dtype=dtype,
        interpret=backend.interpret,
    )


def configurations(device_kind: str = "", compute_capability: tuple[int, int] | None = None) -> list[KernelCase]:
    """The kernels at the shapes of `MODELS`, for each number of tokens in `TOKENS`, and for some of them with quantized
    weights."""
    backend = Backend(implementation="triton", device_kind=device_kind, compute_capability=compute_capability)

    def product(x: jax.Array, w: Any, group_sizes: jax.Array, layer: jax.Array) -> jax.Array:
        return grouped_matmul(x, w, group_sizes, backend=backend, layer=layer)

    def case(label: str, tokens: int, active: int, experts: int, w: Any, most: int) -> KernelCase:
        return KernelCase(
            operation="grouped_matmul",
            label=f"{label}, {tokens} tokens",
            function=product,
            arguments=(
                jax.ShapeDtypeStruct((tokens * active, w.shape[-1]), jnp.bfloat16),
                w,
                jax.ShapeDtypeStruct((experts,), jnp.int32),
                jax.ShapeDtypeStruct((), jnp.int32),
            ),
            max_temporary_bytes=most,
        )

    cases = [
        case(f"{model} {projection}", tokens, active, experts, array, 0)
        for model, active, layers, experts, projections in MODELS
        for projection, n, k in projections
        for array in (jax.ShapeDtypeStruct((layers, experts, n, k), jnp.bfloat16),)
        for tokens in TOKENS
    ]
    model, active, layers, experts, projections = MODELS[-1]
    for name, form in FORMS.items():
        for projection, n, k in projections if name in MOST_FORMS else projections[:1]:
            for tokens in QUANTIZED_TOKENS:
                most = form.temporary_bytes(tokens * active, k)
                weight = form.shapes(n, k, layers, experts)
                cases.append(case(f"{model} {projection}, {name}", tokens, active, experts, weight, most))
    return cases


def _check(x: jax.Array, w: jax.Array | Quantized, group_sizes: jax.Array, layer: jax.Array | None) -> None:
    stack = "" if layer is None else "L, "
    if x.ndim != 2 or len(w.shape) != 3 + (layer is not None) or w.shape[-1] != x.shape[1]:
        raise ValueError(f"w must be [{stack}E, N, K] beside x [M, K], got w {w.shape} and x {x.shape}")
    if group_sizes.shape != w.shape[-3:-2] or group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes must be int32 [{w.shape[-3]}], got {group_sizes.dtype} {group_sizes.shape}")
    own = w.dtype if isinstance(w, jax.Array) else x.dtype
    if x.dtype != own or x.dtype.name not in DTYPES:
        raise ValueError(f"x and w must have one dtype of {DTYPES}, got {x.dtype} and {own}")
    if layer is not None and (layer.shape or layer.dtype != jnp.int32):
        raise ValueError(f"layer must be an int32 scalar, got {layer.dtype} {layer.shape}")
