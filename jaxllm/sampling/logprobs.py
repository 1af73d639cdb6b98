"""Log-probabilities of the sampled token and of the most likely ones."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.sampling import tiles

MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """K = the number of most likely tokens that was asked for, C = the most that are asked for by id; both may be 0."""

    #: f32[R]: of the sampled token
    sampled: jax.Array
    #: i32[R]: 1 + the number of tokens strictly more likely than the sampled one
    rank: jax.Array
    #: i32[R, K]: most likely first, equal ones by ascending id
    top_ids: jax.Array
    #: f32[R, K]
    top: jax.Array
    #: f32[R, C]: of the tokens that were asked for; anything where none was
    chosen: jax.Array

    @classmethod
    def zeros(cls, rows: int, num_logprobs: int, num_chosen: int = 0) -> Logprobs:
        """What is returned when nobody reads it."""
        return cls(
            sampled=jnp.zeros((rows,), jnp.float32),
            rank=jnp.zeros((rows,), jnp.int32),
            top_ids=jnp.zeros((rows, num_logprobs), jnp.int32),
            top=jnp.zeros((rows, num_logprobs), jnp.float32),
            chosen=jnp.zeros((rows, num_chosen), jnp.float32),
        )


def gather_logprobs(
    logits: jax.Array, token: jax.Array, num_logprobs: int, *, normalize: bool, chosen_ids: jax.Array | None = None
) -> Logprobs:
    """Log-probabilities of one token, of the most likely ones, and of some by id.

    Args:
        logits: f32[R, N, 64]. A row with a NaN, or with nothing but -inf, gives NaN values.
        token: i32[R].
        num_logprobs: K, at most the vocabulary's size.
        normalize: log_softmax of the logits; otherwise the logits themselves.
        chosen_ids: i32[R, C]; -1 = none.
    """
    rows = logits.shape[0]
    sampled = tiles.take_token(logits, token)
    above = jnp.where(logits > sampled[:, None, None], 1.0, 0.0)
    rank = 1 + jnp.sum(jnp.sum(above, axis=-1), axis=-1).astype(jnp.int32)
    top, top_ids = tiles.largest(logits, num_logprobs)
    chosen = jnp.zeros((rows, 0), jnp.float32)
    if chosen_ids is not None:
        chosen = jnp.take_along_axis(logits.reshape(rows, -1), jnp.maximum(chosen_ids, 0), axis=1, mode="clip")
    if normalize:
        peak = jnp.max(jnp.max(logits, axis=-1), axis=-1)
        relative = jnp.where(logits == peak[:, None, None], 0.0, logits - peak[:, None, None])
        log_sum = jnp.log(jnp.sum(jnp.sum(jnp.exp(relative), axis=-1), axis=-1))
        sampled = _relative(sampled, peak) - log_sum
        chosen = _relative(chosen, peak[:, None]) - log_sum[:, None]
        top = _relative(top, peak[:, None]) - log_sum[:, None]
    return Logprobs(sampled=sampled, rank=rank, top_ids=top_ids, top=top, chosen=chosen)


def _relative(logits: jax.Array, peak: jax.Array) -> jax.Array:
    """logits - peak, where +inf - +inf is 0; NaN in rows of -inf, which are no distribution."""
    return jnp.where((logits == peak) & (peak > -jnp.inf), 0.0, logits - peak)
