"""How numbers lie in the page array.

The array is ``[layers_per_group * num_blocks, 2 * kv_heads, block_size, head_dim]`` for all layers: a page holds the
keys of each head, then the values of each head, so that the rows of one head are contiguous. A layer's pages are at
``layer * num_blocks + block id``. Page 0 is trash: padding tokens write there and it is never read.

No dimension may have the size 1. XLA may put such a dimension anywhere in an array's layout; within a loop over layers
it chose another place than at the program's boundary, and copied the whole cache in every layer from one layout to the
other, though both have the same bytes in the same order. So keys and values share a dimension with the heads.

Latents (multi-head latent attention) are one vector a token, whose first numbers are its value, too. Their pages are
``[pages, block_size, width]``, since there is nothing that a dimension of heads would count, and their scales, where
they are in 8 bits, ``[pages, block_size]``.

Where `Backend.transposes_keys`, the keys of a head are ``[head_dim, block_size]``, in the same place of the same array.

int8 and float8 pages have scales beside them, float32 ``[pages, 2 * kv_heads, block_size]``: what is stored times its
scale is the number. So each key, and each value, of a head has a scale of its own, which is found when it is written.

Where writing would convert the whole array, pages hold the bits of their numbers, as integers (`STORAGE`): bfloat16 and
float8 on CPUs, float8 on GPUs that have no casts of it. `Backend.numbers` says what bits of 8 are.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

#: dtype of numbers -> of their bits
STORAGE = {
    jnp.dtype(jnp.bfloat16): jnp.dtype(jnp.uint16),
    jnp.dtype(jnp.float8_e4m3fn): jnp.dtype(jnp.uint8),
    jnp.dtype(jnp.float8_e5m2): jnp.dtype(jnp.uint8),
}


def compute_dtype(stored: jnp.dtype) -> jnp.dtype:
    """What to compute in with numbers stored as `stored`, where bf16 is no faster than float32."""
    return jnp.dtype(jnp.float32) if stored == jnp.uint16 or stored.itemsize == 1 else stored


def to_storage(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16) if dtype == jnp.uint16 else x.astype(dtype)


def from_storage(x: jax.Array, compute: jnp.dtype, numbers: jnp.dtype | None = None) -> jax.Array:
    """Stored numbers in the dtype that they are computed with.

    Args:
        numbers: what bits of 8 are (`Backend.numbers`).
    """
    if x.dtype == jnp.uint8 and numbers is not None:
        return lax.bitcast_convert_type(x, numbers).astype(compute)
    if x.dtype == jnp.uint16 and compute == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.bfloat16)
    if x.dtype == jnp.uint16:  # bf16 is the upper half of a float32
        return lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
    return x.astype(compute)


def largest_stored(dtype: jnp.dtype) -> float:
    """The largest magnitude that a scaled page's dtype holds."""
    return float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


