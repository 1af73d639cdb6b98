"""top-k, top-p and min-p without a sort: where the most likely tokens of a row end.

All three keep the first tokens of the order (logit descending, token id ascending): exactly k tokens survive top-k, and
top_k=1 is greedy, ties or not. Almost always the border is among the row's 64 largest logits, and then these are all
that is looked at (`Head`). Otherwise `find_cut` searches the border in the whole vocabulary, or `draw_nucleus` does
without knowing it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.sampling import tiles
from jaxllm.sampling.distribution import Cut, Distribution

HEAD = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """The row's most likely tokens, K of them, in order."""

    #: f32[R, K]: logits, descending
    logits: jax.Array
    #: i32[R, K]: token ids
    ids: jax.Array
    #: f32[R, K]: weights of those that pass top-k and min-p, else 0
    weights: jax.Array
    #: i32[R]: how many pass top-k and min-p
    survivors: jax.Array
    #: bool[R]: whether no token outside of the head passes top-k and min-p
    closed: jax.Array

    def nucleus(self, top_p: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How many tokens remain after top-p, if the head can tell.

        Args:
            top_p: f32[R].
            total: f32[R], weight of all tokens that pass top-k and min-p; read for rows that are not `closed`.

        Returns:
            (i32[R] number kept, bool[R] whether that is all that is kept).
        """
        cumulative = jnp.cumsum(self.weights, axis=1)
        target = top_p * jnp.where(self.closed, cumulative[:, -1], total)
        before = jnp.pad(cumulative[:, :-1], ((0, 0), (1, 0)))
        within = jnp.sum(before < target[:, None], axis=1, dtype=jnp.int32)
        kept = jnp.where(top_p < 1.0, jnp.minimum(self.survivors, jnp.maximum(within, 1)), self.survivors)
        return kept, self.closed | ((top_p < 1.0) & (cumulative[:, -1] >= target))

    def cut(self, kept: jax.Array) -> Cut:
        """The cut that keeps the first i32[R] tokens of the head."""
        index = jnp.maximum(kept - 1, 0)[:, None]
        return Cut(
            jnp.take_along_axis(self.logits, index, axis=1, mode="clip")[:, 0],
            jnp.take_along_axis(self.ids, index, axis=1, mode="clip")[:, 0],
        )


def head_of(distribution: Distribution, limit: jax.Array) -> Head:
    """The 64 most likely tokens of each row (fewer where the vocabulary has fewer).

    Args:
        distribution: of R rows.
        limit: i32[R], top-k; at least the vocabulary's size = none.
    """
    size = distribution.logits.shape[1] * tiles.TILE
    width = min(HEAD, size)
    logits, ids = tiles.largest(distribution.logits, width)
    passes = (lax.iota(jnp.int32, width) < limit[:, None]) & (
        distribution.scaled(logits) >= distribution.log_min_p[:, None]
    )
    survivors = jnp.sum(passes, axis=1, dtype=jnp.int32)
    weights = jnp.where(passes, distribution.weights(logits, ids, Cut.none(logits.shape[0])), 0.0)
    closed = (survivors < width) | (limit <= width) | (width == size)
    return Head(logits, ids, weights, survivors, closed)


def top_k_cut(logits: jax.Array, limit: jax.Array, active: jax.Array) -> Cut:
    """The cut that keeps exactly `limit` tokens.

    Args:
        logits: f32[R, N, 64] without NaN in active rows.
        limit: i32[R], 1 to N * 64.
        active: bool[R]; other rows get some valid cut.
    """

    def counted(mask: jax.Array) -> jax.Array:
        # float32 counts vectorise better than int32 on CPU, and are exact to 2**24
        return jnp.sum(jnp.sum(jnp.where(mask, 1.0, 0.0), axis=-1), axis=-1)

    return find_cut(logits, counted, limit.astype(jnp.float32), active)


def top_p_cut(distribution: Distribution, cut: Cut, top_p: jax.Array, active: jax.Array) -> Cut:
    """The smallest cut inside of `cut` and min_p with `top_p` (f32[R], below 1 in active rows) of its weight."""
    logits = distribution.logits
    weights = distribution.weights(logits, tiles.token_ids(logits), cut)

    def mass(mask: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sum(jnp.where(mask, weights, 0.0), axis=-1), axis=-1)

    return find_cut(logits, mass, top_p * mass(jnp.full(logits.shape, True)), active)


def find_cut(logits: jax.Array, measure: Callable[[jax.Array], jax.Array], target: jax.Array, active: jax.Array) -> Cut:
    """The smallest cut whose measure reaches the target, by bisection.

    First over the value of the last token, on integers ordered like the floats, with the float's own midpoint in every
    second step (it is the faster of the two near the border, the integers bound the number of steps); then over token
    ids among tokens of exactly that value. A row is done as soon as its measure equals the target.

    Args:
        logits: f32[R, N, 64].
        measure: bool[R, N, 64] -> f32[R]; a sum over the tokens that are set, of nothing negative.
        target: f32[R], positive, at most the measure of everything.
        active: bool[R]; rows to search for.
    """
    ids = tiles.token_ids(logits)
    rows = logits.shape[0]

    def value_step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, exact, step = state
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        by_value = _to_key(0.5 * _to_float(low) + 0.5 * _to_float(high))
        middle = jnp.where((step % 2 == 1) & (by_value > low) & (by_value < high), by_value, middle)
        reached = measure(logits >= _to_float(middle)[:, None, None])
        enough = reached >= target
        searching = active & ~exact & (high - 1 > low)
        low = jnp.where(searching & enough, middle, low)
        high = jnp.where(searching & ~enough, middle, high)
        return low, high, exact | (searching & (reached == target)), step + 1

    def value_open(state: tuple[jax.Array, ...]) -> jax.Array:
        low, high, exact, _ = state
        return jnp.any(active & ~exact & (high - 1 > low))

    low = jnp.broadcast_to(_to_key(jnp.float32(-jnp.inf)), (rows,))
    high = _to_key(jnp.max(jnp.max(logits, axis=-1), axis=-1)) + 1
    start = (low, high, jnp.zeros((rows,), bool), jnp.int32(0))
    low, _, exact, _ = lax.while_loop(value_open, value_step, start)

    value = _to_float(low)[:, None, None]
    ties = jnp.sum(jnp.sum(logits == value, axis=-1, dtype=jnp.int32), axis=-1)
    tied = active & ~exact & (ties > 1)

    def id_step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        below, last = state
        middle = (below + last) >> 1
        reached = measure((logits > value) | ((logits == value) & (ids <= middle[:, None, None])))
        enough = reached >= target
        searching = last - 1 > below
        return jnp.where(searching & ~enough, middle, below), jnp.where(searching & enough, middle, last)

    def id_open(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(tied & (state[1] - 1 > state[0]))

    last = jnp.full((rows,), ids.size - 1, jnp.int32)
    _, last = lax.while_loop(id_open, id_step, (jnp.full((rows,), -1, jnp.int32), last))
    return Cut(_to_float(low), jnp.where(tied, last, ids.size - 1))


def _to_key(value: jax.Array) -> jax.Array:
    """f32 -> i32 in the same order; -0.0 is just below 0.0."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _to_float(key: jax.Array) -> jax.Array:
    """The inverse of `_to_key`."""
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)
