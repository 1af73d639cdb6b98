"""A mixture of experts in place of an MLP (Shazeer et al. 2017, arXiv:1701.06538): each token goes to the few experts
that a router chooses for it, and gets the sum of what they make of it.

A token's rows, one for each of its experts, are sorted by expert and multiplied by `grouped_matmul`, which reads the
weights of those experts only that have rows. No token is dropped, however uneven the choice. Padding has no rows.

With three tokens of which each goes to two of four experts,

    experts of the tokens   [2, 0] [2, 3] padding
    rows, in order          token 0 to 0    tokens 0, 1 to 2    token 1 to 3    padding, twice
    group sizes             1  0  2  1

Where the experts' intermediate size is split over devices, each has a part of every expert; where experts are spread
(`MoEConfig.expert_parallel`), each has some of them, and rows of others are padding to it. Either way the devices' sums
are added up.

Copies of the model that step together, each with tokens of its own, have the experts between them: tokens go to them
and come back (`layers.token_exchange`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.api.errors import ValidationError
from jaxllm.layers.activation import gated
from jaxllm.layers.context import Context, exchanged
from jaxllm.layers.linear import linear, linear_f32
from jaxllm.layers.routing import (
    Routed,
    corrected_softmax_top_k,
    grouped_softmax_top_k,
    sigmoid_top_k,
    softmax_top_k,
    top_k_softmax,
)
from jaxllm.layers.token_exchange import through_all_copies
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.quantized import Quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The sparse layers of one model."""

    num_experts: int
    #: experts of a token
    top_k: int
    #: of each expert
    intermediate_size: int
    #: "softmax" and "sigmoid" of all scores, or a softmax of the chosen ones' (`layers.routing`)
    routing: Literal["softmax", "sigmoid", "corrected softmax", "softmax of chosen"] = "softmax"
    #: whether a token's weights are divided by their sum
    renormalise: bool = False
    #: experts are chosen in the best `top_groups` of so many groups
    groups: int = 1
    top_groups: int = 1
    #: factor on what the experts add, not on the shared ones'
    scale: float = 1.0
    #: biases of the router and of the experts
    router_bias: bool = False
    expert_bias: bool = False
    #: whether the router's weights are float32 in any engine
    float32_router: bool = False
    #: of an MLP that all tokens go through, too; 0: there is none
    shared_size: int = 0
    #: whether that has a gate, the sigmoid of a score
    shared_gate: bool = False
    #: whether devices have experts as wholes, not a part of each
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        if self.top_k > self.num_experts:
            raise ValidationError(
                f"num_experts_per_tok={self.top_k} is more than the num_experts={self.num_experts} there are"
            )

    @property
    def has_correction(self) -> bool:
        """Whether a bias helps to choose experts, and does not count in their weights."""
        return self.routing in ("sigmoid", "corrected softmax")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """Experts of a segment of layers, stacked, or of one layer, without the first axis.

    A scan over layers keeps the stack whole and says which layer is meant: sliced, all of a layer's experts would be
    copied, also those that no token goes to. L layers, E experts, F intermediate size, d hidden size.
    """

    gate_up: jax.Array  # [L, E, 2F, d]
    gate_up_bias: jax.Array | None  # [L, E, 2F]
    down: jax.Array  # [L, E, d, F]
    down_bias: jax.Array | None  # [L, E, d]
    #: i32 [], of the stack; None: there is but one
    layer: jax.Array | None = None

    def of_layer(self, layer: jax.Array) -> Experts:
        return dataclasses.replace(self, layer=layer)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseMLP:
    """Weights of what stands in an MLP's place, stacked as `Experts`. S intermediate size of the shared MLP."""

    router: jax.Array  # [L, E, d]
    router_bias: jax.Array | None  # [L, E]
    #: float32 [L, E] or [L, 1, E], what is added to the scores to choose (`MoEConfig.has_correction`)
    correction: jax.Array | None
    experts: Experts
    shared_gate_up: jax.Array | None  # [L, 2S, d]
    shared_down: jax.Array | None  # [L, d, S]
    shared_gate: jax.Array | None  # [L, 1, d]


