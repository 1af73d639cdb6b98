"""From a tower's features to vectors of the language model: Gemma 3's mean over neighbours, norm and matrix (Gemma Team
2025, arXiv:2503.19786), or LLaVA's two matrices (Liu et al. 2023, arXiv:2310.03744).
"""
# A tree of specs has the form of `Projector`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.layers.activation import activate
from jaxllm.layers.context import Context
from jaxllm.layers.linear import linear
from jaxllm.layers.norm import rms_norm
from jaxllm.layers.weight import Axis, Part, WeightSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Of one of the two kinds."""

    #: the language model's hidden size
    output_size: int
    #: of LLaVA's; None: it is Gemma's
    activation: str | None = None
    bias: bool = False
    #: of Gemma's: features of a square's side of which the mean is taken, and what its norm adds
    pooled_side: int = 1
    norm_eps: float = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projector:
    """f: numbers of a feature, d: the language model's hidden size."""

    norm: jax.Array | None  # [f], less 1
    #: Gemma's, as its checkpoints have it
    matrix: jax.Array | None  # [f, d]
    first: jax.Array | None  # [d, f]
    first_bias: jax.Array | None  # [d]
    second: jax.Array | None  # [d, d]
    second_bias: jax.Array | None  # [d]


def projector_specs(c: ProjectorConfig, feature_size: int) -> Projector:
    """A `Projector` tree of `WeightSpec`s."""
    f, d = Axis("feature", feature_size), Axis("embed", c.output_size)
    pools = c.activation is None

    def spec(there: bool, name: str, *axes: Axis, init: float | None = None) -> WeightSpec | None:
        return WeightSpec(parts=(Part(f"multi_modal_projector.{name}", axes),), init=init) if there else None

    return Projector(
        norm=spec(pools, "mm_soft_emb_norm.weight", f, init=0.0),
        matrix=spec(pools, "mm_input_projection_weight", f, d),
        first=spec(not pools, "linear_1.weight", d, f),
        first_bias=spec(not pools and c.bias, "linear_1.bias", d, init=0.0),
        second=spec(not pools, "linear_2.weight", d, d),
        second_bias=spec(not pools and c.bias, "linear_2.bias", d, init=0.0),
    )


def project(context: Context, config: ProjectorConfig, params: Projector, features: jax.Array) -> jax.Array:
    """[N, f] features, those of a square one after the other, as [N / `pooled_side` ** 2, d]."""
    if params.matrix is not None and params.norm is not None:
        squares = features.reshape(-1, config.pooled_side**2, features.shape[-1])
        pooled = jnp.mean(squares.astype(jnp.float32), axis=1).astype(features.dtype)
        return linear(context, rms_norm(pooled, params.norm, config.norm_eps, offset=1.0), params.matrix.T)
    assert config.activation is not None and params.first is not None and params.second is not None
    x = activate(config.activation, linear(context, features, params.first, params.first_bias))
    return linear(context, x, params.second, params.second_bias)
