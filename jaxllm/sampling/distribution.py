"""A row's distribution as unnormalised weights that are computed where they are needed and never stored."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.sampling import tiles

# exp(-87) is the last power of e that is a normal float32. Below it a weight is exactly 0, so that no compilation of
# `weights` disagrees with another about whether a token can be drawn (XLA may or may not flush denormals).
_LOWEST_EXPONENT = -87.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cut:
    """The first tokens of a row in the order (logit descending, token id ascending), by its last member."""

    #: f32[R]: logit of the last token that is kept
    value: jax.Array
    #: i32[R]: among tokens with exactly that logit, the highest id that is kept
    last_id: jax.Array

    @classmethod
    def none(cls, rows: int) -> Cut:
        """The cut that keeps everything."""
        return cls(jnp.full((rows,), -jnp.inf, jnp.float32), jnp.full((rows,), jnp.iinfo(jnp.int32).max, jnp.int32))

    def keeps(self, logits: jax.Array, ids: jax.Array) -> jax.Array:
        """bool of logits' shape [R, ...]: whether each (logit, token id) is kept."""
        value, last = rows_like(self.value, logits), rows_like(self.last_id, logits)
        return (logits > value) | ((logits == value) & (ids <= last))


def rows_like(per_row: jax.Array, like: jax.Array) -> jax.Array:
    """[R] -> [R, 1, ...] with as many axes as `like`."""
    return per_row.reshape(per_row.shape[0], *([1] * (like.ndim - 1)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distribution:
    """softmax(logits / temperature) of R rows, relative to the most likely token (weight 1).

    The most likely token may have a logit of +inf; then only such tokens have weight. Rows without a largest number
    (NaN, or nothing but -inf) have no meaning here and must be handled by the caller.
    """

    #: f32[R, N, 64]
    logits: jax.Array
    #: f32[R]: largest logit
    peak: jax.Array
    #: f32[R], above 0
    temperature: jax.Array
    #: f32[R]: log(min_p), -inf for none
    log_min_p: jax.Array

    def scaled(self, logits: jax.Array) -> jax.Array:
        """f32[R, ...]: log of each weight, (logit - peak) / temperature."""
        peak = rows_like(self.peak, logits)
        # the comparison keeps +inf - +inf from being NaN
        return jnp.where(logits == peak, 0.0, logits - peak) / rows_like(self.temperature, logits)

    def weights(self, logits: jax.Array, ids: jax.Array, cut: Cut) -> jax.Array:
        """f32[R, ...] in [0, 1]: weight of each (logit, token id), 0 outside of `cut` and below min_p."""
        scaled = self.scaled(logits)
        floor = rows_like(jnp.maximum(self.log_min_p, _LOWEST_EXPONENT), logits)
        return jnp.where(cut.keeps(logits, ids) & (scaled >= floor), jnp.exp(scaled), 0.0)

    def tile_sums(self, cut: Cut) -> jax.Array:
        """f32[R, N]: weight of each tile; one pass over the logits."""
        return jnp.sum(self.weights(self.logits, tiles.token_ids(self.logits), cut), axis=-1)
