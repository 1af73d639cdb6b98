"""Which experts a token goes to, and how much each of them counts: one function for each rule, in float32 and in the
order of the reference implementations (transformers' modelling code), since a rounding can choose another expert.

Each takes the router's scores, float32 [T, E], and gives (weights float32 [T, k], experts i32 [T, k]).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fixed_order import row_sum

Routed = tuple[jax.Array, jax.Array]


def softmax_top_k(scores: jax.Array, k: int, *, renormalise: bool) -> Routed:
    """Mixtral (which renormalises), Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2: the k most likely experts."""
    return _renormalised(*lax.top_k(_softmax(scores), k), wanted=renormalise)


def grouped_softmax_top_k(scores: jax.Array, k: int, *, groups: int, top_groups: int, renormalise: bool) -> Routed:
    """DeepSeek-V2's `group_limited_greedy`: only of the groups with the likeliest experts."""
    likely = _softmax(scores)
    best = likely.reshape(len(likely), groups, -1).max(axis=-1)
    masked = jnp.where(_of_groups(best, top_groups, scores.shape[-1]), likely, 0.0)
    return _renormalised(*lax.top_k(masked, k), wanted=renormalise)


def top_k_softmax(scores: jax.Array, k: int) -> Routed:
    """GPT-OSS: the k highest scores, and a softmax over these alone."""
    highest, experts = lax.top_k(scores, k)
    return _softmax(highest), experts


def sigmoid_top_k(
    scores: jax.Array, correction: jax.Array, k: int, *, groups: int, top_groups: int, renormalise: bool
) -> Routed:
    """DeepSeek-V3: the bias helps to choose and does not count; a group is as good as its best two experts together
    (DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2).

    Args:
        correction: float32 [E], `e_score_correction_bias`.
    """
    likely = jax.nn.sigmoid(scores)
    choice = likely + correction.astype(jnp.float32)
    if groups > 1:
        best_two, _ = lax.top_k(choice.reshape(len(choice), groups, -1), 2)
        choice = jnp.where(_of_groups(row_sum(best_two)[..., 0], top_groups, scores.shape[-1]), choice, -jnp.inf)
    _, experts = lax.top_k(choice, k)
    weights = jnp.take_along_axis(likely, experts, axis=-1)
    return _renormalised(weights, experts, wanted=renormalise, least=1e-20)


def corrected_softmax_top_k(scores: jax.Array, correction: jax.Array, k: int) -> Routed:
    """ERNIE 4.5: as DeepSeek-V3, of a softmax and without groups; a token's weights are divided by their sum, which
    counts as 1e-12 at least (`moe_norm_min`).

    Args:
        correction: float32 [E] or [1, E].
    """
    likely = _softmax(scores)
    _, experts = lax.top_k(likely + correction.astype(jnp.float32), k)
    weights = jnp.take_along_axis(likely, experts, axis=-1)
    return weights / jnp.maximum(row_sum(weights), 1e-12), experts


def _softmax(scores: jax.Array) -> jax.Array:
    powers = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / row_sum(powers)


def _renormalised(weights: jax.Array, experts: jax.Array, *, wanted: bool, least: float = 0.0) -> Routed:
    return (weights / (row_sum(weights) + least) if wanted else weights), experts


def _of_groups(scores: jax.Array, top_groups: int, num_experts: int) -> jax.Array:
    """Which experts are of the groups with the highest scores [T, G]: bool [T, E]."""
    _, chosen = lax.top_k(scores, top_groups)
    groups = scores.shape[-1]
    own = (chosen[:, :, None] == jnp.arange(groups)).any(axis=1)
    return jnp.repeat(own, num_experts // groups, axis=-1)
