"""The dense decoder that the families share: layers of pre-norm attention and a gated MLP.

A family's file says, from a Hugging Face config, which of `DecoderConfig`'s choices it makes and what its weights are
called; what is here is the computation. It knows nothing of paging, the mesh or quantization: it calls `linear` and
`attention`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.config.cache import KVCacheGroup
from jaxllm.layers.activation import gated
from jaxllm.layers.attention import AttentionBatch, Layout, attention, write_kv
from jaxllm.layers.embedding import embed
from jaxllm.layers.linear import linear, linear_f32
from jaxllm.layers.norm import rms_norm
from jaxllm.layers.rope import apply_rope, rope_tables
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
    max_position_embeddings: int
    #: one tuple of inverse frequencies [head_dim // 2] a kind of rotary embedding
    rope_frequencies: tuple[tuple[float, ...], ...]
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
    #: whether a token sees only those before it; False: an embedding model made of a decoder
    causal: bool = True
    #: mesh axis over which heads, intermediate size and vocabulary are split, the numbers above (but the vocabulary's)
    #: being one device's; None: they are not
    split_over: str | None = None


class HasLayers(Protocol):
    """What the layers' places in the cache depend on."""

    @property
    def num_layers(self) -> int: ...
    @property
    def layer_window(self) -> tuple[int | None, ...]: ...


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
    config: DecoderConfig,
    groups: tuple[KVCacheGroup, ...],
    params: Params,
    tokens: jax.Array,
    cache: jax.Array,
    batch: AttentionBatch,
) -> tuple[jax.Array, jax.Array]:
    """One step through all layers.

    Args:
        groups: which layers share a block table; decides where in the cache a layer's pages are.
        tokens: i32 [T], within the vocabulary.
        cache: the KV cache of all layers (`layers.attention`); donate it.
        batch: where each token belongs.

    Returns:
        (cache, hidden): hidden [T, d] after the final norm.
    """
    frequencies = jnp.asarray(config.rope_frequencies, jnp.float32)
    cos, sin = jax.vmap(lambda f: rope_tables(batch.positions, f))(frequencies)
    x = embed(params.embedding, tokens, split_over=config.split_over)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)

    def layer(carry, weights, place):
        x, cache = carry
        layout, rope = place
        x, cache = _attention_block(config, weights, layout, cos[rope], sin[rope], x, cache, batch)
        return _mlp_block(config, weights, x, batch), cache

    places = layouts(config, groups, cache.shape[0]), np.asarray(config.layer_rope, np.int32)
    x, cache = through_layers(layer, (x, cache), params.layers, places)
    return cache, rms_norm(x, params.norm, config.norm_eps, offset=config.norm_offset)


def logits(config: DecoderConfig, params: Params, hidden: jax.Array, *, deterministic: bool = False) -> jax.Array:
    """Scores over the vocabulary, float32 [R, V], of hidden [R, d]. `deterministic`: see `linear_f32`."""
    head = params.embedding if params.head is None else params.head
    scores = linear_f32(hidden, head, deterministic=deterministic)
    if config.split_over is not None:
        # the last device's rows may go on behind the vocabulary
        scores = lax.all_gather(scores, config.split_over, axis=1, tiled=True)[:, : config.vocab_size]
    cap = config.logits_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def layouts(config: HasLayers, groups: tuple[KVCacheGroup, ...], pages: int) -> Layout:
    """Where each layer's keys and values are, numpy arrays [L]: the i-th layer of a group has pages ``i * num_blocks
    ...``.
    """
    num_blocks = pages // max(len(group.layers) for group in groups)
    group, offset = np.zeros((2, config.num_layers), np.int32)
    for g, members in enumerate(groups):
        for i, layer in enumerate(members.layers):
            group[layer], offset[layer] = g, i * num_blocks
    window = np.array([w or UNLIMITED for w in config.layer_window], np.int32)
    return Layout(group=group, page_offset=offset, window=window)  # pyright: ignore[reportArgumentType]


def _attention_block(config: DecoderConfig, w: Layers, layout: Layout, cos, sin, x, cache, batch: AttentionBatch):
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    normed = rms_norm(x, w.attention_norm, config.norm_eps, offset=config.norm_offset)
    deterministic = batch.backend.deterministic
    qkv = linear(normed, w.qkv, w.qkv_bias, deterministic=deterministic).reshape(-1, heads + 2 * kv_heads, dim)
    query, key, value = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
    if w.query_norm is not None and w.key_norm is not None:
        query = rms_norm(query, w.query_norm, config.norm_eps, offset=config.norm_offset)
        key = rms_norm(key, w.key_norm, config.norm_eps, offset=config.norm_offset)
    query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
    cache = write_kv(cache, key, value, layout, batch)
    attended = attention(
        query,
        cache,
        layout,
        batch,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        causal=config.causal,
    )
    attended = attended.reshape(-1, heads * dim)
    y = linear(attended, w.output, sum_over=config.split_over, deterministic=deterministic)
    if w.post_attention_norm is not None:
        y = rms_norm(y, w.post_attention_norm, config.norm_eps, offset=config.norm_offset)
    return x + y, cache


def _mlp_block(config: DecoderConfig, w: Layers, x: jax.Array, batch: AttentionBatch) -> jax.Array:
    normed = rms_norm(x, w.mlp_norm, config.norm_eps, offset=config.norm_offset)
    deterministic = batch.backend.deterministic
    y = gated(config.activation, linear(normed, w.gate_up, deterministic=deterministic))
    y = linear(y, w.down, sum_over=config.split_over, deterministic=deterministic)
    if w.post_mlp_norm is not None:
        y = rms_norm(y, w.post_mlp_norm, config.norm_eps, offset=config.norm_offset)
    return x + y


def attention_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)
