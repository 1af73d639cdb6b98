"""Tokens to vectors and back. The vocabulary, the logical axis "vocab" of both tables, may be split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.context import Context, StepBatch, exchanged
from jaxllm.layers.linear import linear_f32
from jaxllm.layers.stacked_matrix import StackedMatrix
from pallas_kernels.quantized import Quantized, dense, rows

VOCAB = "vocab"


def embed(
    context: Context,
    table: jax.Array | Quantized,
    tokens: jax.Array,
    dtype: jnp.dtype,
    slots: jax.Array | None = None,
) -> jax.Array:
    """Rows of `table` [V, d] of tokens i32 [T] -> [T, d]. Of a table that is split, the others' rows come from them.

    Args:
        dtype: of the rows of a quantized table.
        slots: i32 [T], of each token which of several tables [S, V, d], none of them quantized, it is.
    """

    def rows_of(tokens: jax.Array) -> jax.Array:
        if slots is not None:
            assert isinstance(table, jax.Array)
            return table[slots, tokens]
        return dense(rows(table, tokens), dtype)

    axis = context.mesh_axis(VOCAB)
    if axis is None:
        return rows_of(tokens)
    size = table.shape[-2]
    local = tokens - lax.axis_index(axis) * size
    here = (local >= 0) & (local < size)
    found = jnp.where(here[:, None], rows_of(jnp.where(here, local, 0)), 0)
    with exchanged(VOCAB):
        return lax.psum(found, axis)


def with_embeddings(x: jax.Array, batch: StepBatch) -> jax.Array:
    """x [T, d], the model's vectors of a step's tokens as its first layer takes them, with those that prompts bring."""
    if batch.embeddings is None or batch.embedded is None:
        return x
    return jnp.where(batch.embedded[:, None], batch.embeddings, x)


def unembed(
    context: Context, hidden: jax.Array, table: jax.Array | StackedMatrix | Quantized, vocab_size: int
) -> jax.Array:
    """Scores of every token, float32 [R, vocab_size], of hidden [R, d] and `table` [V, d].

    Args:
        vocab_size: of the whole vocabulary, on each device.
    """
    scores = linear_f32(context, hidden, table)
    axis = context.mesh_axis(VOCAB)
    if axis is None:
        return scores
    # the last device's rows may go on behind the vocabulary
    with exchanged(VOCAB):
        return lax.all_gather(scores, axis, axis=1, tiled=True)[:, :vocab_size]
