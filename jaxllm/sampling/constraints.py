"""What a request forbids or prefers token by token: allowed-token masks, bad words, logit bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def apply_mask(logits: jax.Array, mask_words: jax.Array, use_mask: jax.Array) -> jax.Array:
    """-inf for every token whose bit is not set, in rows that use their mask.

    Args:
        logits: f32[R, V].
        mask_words: u32[R, ceil(V / 32)]; bit t % 32 of word t // 32 belongs to token t.
        use_mask: bool[R].
    """
    rows, vocab = logits.shape
    bits = (mask_words[:, :, None] >> lax.iota(jnp.uint32, 32)) & 1
    allowed = bits.reshape(rows, -1)[:, :vocab] != 0
    return jnp.where(allowed | ~use_mask[:, None], logits, -jnp.inf)


def apply_bad_words(
    logits: jax.Array, bad_words: jax.Array, history: jax.Array, prompt_length: jax.Array, length: jax.Array
) -> jax.Array:
    """-inf for the last token of every banned sequence whose other tokens end the outputs.

    As in vLLM, what the prompt ends with begins no banned sequence: a word is bad when all of it is generated.

    Args:
        logits: f32[R, V].
        bad_words: i32[R, NW, LW], padded with -1 on the left.
        history: i32[R, L], prompt and outputs.
        prompt_length: i32[R], tokens of `history` that are prompt.
        length: i32[R], valid tokens of `history`.
    """
    vocab = logits.shape[1]
    prefix, last = bad_words[:, :, :-1], bad_words[:, :, -1]
    width = prefix.shape[2]
    offsets = length[:, None] - width + lax.iota(jnp.int32, width)
    tail = jnp.take_along_axis(history, jnp.maximum(offsets, 0), axis=1, mode="clip")
    tail = jnp.where(offsets >= prompt_length[:, None], tail, -1)
    # Outputs shorter than the prefix have -1 where the prefix has a token, which no token equals.
    matches = jnp.all((prefix < 0) | (prefix == tail[:, None, :]), axis=2)
    return logits.at[_row_index(last), _dropped_unless(matches, last, vocab)].set(-jnp.inf, mode="drop")


def apply_bias(logits: jax.Array, bias_ids: jax.Array, bias_values: jax.Array) -> jax.Array:
    """Add each bias to its token's logit.

    Args:
        logits: f32[R, V].
        bias_ids: i32[R, NB], distinct within a row; -1 = none.
        bias_values: f32[R, NB].
    """
    ids = _dropped_unless(bias_ids >= 0, bias_ids, logits.shape[1])
    return logits.at[_row_index(bias_ids), ids].add(bias_values, mode="drop")


def _row_index(per_row: jax.Array) -> jax.Array:
    return lax.iota(jnp.int32, per_row.shape[0])[:, None]


def _dropped_unless(keep: jax.Array, ids: jax.Array, vocab: int) -> jax.Array:
    """Ids with those not kept out of range; a negative id would count from the end."""
    return jnp.where(keep & (ids >= 0), ids, vocab)