def sparse_mlp(
    context: Context,
    config: MoEConfig,
    activation: str,
    w: SparseMLP,
    x: jax.Array,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What a layer's experts add to the hidden states, [T, d] in x's dtype, of x [T, d]; and which experts each token
    goes to, i32 [T, k], padding too.

    Args:
        activation: a name of `layers.activation`.
        w: of one layer.
        valid: bool [T], which tokens are no padding; None: all. Padding goes to no expert. Of copies of the model that
            step together, that of all (`token_exchange.of_all_copies`).
    """

    def routed(rows: jax.Array) -> Routed:
        scores = linear_f32(context, rows.astype(jnp.float32) if config.float32_router else rows, w.router)
        if w.router_bias is not None:
            scores = scores + w.router_bias.astype(jnp.float32)
        return route(config, scores, w.correction)

    compute = functools.partial(through_experts, context, config, activation, w.experts)
    if context.mesh_axis("tokens") is None:
        weights, chosen = routed(x)
        y = compute(x, weights, chosen, valid)
    else:
        sizes = {"num_experts": config.num_experts, "top_k": config.top_k}
        y = through_all_copies(context, x, valid, **sizes, routed=routed, compute=compute)
        # of the copy's own tokens; nothing is computed for it where nobody asks
        _, chosen = routed(x)
    if w.shared_gate_up is not None and w.shared_down is not None:
        shared = linear_f32(context, gated(activation, linear(context, x, w.shared_gate_up)), w.shared_down)
        if w.shared_gate is not None:
            shared = jax.nn.sigmoid(linear_f32(context, x, w.shared_gate)) * shared
        y = y + shared
    y = y.astype(x.dtype)
    axis = context.mesh_axis("mlp")
    if axis is None:
        return y, chosen
    with exchanged("experts" if config.expert_parallel else "mlp"):
        return lax.psum(y, axis), chosen


def tokens_of_experts(config: MoEConfig, chosen: jax.Array, valid: jax.Array | None) -> jax.Array:
    """i32 [E]: how many tokens each expert gets, of what `sparse_mlp` has chosen."""
    experts = chosen if valid is None else jnp.where(valid[:, None], chosen, config.num_experts)
    return jnp.zeros(config.num_experts, jnp.int32).at[experts.reshape(-1)].add(1, mode="drop")


def route(config: MoEConfig, scores: jax.Array, correction: jax.Array | None) -> Routed:
    """The experts of every token, and their weights, of the router's scores, float32 [T, E] (`layers.routing`)."""
    k, groups = config.top_k, {"groups": config.groups, "top_groups": config.top_groups}
    if config.routing == "sigmoid":
        assert correction is not None
        weights, chosen = sigmoid_top_k(scores, correction, k, renormalise=config.renormalise, **groups)
    elif config.routing == "corrected softmax":
        assert correction is not None
        weights, chosen = corrected_softmax_top_k(scores, correction, k)
    elif config.routing == "softmax of chosen":
        weights, chosen = top_k_softmax(scores, k)
    elif config.groups > 1:
        weights, chosen = grouped_softmax_top_k(scores, k, renormalise=config.renormalise, **groups)
    else:
        weights, chosen = softmax_top_k(scores, k, renormalise=config.renormalise)
    return (weights if config.scale == 1.0 else weights * config.scale), chosen


def through_experts(
    context: Context,
    config: MoEConfig,
    activation: str,
    experts: Experts,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    valid: jax.Array | None,
) -> jax.Array:
    """float32 [T, d], the weighted sum of what each token's experts, as far as this device has them, make of it."""
    tokens, k = chosen.shape
    rows, held = tokens * k, experts.gate_up.shape[-3]
    first = 0
    if held != config.num_experts:
        first = lax.axis_index(context.mesh_axis("experts")) * held
    group = chosen - first
    mine = (group >= 0) & (group < held)
    if valid is not None:
        mine &= valid[:, None]
    group = jnp.where(mine, group, held).reshape(rows)
    # rows by their group, and in a group by their token: one sort of numbers that say both
    in_order = lax.sort(group * rows + jnp.arange(rows, dtype=jnp.int32))
    order, group = in_order % rows, in_order // rows
    sizes = jnp.sum(group[:, None] == jnp.arange(held), axis=0, dtype=jnp.int32)

    def product(x: jax.Array, w: jax.Array | Quantized) -> jax.Array:
        # in the mean, of rows of which each goes to an expert of some device
        mean = -(-rows // config.num_experts)
        return grouped_matmul(x, w, sizes, backend=context.backend, layer=experts.layer, mean_rows=mean)

    y = product(x[order // k], experts.gate_up)
    y = _with_bias(y, experts.gate_up_bias, experts.layer, group)
    y = product(gated(activation, y), experts.down)
    axis = None if config.expert_parallel else context.mesh_axis("mlp")
    if axis is None:
        y = _with_bias(y, experts.down_bias, experts.layer, group)
    else:  # of the devices' parts of a sum, one has the bias
        y = jnp.where(lax.axis_index(axis) == 0, _with_bias(y, experts.down_bias, experts.layer, group), y)
    # back to the tokens: a sum in the order of each token's experts, which depends on no other token
    place = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)
    each = y[place].reshape(tokens, k, -1).astype(jnp.float32) * jnp.where(mine, weights, 0.0)[:, :, None]
    return functools.reduce(jnp.add, (each[:, i] for i in range(k)))


def _with_bias(y: jax.Array, bias: jax.Array | None, layer: jax.Array | None, group: jax.Array) -> jax.Array:
    """Each row's own expert's bias added to y [M, N]; group: i32 [M], beyond the experts for padding."""
    if bias is None:
        return y
    own = bias if layer is None else lax.dynamic_index_in_dim(bias, layer, keepdims=False)
    return (y.astype(jnp.float32) + own[jnp.minimum(group, len(own) - 1)].astype(jnp.float32)).astype(y.dtype)
