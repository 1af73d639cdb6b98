"""The dense decoder that the families share: layers of pre-norm attention and a gated MLP.

A family's file says, from a Hugging Face config, which of `DecoderConfig`'s choices it makes and what its weights are
called; what is here is the computation. It knows nothing of paging, the mesh or quantization: it calls `linear` and
`attention`, and hands on the `Context` that they look at.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.cache import KVCacheGroup, KVSpec
from jaxllm.layers.activation import gated
from jaxllm.layers.attention import Layout, attention, write_kv
from jaxllm.layers.context import Context, StepBatch
from jaxllm.layers.embedding import embed, unembed, with_embeddings
from jaxllm.layers.linear import linear
from jaxllm.layers.norm import rms_norm
from jaxllm.layers.rope import Rotary, apply_rope, rope_tables
from jaxllm.models.segments import through_layers

#: a window wider than any context
UNLIMITED = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shapes and choices of one model. Hashable: a compiled step is made for one of these."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    #: tokens of the longest context
    max_position_embeddings: int
    #: the kinds of rotary embedding
    rope: tuple[Rotary, ...]
    #: which of them each layer uses
    layer_rope: tuple[int, ...]
    #: sliding window of each layer, in tokens, itself included; None: all
    layer_window: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool = False
    #: RMS norm over each head of queries and keys
    qk_norm: bool = False
    #: norms after attention and MLP too (Gemma)
    post_norms: bool = False
    #: added to norm weights
    norm_offset: float = 0.0
    activation: str = "silu"
    embedding_scale: float = 1.0
    attention_scale: float
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    #: `max_model_len` unless one is asked for; None: `max_position_embeddings`
    default_length: int | None = None
    #: whether a token sees only those before it; False: an embedding model made of a decoder
    causal: bool = True

    @property
    def kv_specs(self) -> tuple[KVSpec, ...]:
        """What each layer keeps of a token."""
        return tuple(
            KVSpec(heads=self.num_kv_heads, width=self.head_dim, window=window) for window in self.layer_window
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layers:
    """Weights of a segment of layers, stacked on the first axis (`models.segments`), or of one layer, without it.

    L layers, d hidden size, H heads, K KV heads, D head_dim, F intermediate size.
    """

    attention_norm: jax.Array  # [L, d]
    qkv: jax.Array  # [L, (H + 2K) * D, d]
    qkv_bias: jax.Array | None  # [L, (H + 2K) * D]
    query_norm: jax.Array | None  # [L, D]
    key_norm: jax.Array | None  # [L, D]
    output: jax.Array  # [L, d, H * D]
    post_attention_norm: jax.Array | None  # [L, d]
    mlp_norm: jax.Array  # [L, d]
    gate_up: jax.Array  # [L, 2F, d]
    down: jax.Array  # [L, d, F]
    post_mlp_norm: jax.Array | None  # [L, d]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    embedding: jax.Array  # [V, d]
    layers: tuple[Layers, ...]  # segments
    norm: jax.Array  # [d]
    head: jax.Array | None  # [V, d]; None: the embedding


def forward(
    context: Context,
    config: DecoderConfig,
    groups: tuple[KVCacheGroup, ...],
    params: Params,
    cache: jax.Array,
    batch: StepBatch,
) -> tuple[jax.Array, jax.Array]:
    """One step through all layers.

    Args:
        context, config, groups: static. Where heads, the MLP and the vocabulary are split over devices, the config's
            numbers (but the vocabulary's) are one device's.
        groups: which layers share a block table; decides where in the cache a layer's pages are.
        cache: the KV cache of all layers (`layers.attention`); donate it.

    Returns:
        (cache, hidden): hidden [T, d] after the final norm.
    """
    cos, sin = rope_tables(batch.attention.positions, config.rope)
    x = embed(context, params.embedding, batch.tokens)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    x = with_embeddings(x, batch)

    def layer(carry, weights, place):
        x, cache = carry
        layout, rope = place
        x, cache = _attention_block(context, config, weights, layout, cos[rope], sin[rope], x, cache, batch)
        return _mlp_block(context, config, weights, x), cache

    places = layouts(config.kv_specs, groups, cache.shape[0]), np.asarray(config.layer_rope, np.int32)
    x, cache = through_layers(layer, (x, cache), params.layers, places)
    return cache, rms_norm(x, params.norm, config.norm_eps, offset=config.norm_offset)


def logits(context: Context, config: DecoderConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Scores over the vocabulary, float32 [R, V], of hidden [R, d]."""
    head = params.embedding if params.head is None else params.head
    scores = unembed(context, hidden, head, config.vocab_size)
    cap = config.logits_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def layouts(specs: tuple[KVSpec, ...], groups: tuple[KVCacheGroup, ...], pages: int) -> Layout:
    """Where each layer's keys and values are, numpy arrays [L]: the i-th layer of a group has pages ``i * num_blocks
    ...``.
    """
    num_blocks = pages // max(len(group.layers) for group in groups)
    group, offset = np.zeros((2, len(specs)), np.int32)
    for g, members in enumerate(groups):
        for i, layer in enumerate(members.layers):
            group[layer], offset[layer] = g, i * num_blocks
    window = np.array([spec.window or UNLIMITED for spec in specs], np.int32)
    return Layout(group=group, page_offset=offset, window=window)  # pyright: ignore[reportArgumentType]


def _attention_block(
    context: Context, config: DecoderConfig, w: Layers, layout: Layout, cos, sin, x, cache, batch: StepBatch
):
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    normed = rms_norm(x, w.attention_norm, config.norm_eps, offset=config.norm_offset)
    qkv = linear(context, normed, w.qkv, w.qkv_bias).reshape(-1, heads + 2 * kv_heads, dim)
    query, key, value = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
    if w.query_norm is not None and w.key_norm is not None:
        query = rms_norm(query, w.query_norm, config.norm_eps, offset=config.norm_offset)
        key = rms_norm(key, w.key_norm, config.norm_eps, offset=config.norm_offset)
    query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
    cache = write_kv(context, cache, key, value, layout, batch)
    attended = attention(
        context,
        query,
        cache,
        layout,
        batch,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        causal=config.causal,
    )
    y = linear(context, attended.reshape(-1, heads * dim), w.output, over="heads")
    if w.post_attention_norm is not None:
        y = rms_norm(y, w.post_attention_norm, config.norm_eps, offset=config.norm_offset)
    return x + y, cache


def _mlp_block(context: Context, config: DecoderConfig, w: Layers, x: jax.Array) -> jax.Array:
    normed = rms_norm(x, w.mlp_norm, config.norm_eps, offset=config.norm_offset)
    y = gated(config.activation, linear(context, normed, w.gate_up))
    y = linear(context, y, w.down, over="mlp")
    if w.post_mlp_norm is not None:
        y = rms_norm(y, w.post_mlp_norm, config.norm_eps, offset=config.norm_offset)
    return x + y


def attention_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)
