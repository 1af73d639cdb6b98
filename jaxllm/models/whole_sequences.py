"""A generating model as a plain function of whole sequences, for training: the layers that the engine runs, over
attention without pages. It can be differentiated, vectorised and compiled like any other function of JAX's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.config.cache import kv_cache_groups
from jaxllm.layers.context import Context, StepBatch
from jaxllm.layers.dense_attention import WholeSequences
from jaxllm.models import decoder
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Params


def logits(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Scores over the vocabulary at every token.

    Args:
        params: the model's weights, in any float dtype, which is what layers compute in.
        tokens: i32 [B, L], each row a sequence from its first token on. Rows that end earlier are filled up behind
            their end with any tokens: a causal model's scores depend on none that come later.

    Returns:
        float32 [B, L, vocabulary].
    """
    sequences, length = tokens.shape
    spec = config.kv_specs[0]
    cache = jnp.zeros((spec.parts, tokens.size, spec.heads, spec.width), params.dtype)
    batch = StepBatch(tokens=tokens.reshape(-1), attention=WholeSequences(sequences=sequences, length=length))
    groups = kv_cache_groups(config.kv_specs)
    _, hidden = decoder.forward(Context(), config, groups, params, cache, batch)
    return decoder.logits(Context(), config, params, hidden).reshape(sequences, length, -1)


def token_logprobs(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """The log-probability of every token of `tokens` [B, L] but the first, given those before it: float32 [B, L - 1].
    What an engine's prompt log-probabilities are, and the (negative) loss of training on next tokens.
    """
    scores = logits(config, params, tokens[:, :-1])
    found = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return found - jax.nn.logsumexp(scores, axis=-1)
