"""Attention over whole sequences, without pages: plain XLA that can be differentiated, for training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

#: queries of a block: its scores stay in a processor's cache. More where a sequence would have more blocks than that,
#: since each is written out in the program
BLOCK, MOST_BLOCKS = 64, 16


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
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
    size = max(BLOCK, -(-batch.length // MOST_BLOCKS))
    attended = []
    for begin in range(0, batch.length, size):
        end = min(begin + size, batch.length)
        # of a causal model no query sees a key behind its own
        keys = slice(end if causal else None)
        position = jnp.arange(begin, end, dtype=jnp.int32)
        distance = position[:, None] - jnp.arange(batch.length, dtype=jnp.int32)[None, keys]
        seen = (distance < window) & (distance >= 0 if causal else distance > -window)
        attended.append(_attended(q[:, begin:end], k[:, keys], v[:, keys], seen, scale, softcap, sinks))
    return jnp.concatenate(attended, axis=1).reshape(tokens, heads, -1).astype(query.dtype)


def _attended(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    scale: float,
    softcap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Queries [B, L, kv_heads, group, head_dim] over keys [B, S, kv_heads, head_dim] that they see, bool [L, S]."""
    precision = lax.Precision.HIGHEST  # float32 means float32: no TF32 on GPUs
    scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k, precision=precision) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, v, precision=precision)
