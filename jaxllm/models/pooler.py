"""From hidden states to embeddings and classes: the head of a pooling model."""
# Trees of specs have the form of the params, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.api.pooler import DenseModule, Pooler
from jaxllm.layers.activation import activate as activate_by_name
from jaxllm.layers.context import Context
from jaxllm.layers.linear import linear_f32
from jaxllm.layers.norm import layer_norm
from jaxllm.layers.weight import Axis, Part, WeightSpec
from jaxllm.models.model import ModelConfig, ModelParams, body_specs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """Weights of a classification head. C classes, d hidden size."""

    dense: jax.Array | None  # [d, d]
    dense_bias: jax.Array | None  # [d]
    norm: jax.Array | None  # [d]
    norm_bias: jax.Array | None  # [d]
    classifier: jax.Array  # [C, d]
    classifier_bias: jax.Array | None  # [C]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Weights of a `DenseModule`."""

    matrix: jax.Array  # [out, in]
    bias: jax.Array | None  # [out]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PoolingModel:
    """Weights of a pooling model."""

    body: ModelParams
    #: of classes; or what embeddings go through; None: embeddings that go through nothing
    head: Head | tuple[Dense, ...] | None


def pooling_specs(config: ModelConfig, pooler: Pooler) -> PoolingModel:
    """A `PoolingModel` tree of `WeightSpec`s, the layers in one segment."""
    body = body_specs(config)
    if not pooler.num_labels:
        return PoolingModel(body=body, head=tuple(map(_dense_spec, pooler.dense_modules)) or None)
    d, inner, labels = Axis("embed", config.hidden_size), Axis("pooled", config.hidden_size), pooler.num_labels

    def weight(name: str, *axes: Axis, init: float | None = None) -> WeightSpec:
        return WeightSpec(parts=(Part(name, axes),), init=init)

    names = config.classifier
    if names is None:
        score = weight("score.weight", Axis("labels", labels), d)
        head = Head(dense=None, dense_bias=None, norm=None, norm_bias=None, classifier=score, classifier_bias=None)
        return PoolingModel(body, head)
    head = Head(
        dense=weight(f"{names.dense}.weight", inner, d),
        dense_bias=weight(f"{names.dense}.bias", inner, init=0.0) if names.dense_bias else None,
        norm=weight(f"{names.norm}.weight", inner, init=1.0) if names.norm else None,
        norm_bias=weight(f"{names.norm}.bias", inner, init=0.0) if names.norm and names.norm_bias else None,
        classifier=weight(f"{names.classifier}.weight", Axis("labels", labels), inner),
        classifier_bias=weight(f"{names.classifier}.bias", Axis("labels", labels), init=0.0),
    )
    return PoolingModel(body, head)


def _dense_spec(module: DenseModule) -> Dense:
    rows = Axis("dense outputs", module.out_features)
    matrix = Part(f"{module.path}/linear.weight", (rows, Axis("dense inputs", module.in_features)))
    bias = WeightSpec(parts=(Part(f"{module.path}/linear.bias", (rows,)),), init=0.0)
    return Dense(matrix=WeightSpec(parts=(matrix,)), bias=bias if module.bias else None)


def output_size(config: ModelConfig, pooler: Pooler) -> int:
    """Components of one result."""
    return pooler.num_labels or embedding_size(config, pooler)


def embedding_size(config: ModelConfig, pooler: Pooler) -> int:
    """Components of an embedding, as whole as it comes."""
    return pooler.dense_modules[-1].out_features if pooler.dense_modules else config.hidden_size


def finish(
    context: Context,
    pooler: Pooler,
    head: Head | tuple[Dense, ...] | None,
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
    if not isinstance(head, Head):
        for module, dense in zip(pooler.dense_modules, head or (), strict=True):
            pooled = _linear(context, pooled, dense.matrix, dense.bias)
            pooled = jnp.tanh(pooled) if module.activation == "tanh" else pooled
        component = jnp.arange(pooled.shape[1], dtype=jnp.int32)
        x = jnp.where(component < dimensions[:, None], pooled, 0.0)
        length = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
        return jnp.where(activate[:, None], x / jnp.maximum(length, 1e-12), x)
    x = pooled
    if head.dense is not None:
        x = _linear(context, x, head.dense, head.dense_bias)
        x = jnp.tanh(x) if pooler.dense_activation == "tanh" else activate_by_name(pooler.dense_activation, x)
    if head.norm is not None:
        x = layer_norm(x, head.norm, head.norm_bias, pooler.norm_eps)
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
