"""What towers that see pictures are made of: attention among the patches of a frame or of a window, and positions in
two dimensions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.linear import matmul_precision

#: numbers of a tile of scores, of one head
TILE_SCORES = 2**22
#: queries of a tile of attention within windows
WINDOW_TILE = 256
_FAR = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Patches:
    """What a tower is told of the N patches that it computes, besides their pixels."""

    #: i32 [N, 2], row and column of each in its frame
    positions: jax.Array
    #: i32 [N], which of them see each other in all of a frame, and in a window; -1: padding
    frames: jax.Array
    windows: jax.Array


def axial_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [N, head_dim // 2], for positions i32 [N, 2]: half of the angles are of the row, half of the
    column (Qwen2-VL, arXiv:2409.12191, section 2.1).
    """
    quarter = jnp.arange(0, head_dim // 2, 2, dtype=jnp.float32) / (head_dim // 2)
    angles = positions[:, :, None].astype(jnp.float32) * (1.0 / theta**quarter)
    angles = angles.reshape(positions.shape[0], -1)
    return jnp.cos(angles), jnp.sin(angles)


def frame_attention(query: jax.Array, key: jax.Array, value: jax.Array, frames: jax.Array, *, scale: float):
    """Every patch sees all patches of its frame: [N, heads, head_dim] of three such arrays and i32 [N].

    Scores exist of a tile of queries at a time, so that they take no more than `TILE_SCORES` a head.
    """
    count = query.shape[0]
    rows = _divisor(count, max(TILE_SCORES // count, 1))

    def tile(first: jax.Array) -> jax.Array:
        own = lax.dynamic_slice_in_dim(query, first, rows), lax.dynamic_slice_in_dim(frames, first, rows)
        return _attend(*own, key, value, frames, scale)

    return lax.map(tile, jnp.arange(0, count, rows, dtype=jnp.int32)).reshape(query.shape)


def window_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, windows: jax.Array, *, scale: float, size: int
) -> jax.Array:
    """As `frame_attention`, within windows of at most `size` patches, which follow each other: of a tile of queries
    only the neighbours are looked at.
    """
    count = query.shape[0]
    rows = _divisor(count, WINDOW_TILE)
    if count <= rows + 2 * size:
        return frame_attention(query, key, value, windows, scale=scale)
    beside = ((size, size), (0, 0), (0, 0))
    key, value = jnp.pad(key, beside), jnp.pad(value, beside)
    near = jnp.pad(windows, (size, size), constant_values=-1)

    def tile(first: jax.Array) -> jax.Array:
        own = lax.dynamic_slice_in_dim(query, first, rows), lax.dynamic_slice_in_dim(windows, first, rows)
        keys, values, groups = (lax.dynamic_slice_in_dim(x, first, rows + 2 * size) for x in (key, value, near))
        return _attend(*own, keys, values, groups, scale)

    return lax.map(tile, jnp.arange(0, count, rows, dtype=jnp.int32)).reshape(query.shape)


def _attend(query, groups, key, value, key_groups, scale: float) -> jax.Array:
    """[Q, heads, head_dim] of queries that see the keys of their own group."""
    precision = matmul_precision(query.dtype)
    scores = jnp.einsum("qhd,khd->hqk", query, key, precision=precision, preferred_element_type=jnp.float32) * scale
    # padding sees padding: a softmax over nothing would be no number
    weights = jax.nn.softmax(jnp.where(groups[:, None] == key_groups[None, :], scores, _FAR), axis=-1)
    return jnp.einsum(
        "hqk,khd->qhd", weights.astype(value.dtype), value, precision=precision, preferred_element_type=jnp.float32
    ).astype(query.dtype)


def _divisor(count: int, most: int) -> int:
    """The largest divisor of `count` that is no more than `most`."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)
