"""From hidden states to embeddings and classes: the head of a pooling model."""
# Trees of sources have the form of the params, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.api.pooler import Pooler
from jaxllm.layers.context import Context
from jaxllm.layers.linear import linear_f32
from jaxllm.models.bert import BertConfig
from jaxllm.models.model import ModelConfig, ModelParams, body_sources
from jaxllm.models.sources import Part, Source, separate_sources


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """Weights of a classification head. C classes, d hidden size."""

    dense: jax.Array | None  # [d, d]
    dense_bias: jax.Array | None  # [d]
    classifier: jax.Array  # [C, d]
    classifier_bias: jax.Array | None  # [C]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PoolingModel:
    """Weights of a pooling model."""

    body: ModelParams
    head: Head | None  # None: embeddings


def pooling_sources(config: ModelConfig, pooler: Pooler, *, stacked: bool = True) -> PoolingModel:
    """A `PoolingModel` tree of `Source`s, with stacked layers or separate ones (`models.layer_stack`)."""
    body = body_sources(config)
    if not stacked:
        body = separate_sources(body, config.num_layers)
    if not pooler.num_labels:
        return PoolingModel(body=body, head=None)
    d, labels = config.hidden_size, pooler.num_labels
    if not isinstance(config, BertConfig):
        classifier = Source((Part("score.weight", labels),), None, d)
        return PoolingModel(body, Head(dense=None, dense_bias=None, classifier=classifier, classifier_bias=None))
    head = Head(
        dense=Source((Part("bert.pooler.dense.weight", d),), None, d),
        dense_bias=Source((Part("bert.pooler.dense.bias", d),), None, norm_offset=1.0),
        classifier=Source((Part("classifier.weight", labels),), None, d),
        classifier_bias=Source((Part("classifier.bias", labels),), None, norm_offset=1.0),
    )
    return PoolingModel(body, head)


def output_size(config: ModelConfig, pooler: Pooler) -> int:
    """Components of one result."""
    return pooler.num_labels or config.hidden_size


def finish(
    context: Context,
    pooler: Pooler,
    head: Head | None,
    pooled: jax.Array,
    dimensions: jax.Array,
    activate: jax.Array,
) -> jax.Array:
    """Results of pooled hidden states.

    Args:
        pooled: f32 [N, d].
        dimensions: i32 [N] leading components that count (embeddings only); the others become 0.
        activate: bool [N] whether to normalise (embeddings), or to make probabilities (classes).

    Returns:
        f32 [N, `output_size`].
    """
    if head is None:
        component = jnp.arange(pooled.shape[1], dtype=jnp.int32)
        x = jnp.where(component < dimensions[:, None], pooled, 0.0)
        length = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
        return jnp.where(activate[:, None], x / jnp.maximum(length, 1e-12), x)
    x = pooled
    if head.dense is not None:
        x = jnp.tanh(_linear(context, x, head.dense, head.dense_bias))
    x = (_linear(context, x, head.classifier, head.classifier_bias) - pooler.logit_mean) / pooler.logit_sigma
    return jnp.where(activate[:, None], _ACTIVATIONS[pooler.activation](x), x)


def _linear(context: Context, x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = linear_f32(context, x, weight.astype(jnp.float32))
    return y if bias is None else y + bias.astype(jnp.float32)


_ACTIVATIONS = {
    "identity": lambda x: x,
    "sigmoid": jax.nn.sigmoid,
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
}
