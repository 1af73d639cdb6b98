"""Log-probabilities of the sampled token and of the most likely ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.sampling import blocks as blk

MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")


@struct.dataclass
class Logprobs:
    """K = the number of most likely tokens that was asked for; it may be 0."""

    #: f32[R]: of the sampled token
    sampled: jax.Array
    #: i32[R]: 1 + the number of tokens strictly more likely than the sampled one
    rank: jax.Array
    #: i32[R, K]: most likely first, equal ones by ascending id
    top_ids: jax.Array
    #: f32[R, K]
    top: jax.Array

    @classmethod
    def zeros(cls, rows: int, num_logprobs: int) -> Logprobs:
        """What is returned when nobody reads it."""
        return cls(
            sampled=jnp.zeros((rows,), jnp.float32),
            rank=jnp.zeros((rows,), jnp.int32),
            top_ids=jnp.zeros((rows, num_logprobs), jnp.int32),
            top=jnp.zeros((rows, num_logprobs), jnp.float32),
        )


def gather_logprobs(logits: jax.Array, token: jax.Array, num_logprobs: int, *, normalize: bool) -> Logprobs:
    """Log-probabilities of one token and of the most likely ones.

    Args:
        logits: f32[R, N, 64]. A row with a NaN, or with nothing but -inf, gives NaN values.
        token: i32[R].
        num_logprobs: K, at most the vocabulary's size.
        normalize: log_softmax of the logits; otherwise the logits themselves.
    """
    chosen = blk.take_token(logits, token)
    above = jnp.where(logits > chosen[:, None, None], 1.0, 0.0)
    rank = 1 + jnp.sum(jnp.sum(above, axis=-1), axis=-1).astype(jnp.int32)
    top, top_ids = blk.largest(logits, num_logprobs)
    if normalize:
        peak = jnp.max(jnp.max(logits, axis=-1), axis=-1)
        relative = jnp.where(logits == peak[:, None, None], 0.0, logits - peak[:, None, None])
        log_sum = jnp.log(jnp.sum(jnp.sum(jnp.exp(relative), axis=-1), axis=-1))
        chosen = _relative(chosen, peak) - log_sum
        top = _relative(top, peak[:, None]) - log_sum[:, None]
    return Logprobs(sampled=chosen, rank=rank, top_ids=top_ids, top=top)


def _relative(logits: jax.Array, peak: jax.Array) -> jax.Array:
    """logits - peak, where +inf - +inf is 0; NaN in rows of -inf, which are no distribution."""
    return jnp.where((logits == peak) & (peak > -jnp.inf), 0.0, logits - peak)
