"""The vocabulary in tiles of 64 lanes: exact maxima and largest-k without a sort of the vocabulary.

The maximum of each tile costs one pass that XLA vectorises (an argmax over the vocabulary is not, and is 20 times
slower on CPU); everything after it works on V / 64 tile maxima and on the few tiles that they point at.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

TILE = 64
#: tiles whose maxima are taken lane by lane first: between vectors XLA:CPU takes them four times as fast as within one
HEIGHT = 16


def to_tiles(logits: jax.Array) -> jax.Array:
    """f32[R, V] -> f32[R, ceil(V / 64), 64], filled up with -inf. Token t is at [t // 64, t % 64]."""
    rows, vocab = logits.shape
    padding = -vocab % TILE
    if padding:
        logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return logits.reshape(rows, -1, TILE)


def token_ids(tiles: jax.Array) -> jax.Array:
    """i32[1, N, 64]: the token id of every lane of f32[R, N, 64]."""
    return lax.iota(jnp.int32, tiles.shape[1] * TILE).reshape(1, -1, TILE)


def first_true(mask: jax.Array) -> jax.Array:
    """i32[R]: the first True along the last axis of bool[R, N]; N where there is none."""
    size = mask.shape[-1]
    return jnp.min(jnp.where(mask, lax.iota(jnp.int32, size), size), axis=-1)


def take_tile(tiles: jax.Array, index: jax.Array) -> jax.Array:
    """f32[R, N, 64], i32[R] -> f32[R, 64]: one tile of each row."""
    return jnp.take_along_axis(tiles, index[:, None, None], axis=1, mode="clip")[:, 0]


def take_token(tiles: jax.Array, token: jax.Array) -> jax.Array:
    """f32[R, N, 64], i32[R] -> f32[R]: the value at one token of each row."""
    tile, lane = lax.div(token, TILE), lax.rem(token, TILE)
    return jnp.take_along_axis(take_tile(tiles, tile), lane[:, None], axis=1, mode="clip")[:, 0]


def argmax(tiles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest value of each row and the lowest token id that has it.

    Args:
        tiles: f32[R, N, 64].

    Returns:
        (f32[R] maximum, i32[R] token id). A row of -inf gives (-inf, 0), a row with a NaN gives (NaN, 0), or, where XLA
        loses the NaN, another number and a token of the row.
    """
    peak, token = lax.platform_dependent(tiles, cpu=_between_vectors, default=_by_tiles)
    return peak, jnp.where(jnp.isnan(peak), 0, token)


def _by_tiles(tiles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`argmax` in the fewest launches of a GPU. The token of a row with a NaN is any."""
    maxima = jnp.max(tiles, axis=-1)
    peak = jnp.max(maxima, axis=-1)
    tile = jnp.minimum(first_true(maxima == peak[:, None]), tiles.shape[1] - 1)
    lane = first_true(take_tile(tiles, tile) == peak[:, None])
    return peak, tile * TILE + lane


def _between_vectors(tiles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same in the order that is quick on a CPU."""
    rows, count, _ = tiles.shape
    height = min(HEIGHT, count)
    whole = count - count % height
    # the barrier keeps XLA from taking both maxima in one loop
    lanes = lax.optimization_barrier(jnp.max(tiles[:, :whole].reshape(rows, -1, height, TILE), axis=2))
    maxima = jnp.concatenate([jnp.max(lanes, axis=-1), jnp.max(tiles[:, whole:], axis=-1)], axis=1)
    peak = jnp.max(maxima, axis=-1)
    block = first_true(maxima == peak[:, None])
    tile = jnp.where(block < whole // height, block * height, whole + block - whole // height)
    # tiles in front of a last one have no such number, or theirs would have been found
    tile = jnp.minimum(tile, count - height)
    found = jnp.take_along_axis(tiles, (tile[:, None] + lax.iota(jnp.int32, height))[:, :, None], axis=1, mode="clip")
    lane = first_true(found.reshape(rows, -1) == peak[:, None])
    # no token has a maximum from which XLA has lost a NaN
    return peak, jnp.where(lane < height * TILE, tile * TILE + lane, 0)


def largest(tiles: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest values of each row, largest first, equal values by ascending token id.

    They lie in the k tiles with the largest maxima: any other tile has k values above its own maximum, or equal to it
    and at a lower id when equal maxima are taken in ascending order. So only k * 64 values are looked at.

    Args:
        tiles: f32[R, N, 64] without NaN.
        k: 0 to N * 64.

    Returns:
        (f32[R, k] values, i32[R, k] token ids).
    """
    rows, number, _ = tiles.shape
    if k == 0:
        return jnp.zeros((rows, 0), tiles.dtype), jnp.zeros((rows, 0), jnp.int32)
    if k < number:
        _, chosen = lax.top_k(jnp.max(tiles, axis=-1), k)
        # ascending, so that top_k's preference for low positions is a preference for low token ids
        chosen = jnp.sort(chosen, axis=-1)
        tiles = jnp.take_along_axis(tiles, chosen[:, :, None], axis=1, mode="clip")
    else:
        chosen = jnp.broadcast_to(lax.iota(jnp.int32, number), (rows, number))
    values, lanes = lax.top_k(tiles.reshape(rows, -1), k)
    ids = jnp.take_along_axis(chosen, lax.div(lanes, TILE), axis=1, mode="clip") * TILE + lax.rem(lanes, TILE)
    return values, ids
