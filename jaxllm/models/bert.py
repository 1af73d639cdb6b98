"""BERT, an encoder: post-norm layers, learned positions, every token sees all of its sequence (Devlin et al. 2019,
arXiv:1810.04805).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.api.errors import ValidationError
from jaxllm.config.cache import KVCacheGroup, KVSpec
from jaxllm.layers.activation import ACTIVATIONS, activate
from jaxllm.layers.attention import Cache, Layout, attention, write_kv
from jaxllm.layers.context import Context, StepBatch
from jaxllm.layers.embedding import embed, with_embeddings
from jaxllm.layers.linear import linear
from jaxllm.layers.norm import layer_norm
from jaxllm.models.decoder import layouts
from jaxllm.models.decoder_config import attention_scale
from jaxllm.models.names import ClassifierNames
from jaxllm.models.segments import through_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Shapes and choices of one encoder. Hashable: a compiled step is made for one of these."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    type_vocab_size: int
    activation: str
    #: the row of `position_embedding` that a sequence's first token gets; those before it are nobody's
    first_position: int = 0
    #: what the checkpoint's tensors begin with
    prefix: str = "bert."
    classifier: ClassifierNames = ClassifierNames(dense="bert.pooler.dense", classifier="classifier")
    causal: bool = False

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def has_segments(self) -> bool:
        """Whether the second of two texts has a token type of its own."""
        return self.type_vocab_size > 1

    @property
    def kv_specs(self) -> tuple[KVSpec, ...]:
        """What each layer keeps of a token."""
        return (KVSpec(heads=self.num_kv_heads, width=self.head_dim),) * self.num_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BertLayers:
    """Weights of a segment of layers, stacked on the first axis (`models.segments`), or of one layer, without it.

    L layers, d hidden size, F intermediate size.
    """

    qkv: jax.Array  # [L, 3d, d]
    qkv_bias: jax.Array  # [L, 3d]
    output: jax.Array  # [L, d, d]
    output_bias: jax.Array  # [L, d]
    attention_norm: jax.Array  # [L, d]
    attention_norm_bias: jax.Array  # [L, d]
    up: jax.Array  # [L, F, d]
    up_bias: jax.Array  # [L, F]
    down: jax.Array  # [L, d, F]
    down_bias: jax.Array  # [L, d]
    mlp_norm: jax.Array  # [L, d]
    mlp_norm_bias: jax.Array  # [L, d]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BertParams:
    embedding: jax.Array  # [V, d]
    position_embedding: jax.Array  # [first_position + P, d]
    type_embedding: jax.Array  # [types, d]
    embedding_norm: jax.Array  # [d]
    embedding_norm_bias: jax.Array  # [d]
    layers: tuple[BertLayers, ...]  # segments

    @property
    def dtype(self) -> jnp.dtype:
        """What layers compute in."""
        return self.embedding_norm.dtype


def config_from_hf(hf: Mapping[str, Any]) -> BertConfig:
    """The model of a BERT config.json.

    Raises:
        KeyError: a field is missing.
        ValidationError: a field has a value that this encoder cannot compute.
    """
    activation = hf.get("hidden_act") or "gelu"
    if activation not in ACTIVATIONS:
        raise ValidationError(f"hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    kind = hf.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise ValidationError(f"position_embedding_type {kind!r} is not supported; supported: absolute")
    if hf.get("is_decoder"):
        raise ValidationError("is_decoder=true is not supported: such models run as encoders")
    if hf["hidden_size"] % hf["num_attention_heads"]:
        raise ValidationError(
            f"hidden_size={hf['hidden_size']} is not a multiple of num_attention_heads={hf['num_attention_heads']}"
        )
    return BertConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["hidden_size"] // hf["num_attention_heads"],
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        max_position_embeddings=hf["max_position_embeddings"],
        type_vocab_size=hf.get("type_vocab_size", 2),
        activation=activation,
    )


def forward(
    context: Context,
    config: BertConfig,
    groups: tuple[KVCacheGroup, ...],
    params: BertParams,
    cache: Cache,
    batch: StepBatch,
) -> tuple[Cache, jax.Array]:
    """One step through all layers, with the arguments and results of `decoder.forward`.

    Every sequence of the step must be in it from its first token to its last.
    """
    positions, types = batch.attention.positions, jnp.zeros_like(batch.tokens)
    if batch.segment_starts is not None:
        types = (positions >= batch.segment_starts[batch.attention.token_seq]).astype(jnp.int32)
    x = with_embeddings(embed(context, params.embedding, batch.tokens, params.dtype), batch)
    x = x + params.type_embedding[types] + params.position_embedding[positions + config.first_position]
    x = layer_norm(x, params.embedding_norm, params.embedding_norm_bias, config.norm_eps)

    def layer(carry, weights, layout):
        x, cache = carry
        x, cache = _attention_block(context, config, weights, layout, x, cache, batch)
        return _mlp_block(context, config, weights, x), cache

    x, cache = through_layers(layer, (x, cache), params.layers, layouts(config.kv_specs, groups, cache.shape[0]))
    return cache, x


def _attention_block(context: Context, config: BertConfig, w: BertLayers, layout: Layout, x, cache, batch: StepBatch):
    heads, dim = config.num_heads, config.head_dim
    query, key, value = jnp.split(linear(context, x, w.qkv, w.qkv_bias).reshape(-1, 3 * heads, dim), 3, axis=1)
    cache = write_kv(context, cache, key, value, layout, batch)
    attended = attention(context, query, cache, layout, batch, scale=attention_scale(dim), causal=False)
    y = linear(context, attended.reshape(-1, heads * dim), w.output, w.output_bias, over="heads")
    return layer_norm(x + y, w.attention_norm, w.attention_norm_bias, config.norm_eps), cache


def _mlp_block(context: Context, config: BertConfig, w: BertLayers, x: jax.Array) -> jax.Array:
    y = activate(config.activation, linear(context, x, w.up, w.up_bias))
    y = linear(context, y, w.down, w.down_bias, over="mlp")
    return layer_norm(x + y, w.mlp_norm, w.mlp_norm_bias, config.norm_eps)
