"""Tokens to vectors and back. The vocabulary, the logical axis "vocab" of both tables, may be split over devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.context import Context, StepBatch, exchanged
from jaxllm.layers.linear import linear_f32
from jaxllm.layers.stacked_matrix import StackedMatrix
from pallas_kernels.gguf_blocks import BlockWeight
from pallas_kernels.packed_matmul.api import has_kernel
from pallas_kernels.quantized import Quantized, dense, rows

VOCAB = "vocab"
#: rows of a table in blocks that are widened at once, where scores are wanted of more tokens than it has kernels for
PIECE = 4096


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
    scores = _scores(context, hidden, table)
    axis = context.mesh_axis(VOCAB)
    if axis is None:
        return scores
    # the last device's rows may go on behind the vocabulary
    with exchanged(VOCAB):
        return lax.all_gather(scores, axis, axis=1, tiled=True)[:, :vocab_size]


def _scores(context: Context, hidden: jax.Array, table: jax.Array | StackedMatrix | Quantized) -> jax.Array:
    """float32 [R, V]. A GGUF file's blocks are never widened as a whole: no matrix of a small model is larger."""
    if not isinstance(table, BlockWeight):
        return linear_f32(context, hidden, table)
    size = table.shape[0]
    if size <= PIECE or has_kernel(context.backend, table, rows=hidden.shape[0]):
        return linear_f32(context, hidden, table)

    def piece(first: jax.Array | int, count: int) -> jax.Array:
        part = dataclasses.replace(table, data=lax.dynamic_slice_in_dim(table.data, first, count))
        return linear_f32(context, hidden, part.dequantize(hidden.dtype))

    whole, rest = divmod(size, PIECE)
    scores = jnp.zeros((hidden.shape[0], size), jnp.float32)

    def one(i: jax.Array, scores: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(scores, piece(i * PIECE, PIECE), i * PIECE, axis=1)

    scores = lax.fori_loop(0, whole, one, scores)
    if rest:
        scores = scores.at[:, whole * PIECE :].set(piece(whole * PIECE, rest))
    return scores
