"""Drawing a token by inversion of the cumulative distribution, from a few random words per row.

A row's randomness is threefry(seed, position, attempt): it does not depend on the other rows, on their number or on
the row's place among them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.sampling import tiles
from jaxllm.sampling.distribution import Cut, Distribution

# attempts made, bool[R] rows still to draw, i32[R] tokens, f32[R, N] tile sums of what may be drawn, and its cut
_State = tuple[jax.Array, jax.Array, jax.Array, jax.Array, Cut]


def uniforms(seed: jax.Array, position: jax.Array, attempt: jax.Array | int) -> jax.Array:
    """Three independent uniform numbers per row.

    The words of fold_in(fold_in(seed, position), counter) are threefry's output for that counter, so they are random
    bits themselves; unlike those of `jax.random.uniform` they are the same under every jax version and configuration.

    Args:
        seed: u32[R, 2].
        position: i32[R].
        attempt: i32[]; which of the row's triples.

    Returns:
        f32[R, 3], multiples of 2**-24 in [0, 1).
    """

    def words(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, 2 * attempt + jnp.arange(2))
        return jax.random.key_data(keys).reshape(-1)

    bits = jax.vmap(words)(seed, position)[:, :3] >> 8
    return bits.astype(jnp.float32) * jnp.float32(2.0**-24)


def invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The index at which the cumulative sum of the weights passes `uniform` of their total.

    N is small, so each cumulative sum is a masked sum of its own: a scan is slow to compile, and a parallel one may
    step by a rounding error where the weight is 0.

    Args:
        weights: f32[R, N], none negative, at least one positive per row.
        uniform: f32[R] in [0, 1).

    Returns:
        i32[R]; never an index of weight 0 (0 for a row without any weight).
    """
    size = weights.shape[1]
    index = lax.iota(jnp.int32, size)
    cumulative = jnp.sum(jnp.where(index <= index[:, None], weights[:, None, :], 0.0), axis=-1)
    first = tiles.first_true((weights > 0.0) & (cumulative > uniform[:, None] * cumulative[:, -1:]))
    last = jnp.max(jnp.where(weights > 0.0, index, 0), axis=-1)
    return jnp.where(first < size, first, last)


def draw(distribution: Distribution, sums: jax.Array, cut: Cut, numbers: jax.Array) -> jax.Array:
    """Draw a group of 64 tiles by its weight, a tile of the group, then a token of the tile.

    Args:
        distribution: of R rows.
        sums: f32[R, N], `distribution.tile_sums(cut)`.
        cut: what may be drawn.
        numbers: f32[R, 3], from `uniforms`.

    Returns:
        i32[R] token ids.
    """
    groups = jnp.pad(sums, ((0, 0), (0, -sums.shape[1] % tiles.TILE))).reshape(sums.shape[0], -1, tiles.TILE)
    group = invert(jnp.sum(groups, axis=-1), numbers[:, 0])
    tile = group * tiles.TILE + invert(tiles.take_tile(groups, group), numbers[:, 1])
    ids = tile[:, None] * tiles.TILE + lax.iota(jnp.int32, tiles.TILE)
    lanes = distribution.weights(tiles.take_tile(distribution.logits, tile), ids, cut)
    return tile * tiles.TILE + invert(lanes, numbers[:, 2])


def draw_nucleus(
    distribution: Distribution,
    sums: jax.Array,
    cut: Cut,
    top_p: jax.Array,
    seed: jax.Array,
    position: jax.Array,
) -> jax.Array:
    """Draw from the smallest set of most likely tokens within `cut` whose weight is `top_p` of the cut's.

    By rejection, which needs no search for the set's border: a drawn token belongs to the set exactly when the tokens
    ranked before it weigh less than top_p of the whole. Otherwise neither it nor any token ranked after it does, and
    the next draw is from those before it, whose tile sums the test has just computed. One pass over the logits per
    attempt, and each attempt of a row succeeds with a probability of at least top_p.

    Args:
        distribution: of R rows.
        sums: f32[R, N], `distribution.tile_sums(cut)`.
        cut: top-k.
        top_p: f32[R]; 1 and above = all of the cut.
        seed: u32[R, 2].
        position: i32[R].

    Returns:
        i32[R] token ids.
    """
    target = top_p * jnp.sum(sums, axis=-1)
    rows = top_p.shape[0]

    def attempt(state: _State) -> _State:
        count, is_open, token, sums, cut = state
        token = jnp.where(is_open, draw(distribution, sums, cut, uniforms(seed, position, count)), token)
        before = Cut(tiles.take_token(distribution.logits, token), token - 1)
        unsure = is_open & (top_p < 1.0)
        sums = lax.cond(jnp.any(unsure), lambda: distribution.tile_sums(before), lambda: sums)
        mass = jnp.sum(sums, axis=-1)
        return count + 1, unsure & (mass >= target) & (mass > 0.0), token, sums, before

    start = (jnp.int32(0), jnp.full((rows,), True), jnp.zeros((rows,), jnp.int32), sums, cut)
    return lax.while_loop(lambda state: jnp.any(state[1]), attempt, start)[2]