def quantize(x: jax.Array, dtype: jnp.dtype, numbers: jnp.dtype | None = None) -> tuple[jax.Array, jax.Array]:
    """x [..., head_dim] as (stored, scales [...]), one scale a row: its largest magnitude becomes the dtype's.

    Args:
        dtype: of what is stored.
        numbers: of what its bits are, where these are not the dtype's own.
    """
    if numbers is not None and numbers != dtype:
        stored, scales = quantize(x, numbers)
        return lax.bitcast_convert_type(stored, dtype), scales
    x = x.astype(jnp.float32)
    largest = largest_stored(dtype)
    scales = jnp.max(jnp.abs(x), axis=-1) / largest
    scaled = x / jnp.where(scales == 0, 1, scales)[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        scaled = jnp.round(scaled)
    return jnp.clip(scaled, -largest, largest).astype(dtype), scales


def is_scaled(dtype: jnp.dtype) -> bool:
    """Whether pages of this dtype need scales."""
    return jnp.dtype(dtype).itemsize == 1


def check_addressable(cache: jax.Array | jax.ShapeDtypeStruct) -> None:
    """Refuse a cache in which a kernel's addresses would overflow.

    Pallas' Triton lowering counts numbers with int32 in arrays of up to 4 GiB, and with int64 in larger ones: the
    former is too little for one-byte numbers of more than 2 GiB. (Rows have int32 indices in any case.)

    Raises:
        ValueError: the text says which sizes are possible.
    """
    size, rows = cache.size, cache.size // cache.shape[-1]
    if cache.dtype.itemsize == 1 and 2**31 < size <= 2**32:
        raise ValueError(
            f"a {cache.dtype} cache of {size} bytes cannot be addressed by the Triton kernels: make it at most "
            f"{2**31} bytes or more than {2**32}"
        )
    if rows >= 2**31:
        raise ValueError(f"a cache of {rows} rows (one key or value of one head) has more than {2**31 - 1}")


def check_operands(
    cache: jax.Array, kv_scales: jax.Array | None, tokens: int, rows: Mapping[str, jax.Array], exact_heads: bool
) -> None:
    """Refuse arrays that do not belong together: a kernel would read, or write, beside them.

    Args:
        tokens: that the batch has room for.
        rows: name -> array [T, heads, head_dim], of queries, keys or values.
        exact_heads: `rows` have the cache's kv_heads; otherwise any multiple of them.

    Raises:
        ValueError: the text names the array, what it is and what it must be.
    """
    if cache.ndim != 4 or cache.shape[1] % 2:
        raise ValueError(f"cache must be [pages, 2 * kv_heads, block_size, head_dim], got {list(cache.shape)}")
    kv_heads, dim = cache.shape[1] // 2, cache.shape[3]
    _check_numbers(cache, kv_scales, "cache")
    for name, array in rows.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a float dtype, got {array.dtype}")
        heads = kv_heads if exact_heads else f"a multiple of {kv_heads}"
        fits = array.ndim == 3 and array.shape[0] == tokens and array.shape[2] == dim
        if not fits or array.shape[1] % kv_heads or (exact_heads and array.shape[1] != kv_heads):
            raise ValueError(f"{name} must be [{tokens} (the batch's), {heads}, {dim}], got {list(array.shape)}")


def _check_numbers(cache: jax.Array, kv_scales: jax.Array | None, name: str) -> None:
    """Whether pages are of numbers that kernels know, with scales where these need them."""
    if not (jnp.issubdtype(cache.dtype, jnp.floating) or cache.dtype in (jnp.uint16, jnp.int8, jnp.uint8)):
        raise ValueError(
            f"{name} must be of a float dtype, int8, uint16 (bf16's bits) or uint8 (float8's bits), got {cache.dtype}"
        )
    scales = cache.shape[:-1]
    if is_scaled(cache.dtype) != (kv_scales is not None):
        wanted = f"needs kv_scales of shape {list(scales)}" if kv_scales is None else "takes no kv_scales"
        raise ValueError(f"a cache of {cache.dtype} {wanted}")
    if kv_scales is not None and kv_scales.shape != scales:
        raise ValueError(f"kv_scales must be of shape {list(scales)}, got {list(kv_scales.shape)}")


def check_latents(
    cache: jax.Array, kv_scales: jax.Array | None, tokens: int, name: str, rows: jax.Array, heads: int | None = None
) -> None:
    """`check_operands` of pages of latents, and `rows` [T, heads, width]; None: any heads."""
    if cache.ndim != 3:
        raise ValueError(f"a cache of latents must be [pages, block_size, width], got {list(cache.shape)}")
    _check_numbers(cache, kv_scales, "a cache of latents")
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(f"{name} must be of a float dtype, got {rows.dtype}")
    width = cache.shape[2]
    if rows.ndim != 3 or rows.shape != (tokens, heads or rows.shape[1], width):
        raise ValueError(
            f"{name} must be [{tokens} (the batch's), {heads or 'heads'}, {width}], got {list(rows.shape)}"
        )
