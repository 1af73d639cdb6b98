"""The dense decoder that the families share: layers of attention and an MLP, with norms in front of them or behind.

What is here is the computation. A family's file says, from a Hugging Face config, which of the choices of
`DecoderConfig` it makes and what its weights (`Params`) are called. Nothing here knows of paging, the mesh or
quantization: it calls `linear` and `attention`, and hands on the `Context` that they look at.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.config.cache import KVCacheGroup, KVSpec
from jaxllm.layers.activation import activate, xielu
from jaxllm.layers.attention import Cache, Layout, attention, write_kv
from jaxllm.layers.context import Context, StepBatch, exchanged
from jaxllm.layers.dense_attention import WholeSequences
from jaxllm.layers.embedding import embed, unembed, with_embeddings
from jaxllm.layers.linear import gated_linear, linear
from jaxllm.layers.mla import latent_branch
from jaxllm.layers.moe import sparse_mlp, tokens_of_experts
from jaxllm.layers.norm import joint_rms_norm, layer_norm, rms_norm
from jaxllm.layers.rope import apply_rope, rope_tables, sectioned_rope_tables
from jaxllm.layers.token_exchange import of_all_copies
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Layers, Params
from jaxllm.models.segments import through_layers

#: a window wider than any context
UNLIMITED = 2**30
#: the score of a token that a head has no row for
NEVER = -1e30


def forward(
    context: Context,
    config: DecoderConfig,
    groups: tuple[KVCacheGroup, ...],
    params: Params,
    cache: Cache,
    batch: StepBatch,
) -> tuple[Cache, jax.Array]:
    """One step through all layers.

    Args:
        context, config, groups: static. Where heads, the MLP and the vocabulary are split over devices, the config's
            numbers (but the vocabulary's) are one device's.
        groups: which layers share a block table; decides where in the cache a layer's pages are.
        cache: the KV cache of all layers (`layers.attention`); donate it.

    Returns:
        (cache, hidden): hidden [T, d] after the final norm, or before the layers of the next pipeline stage.
    """
    return forward_keeping(context, config, groups, params, cache, batch, counts=False)[:2]


def forward_keeping(
    context: Context,
    config: DecoderConfig,
    groups: tuple[KVCacheGroup, ...],
    params: Params,
    cache: Cache,
    batch: StepBatch,
    *,
    counts: bool,
    keeps: tuple[int, ...] = (),
) -> tuple[Cache, jax.Array, jax.Array | None, jax.Array | None]:
    """As `forward`, how many tokens each expert got, and what some layers take.

    Args:
        counts: static; whether tokens are counted.
        keeps: static; numbers of these layers.

    Returns:
        (cache, hidden, load, kept): load i32 [layers with experts, experts], padding left out; None without `counts`.
        kept [len(keeps), T, d], hidden states in front of each of the layers; None without `keeps`.
    """
    if batch.rope_positions is None:
        cos, sin = rope_tables(batch.attention.positions, config.rope)
    else:
        cos, sin = sectioned_rope_tables(batch.rope_positions, config.rope, config.rope_sections)
    x = embedded(context, config, params, batch) if batch.hidden is None else batch.hidden
    valid = own = None
    if config.moe is not None and not isinstance(batch.attention, WholeSequences):
        own = batch.attention.token_valid
        valid = of_all_copies(context, own)

    # the last place is for what nobody takes
    slots = sorted(set(keeps))
    slot_of_layer = np.full(config.num_layers, len(slots), np.int32)
    slot_of_layer[slots] = range(len(slots))

    def layer(carry, weights, place):
        x, cache, load, kept = carry
        layout, rope, number, slot = place
        if kept is not None:
            kept = lax.dynamic_update_index_in_dim(kept, x, slot, 0)
        normed = _norm(config, x, weights.attention_norm, weights.attention_norm_bias)
        turned = cos[rope], sin[rope]
        x, cache, chosen = decoder_layer(context, config, weights, layout, *turned, x, normed, cache, batch, valid)
        if load is not None and chosen is not None and config.moe is not None:
            load = load.at[number].add(tokens_of_experts(config.moe, chosen, own))
        return x, cache, load, kept

    load = numbers = None
    if counts:
        load = no_load(config)
        numbers = np.cumsum(config.layer_moe, dtype=np.int32) - 1
    layout = layouts(config.kv_specs, groups, cache.shape[0])
    places = layout, np.asarray(config.layer_rope, np.int32), numbers, slot_of_layer
    kept = jnp.zeros((len(slots) + 1, *x.shape), x.dtype) if keeps else None
    x, cache, load, kept = through_layers(layer, (x, cache, load, kept), params.layers, places)
    kept = None if kept is None else kept[np.asarray([slots.index(number) for number in keeps])]
    return cache, last_norm(config, params, x), load, kept


def decoder_layer(
    context: Context,
    config: DecoderConfig,
    weights: Layers,
    layout: Layout,
    cos: jax.Array,
    sin: jax.Array,
    x: jax.Array,
    normed: jax.Array,
    cache: Cache,
    batch: StepBatch,
    valid: jax.Array | None,
) -> tuple[jax.Array, Cache, jax.Array | None]:
    """One layer of hidden states x [T, d].

    Args:
        weights: of the layer.
        cos, sin: of the layer's rotary embedding.
        normed: what attention takes, x behind its norm.
        valid: as `sparse_mlp` takes it.

    Returns:
        (x, cache, chosen): the experts of each token; None where there are none.
    """
    y, cache = _attention_branch(context, config, weights, layout, cos, sin, normed, cache, batch)
    if not config.parallel:
        x = _add(config, x, y)
    if not config.shared_norm:
        normed = _norm(config, x, weights.mlp_norm, weights.mlp_norm_bias)
    z, chosen = _mlp_branch(context, config, weights, normed, valid)
    return _add(config, x, y + z if config.parallel else z), cache, chosen


def embedded(context: Context, config: DecoderConfig, params: Params, batch: StepBatch) -> jax.Array:
    """What the first layer takes, [T, d]."""
    x = embed(context, params.embedding, batch.tokens, params.dtype)
    if params.tables is not None:
        x = params.tables.embedded(context, batch.tokens, x)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    x = with_embeddings(x, batch)
    if params.position_embedding is not None:
        # padding and drafts that will not be kept may lie behind the table's end
        rows = batch.attention.positions + config.first_position
        x = x + params.position_embedding.at[rows].get(mode="clip")
    return _norm(config, x, params.embedding_norm, params.embedding_norm_bias)


def last_norm(config: DecoderConfig, params: Params, x: jax.Array) -> jax.Array:
    """What `logits` takes of what comes out of the last layer, [T, d]; as it is in a stage without the norm."""
    return _norm(config, x, params.norm, params.norm_bias)


def no_load(config: DecoderConfig) -> jax.Array:
    """Zeros, as `forward_keeping` counts."""
    assert config.moe is not None
    return jnp.zeros((sum(config.layer_moe), config.moe.num_experts), jnp.int32)


def logits(
    context: Context, config: DecoderConfig, params: Params, hidden: jax.Array, slots: jax.Array | None = None
) -> jax.Array:
    """Scores over the vocabulary, float32 [R, V], of hidden [R, d].

    Args:
        slots: i32 [R], of each row that of its adapter, which may have a head of its own; -1: it has none.
    """
    head, offsets = params.embedding if params.head is None else params.head, params.token_offsets
    scores = unembed(context, hidden, head, config.vocab_size if offsets is None else offsets.shape[0])
    if offsets is not None:
        token = jnp.arange(offsets.shape[0], dtype=jnp.int32) + offsets
        scores = jnp.full((scores.shape[0], config.vocab_size), NEVER).at[:, token].set(scores)
    if params.tables is not None and slots is not None:
        scores = params.tables.scores(context, hidden, slots, scores)
    if params.head_bias is not None:
        scores = scores + params.head_bias.astype(jnp.float32)
    if config.logits_scale != 1.0:
        scores = scores * config.logits_scale
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


def _attention_branch(
    context: Context, config: DecoderConfig, w: Layers, layout: Layout, cos, sin, x, cache, batch: StepBatch
):
    if w.latents is not None and config.latents is not None:
        attended, cache = latent_branch(
            context,
            config.latents,
            w.latents,
            layout,
            cos,
            sin,
            x,
            cache,
            batch,
            scale=config.attention_scale,
            interleaved=config.rope_interleaved,
        )
        return linear(context, attended, w.output, over="heads"), cache
    assert w.qkv is not None
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = linear(context, x, w.qkv, w.qkv_bias).reshape(-1, heads + 2 * kv_heads, dim)
    query, key, value = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
    if not config.qk_norm_behind_rope:
        query, key = _qk_norms(context, config, query, key, w.query_norm, w.key_norm)
    if config.qkv_clip is not None:
        query, key, value = (jnp.clip(x, -config.qkv_clip, config.qkv_clip) for x in (query, key, value))
    if config.turns:
        query, key = (apply_rope(x, cos, sin, interleaved=config.rope_interleaved) for x in (query, key))
    if config.qk_norm_behind_rope:
        query, key = _qk_norms(context, config, query, key, w.query_norm, w.key_norm)
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
        windows=any(config.layer_window),
        sinks=w.sinks,
    )
    y = linear(context, attended.reshape(-1, heads * dim), w.output, w.output_bias, over="heads")
    return _norm(config, y, w.post_attention_norm), cache


def _qk_norms(context: Context, config: DecoderConfig, query, key, query_weight, key_weight):
    """Of query [T, heads, head_dim] and key [T, kv_heads, head_dim]; as they are where the family has none."""
    if query_weight is None or key_weight is None:
        return query, key
    if config.qk_norm_of == "joint":
        flat = [x.reshape(len(x), -1) for x in (query, key)]
        axis = context.mesh_axis("heads")
        with exchanged("heads"):
            normed = joint_rms_norm(flat, (query_weight, key_weight), config.norm_eps, mesh_axis=axis)
        return tuple(x.reshape(like.shape) for x, like in zip(normed, (query, key), strict=True))
    if config.qk_norm_of == "own":
        query_weight, key_weight = (weight.reshape(-1, config.head_dim) for weight in (query_weight, key_weight))
    return _norm(config, query, query_weight), _norm(config, key, key_weight)


def _mlp_branch(
    context: Context, config: DecoderConfig, w: Layers, x: jax.Array, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """What it adds, and the experts of each token; None where there are none. `valid` as `sparse_mlp` takes it."""
    if w.sparse is not None and config.moe is not None:
        y, chosen = sparse_mlp(context, config.moe, config.activation, w.sparse, x, valid)
        return _norm(config, y, w.post_mlp_norm), chosen
    assert w.gate_up is not None and w.down is not None
    if config.gated_mlp and w.activation is None:
        y = gated_linear(context, x, w.gate_up, w.gate_up_bias, config.activation)
    else:
        y = linear(context, x, w.gate_up, w.gate_up_bias)
        y = activate(config.activation, y) if w.activation is None else xielu(y, w.activation)
    y = linear(context, y, w.down, w.down_bias, over="mlp")
    return _norm(config, y, w.post_mlp_norm), None


def _norm(config: DecoderConfig, x: jax.Array, weight: jax.Array | None, bias: jax.Array | None = None) -> jax.Array:
    """x as it is where the family has no norm."""
    if weight is None:
        return x
    if config.norm == "layer":
        return layer_norm(x, weight, bias, config.norm_eps, offset=config.norm_offset)
    return rms_norm(x, weight, config.norm_eps, offset=config.norm_offset)


def _add(config: DecoderConfig, x: jax.Array, y: jax.Array) -> jax.Array:
    """A branch's output to the hidden states."""
    if config.residual_scale != 1.0:
        y = (config.residual_scale * y.astype(jnp.float32)).astype(y.dtype)
    return x + y
