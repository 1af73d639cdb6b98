"""What adapters of low rank add to a product: which implementation, and every configuration of the kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import Backend
from pallas_kernels.case import KernelCase
from pallas_kernels.lora_matmul.cpu_ffi import has_kernel, lora_matmul_cpu
from pallas_kernels.lora_matmul.reference import lora_matmul_reference
from pallas_kernels.lora_matmul.xla import lora_matmul_by_slot, lora_matmul_xla

DTYPES = ("bfloat16", "float16", "float32")
#: (model, layers, ((projection, in, parts), ...)) of the `configurations`
MODELS = (
    (
        "Llama-3.1-8B",
        32,
        (
            ("qkv", 4096, (4096, 1024, 1024)),
            ("o", 4096, (4096,)),
            ("gate_up", 4096, (14336, 14336)),
            ("down", 14336, (4096,)),
        ),
    ),
    ("SmolLM2-135M", 30, (("qkv", 576, (576, 192, 192)), ("down", 1536, (576,)))),
)
#: (slots, rank)
ADAPTERS = ((4, 16), (8, 64), (1, 256))
TOKENS = (1, 32, 2048)


def lora_matmul(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    slots: jax.Array,
    *,
    backend: Backend,
    parts: tuple[int, ...] | None = None,
    layer: jax.Array | None = None,
) -> jax.Array:
    """Every row by the adapter of its slot: ``out[t] = b[s].T @ (a[s] @ x[t])``, the term to add to a product.

    x: [T, in], bf16, f16 or f32. a: [S, P * r, in], b: [S, r, out], both of one such type, an adapter's scale within b,
    and ranks below r filled up with zeros; with ``layer``, an i32 scalar, stacks of them, of which that layer is meant.
    slots: i32 [T], s of each row; -1: none, the row is zeros.
    parts: out-features of each of the P matrices that lie joined in b; None: it is one. Part p is multiplied by rows
    ``p * r ...`` of a, so that queries, keys and values, which share x, are one call, and none has zeros stored for
    the ranks of the others.
    Returns f32 [T, out], sums in float32; beside the reference, what lies between the products is rounded to the wider
    type of x and a.
    Numbers of b must be finite in every slot; a row of x, or an a, that is not reaches no other slot's rows. Where the
    backend is deterministic, a row's bits depend neither on other rows nor on the slot. All but the kernels are
    differentiable in x, a and b.
    Raises ValueError where shapes or dtypes do not fit together.
    """
    parts = (b.shape[-1],) if parts is None else parts
    _check(x, a, b, slots, parts, layer)
    if backend.implementation in ("triton", "mosaic"):
        # not above: where no kernel is used, nothing of Pallas is loaded
        from pallas_kernels.lora_matmul.tiles import tiles_for
        from pallas_kernels.lora_matmul.triton import lora_matmul_triton

        (rows, columns), (num_slots, rank, _) = x.shape, b.shape[-3:]
        tiles = tiles_for(rows=rows, columns=columns, features=max(parts), rank=rank, num_slots=num_slots)
        return lora_matmul_triton(x, a, b, slots, parts, layer=layer, tiles=tiles, interpret=backend.interpret)
    if has_kernel(backend.cpu_adapters, a, parts):
        place = jnp.int32(0) if layer is None else layer
        a, b = (array if layer is not None else lax.expand_dims(array, [0]) for array in (a, b))
        return lora_matmul_cpu(backend.cpu_adapters, x, a, b, slots, parts, place)
    if layer is not None:
        a, b = (lax.dynamic_index_in_dim(stack, layer, keepdims=False) for stack in (a, b))
    if backend.implementation == "reference":
        return lora_matmul_reference(x, a, b, slots, parts)
    return (lora_matmul_by_slot if backend.deterministic else lora_matmul_xla)(x, a, b, slots, parts)


def configurations(device_kind: str = "", compute_capability: tuple[int, int] | None = None) -> list[KernelCase]:
    """The kernels at the shapes of `MODELS`, with `ADAPTERS`, for each number of tokens in `TOKENS`.

    No case may need the memory of a token's matrices: all temporaries are the numbers between the two products.
    """
    from pallas_kernels.lora_matmul.tiles import tiles_for

    backend = Backend(implementation="triton", device_kind=device_kind, compute_capability=compute_capability)

    def case(
        model: str,
        layers: int,
        projection: tuple[str, int, tuple[int, ...]],
        adapters: tuple[int, int],
        tokens: int,
    ) -> KernelCase:
        (name, columns, parts), (num_slots, rank), array = projection, adapters, jax.ShapeDtypeStruct

        def product(x: jax.Array, a: jax.Array, b: jax.Array, slots: jax.Array, layer: jax.Array) -> jax.Array:
            return lora_matmul(x, a, b, slots, backend=backend, parts=parts, layer=layer)

        ranks = len(parts) * rank
        tiles = tiles_for(rows=tokens, columns=columns, features=max(parts), rank=rank, num_slots=num_slots)
        return KernelCase(
            operation="lora_matmul",
            label=f"{model} {name}, {num_slots} slots of rank {rank}, {tokens} tokens",
            function=product,
            arguments=(
                array((tokens, columns), jnp.bfloat16),
                array((layers, num_slots, ranks, columns), jnp.bfloat16),
                array((layers, num_slots, rank, sum(parts)), jnp.bfloat16),
                array((tokens,), jnp.int32),
                array((), jnp.int32),
            ),
            max_temporary_bytes=tiles.split_k * tokens * ranks * 4 + 256,
        )

    return [
        case(model, layers, projection, adapters, tokens)
        for model, layers, projections in MODELS
        for projection in projections
        for adapters in (ADAPTERS if model == MODELS[0][0] and projection[0] == "qkv" else ADAPTERS[:1])
        for tokens in TOKENS
    ]


def _check(
    x: jax.Array, a: jax.Array, b: jax.Array, slots: jax.Array, parts: tuple[int, ...], layer: jax.Array | None
) -> None:
    stack, dims = ("", 3) if layer is None else ("L, ", 4)
    shaped = x.ndim == 2 and a.ndim == b.ndim == dims and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == x.shape[1]
    if not shaped or a.shape[-2] != len(parts) * b.shape[-2]:
        raise ValueError(
            f"a must be [{stack}S, {len(parts)} * r, in] and b [{stack}S, r, out] beside x [T, in], got a {a.shape}, "
            f"b {b.shape} and x {x.shape}"
        )
    if sum(parts) != b.shape[-1] or min(parts) < 1:
        raise ValueError(f"parts must be positive and add up to the {b.shape[-1]} out-features of b, got {parts}")
    if slots.shape != x.shape[:1] or slots.dtype != jnp.int32:
        raise ValueError(f"slots must be int32 [{x.shape[0]}], got {slots.dtype} {slots.shape}")
    if x.dtype.name not in DTYPES or a.dtype.name not in DTYPES or a.dtype != b.dtype:
        raise ValueError(f"x, and a and b alike, must be one of {DTYPES}, got {x.dtype}, {a.dtype} and {b.dtype}")
    if layer is not None and (layer.shape or layer.dtype != jnp.int32):
        raise ValueError(f"layer must be an int32 scalar, got {layer.dtype} {layer.shape}")
