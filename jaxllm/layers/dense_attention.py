"""Attention over whole sequences, without pages: plain XLA that can be differentiated, for training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeSequences:
    """Sequences of equal length, one after the other, each from its first token on: what stands in a `StepBatch` in
    place of an `AttentionBatch`. T is the product of the two numbers.

    There are no pages: the cache is a layer's keys and values, [2, T, kv_heads, head_dim], or its latents,
    [1, T, 1, width].
    """

    sequences: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})

    @property
    def token_seq(self) -> jax.Array:
        """i32 [T], the sequence of each token."""
        return jnp.arange(self.sequences * self.length, dtype=jnp.int32) // self.length

    @property
    def positions(self) -> jax.Array:
        """i32 [T], each token's position in its sequence."""
        return jnp.arange(self.sequences * self.length, dtype=jnp.int32) % self.length


def dense_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: jax.Array,
    batch: WholeSequences,
    *,
    scale: float,
    softcap: float | None,
    causal: bool,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """`layers.attention.attention` of whole sequences, in float32.

    Args:
        query: [T, heads, head_dim].
        key, value: [T, kv_heads, head_dim]; values may have another number of numbers.
        window: i32 [], positions that a token sees, itself included; if not `causal`, as many ahead.
        sinks: [heads], a score of each head that takes part in the softmax and has no value.

    Returns:
        [T, heads, numbers of a value] in query's dtype.
    """
    tokens, heads, dim = query.shape
    kv_heads, shape = key.shape[1], (batch.sequences, batch.length)
    q = query.astype(jnp.float32).reshape(*shape, kv_heads, heads // kv_heads, dim)
    k, v = (x.astype(jnp.float32).reshape(*shape, kv_heads, -1) for x in (key, value))
    precision = lax.Precision.HIGHEST  # float32 means float32: no TF32 on GPUs
    scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k, precision=precision) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    position = jnp.arange(batch.length, dtype=jnp.int32)
    distance = position[:, None] - position[None, :]
    seen = (distance < window) & (distance >= 0 if causal else distance > -window)
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : batch.length]
    attended = jnp.einsum("bkgqs,bskd->bqkgd", weights, v, precision=precision)
    return attended.reshape(tokens, heads, -1).astype(query.dtype)
