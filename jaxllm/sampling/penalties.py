"""Repetition, presence and frequency penalties over a row's history."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.sampling.batch import SamplingBatch

CHUNK = 256
# Above every output count, so that one array holds both facts about a token.
_IN_PROMPT = 1 << 24


def apply_penalties(logits: jax.Array, batch: SamplingBatch) -> jax.Array:
    """The penalties of vLLM and OpenAI, in this order.

    A token of the prompt or the outputs has its logit l replaced by l / r if l > 0, else l * r (repetition penalty r);
    then every output token loses frequency_penalty * count + presence_penalty. A row whose penalties are 1, 0, 0 keeps
    its logits to the bit.

    Args:
        logits: f32[R, V].
        batch: R rows; reads `history`, the two lengths and the penalties.

    Returns:
        f32[R, V].
    """
    counts = history_counts(batch, logits.shape[1])
    outputs = (counts & (_IN_PROMPT - 1)).astype(jnp.float32)
    repetition = jnp.where(counts > 0, batch.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    presence = jnp.where(outputs > 0, batch.presence_penalty[:, None], 0.0)
    return logits - batch.frequency_penalty[:, None] * outputs - presence


def history_counts(batch: SamplingBatch, vocab: int) -> jax.Array:
    """How often each token occurs in the outputs of each penalised row, plus 2**24 when it occurs in the prompt.

    Scatters cost about 0.1 us per token on CPU, so they run over chunks of 256 positions and no further than the
    longest row that needs them: the prompts only for a repetition penalty, and rows without penalties not at all.

    Returns:
        i32[R, V]; the prompt's part only in rows with a repetition penalty.
    """
    rows, capacity = batch.history.shape
    chunk = min(CHUNK, capacity)
    row_index = lax.iota(jnp.int32, rows)[:, None]
    prompt_end = jnp.where(batch.repetition_penalty != 1.0, jnp.minimum(batch.prompt_length, batch.length), 0)
    output_end = jnp.where(batch.penalized, batch.length, 0)
    output_start = jnp.where(batch.penalized, batch.prompt_length, capacity)

    def chunk_at(index: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
        """Token ids of one chunk, `vocab` (which a scatter drops) outside of start <= position < end."""
        first = jnp.minimum(index * chunk, capacity - chunk)
        tokens = lax.dynamic_slice(batch.history, (0, first), (rows, chunk))
        position = (first + lax.iota(jnp.int32, chunk))[None, :]
        # the last chunk is moved back to fit the array: positions of the one before must not count twice
        valid = (position >= jnp.maximum(start[:, None], index * chunk)) & (position < end[:, None]) & (tokens >= 0)
        return jnp.where(valid, tokens, vocab)

    def mark_prompt(index: jax.Array, counts: jax.Array) -> jax.Array:
        return counts.at[row_index, chunk_at(index, jnp.zeros_like(prompt_end), prompt_end)].set(
            _IN_PROMPT, mode="drop"
        )

    def count_outputs(index: jax.Array, counts: jax.Array) -> jax.Array:
        return counts.at[row_index, chunk_at(index, output_start, output_end)].add(1, mode="drop")

    counts = jnp.zeros((rows, vocab), jnp.int32)
    counts = lax.fori_loop(0, -(-jnp.max(prompt_end) // chunk), mark_prompt, counts)
    return lax.fori_loop(jnp.min(output_start) // chunk, -(-jnp.max(output_end) // chunk), count_outputs, counts)
