"""How numbers lie in the page array.

The array is ``[layers_per_group * num_blocks, 2, kv_heads, block_size, head_dim]`` for all layers: a page holds keys,
then values, head-major, so that the rows of one head are contiguous. A layer's pages are at ``layer * num_blocks +
block id``. Page 0 is trash: padding tokens write there and it is never read.

int8 and float8 pages have scales beside them, float32 ``[pages, 2, kv_heads, block_size]``: what is stored times its
scale is the number.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

#: pages hold bf16 as uint16 on CPU: XLA:CPU's bf16 scatter converts the whole cache
STORAGE = {jnp.dtype(jnp.bfloat16): jnp.uint16}


def compute_dtype(stored: jnp.dtype) -> jnp.dtype:
    """What to compute in with numbers stored as `stored`, where bf16 is no faster than float32."""
    return jnp.dtype(jnp.float32) if stored == jnp.uint16 or stored.itemsize == 1 else stored


def to_storage(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16) if dtype == jnp.uint16 else x.astype(dtype)


def from_storage(x: jax.Array, compute: jnp.dtype) -> jax.Array:
    if x.dtype == jnp.uint16:  # bf16 is the upper half of a float32
        return lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
    return x.astype(compute)


def largest_stored(dtype: jnp.dtype) -> float:
    """The largest magnitude that a scaled page's dtype holds."""
    return float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


def quantize(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """x [..., head_dim] as (stored, scales [...]), one scale a row: its largest magnitude becomes the dtype's."""
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
