"""The weights of a decoder, as a pytree: layers in segments, and what stands in front of them and behind."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.layers.adapter_tables import AdapterTables
from jaxllm.layers.mla import LatentWeights
from jaxllm.layers.moe import SparseMLP
from jaxllm.models.vision import VisionParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layers:
    """Weights of a segment of layers, stacked on the first axis (`models.segments`), or of one layer, without it.

    L layers, d hidden size, H heads, K KV heads, D head_dim, F intermediate size.
    """

    attention_norm: jax.Array | None  # [L, d]
    attention_norm_bias: jax.Array | None  # [L, d]
    qkv: jax.Array | None  # [L, (H + 2K) * D, d]; None: there are latents
    qkv_bias: jax.Array | None  # [L, (H + 2K) * D]
    query_norm: jax.Array | None  # [L, D]; own: [L, H, D] or [L, H * D]; joint: [L, H * D]
    key_norm: jax.Array | None  # as query_norm, of K heads
    sinks: jax.Array | None  # [L, H]
    output: jax.Array  # [L, d, H * D]; of latents, D numbers of a value
    output_bias: jax.Array | None  # [L, d]
    post_attention_norm: jax.Array | None  # [L, d]
    mlp_norm: jax.Array | None  # [L, d]
    mlp_norm_bias: jax.Array | None  # [L, d]
    gate_up: jax.Array | None  # [L, 2F, d]; without a gate [L, F, d]; None: there are experts
    gate_up_bias: jax.Array | None  # [L, 2F]; without a gate [L, F]
    down: jax.Array | None  # [L, d, F]
    down_bias: jax.Array | None  # [L, d]
    post_mlp_norm: jax.Array | None  # [L, d]
    #: [L, 4], the numbers of `layers.activation.xielu`; None: the activation has none
    activation: jax.Array | None = None
    #: in place of gate_up and down; None: the layers have these
    sparse: SparseMLP | None = None
    #: in place of qkv; None: the layers have that
    latents: LatentWeights | None = None


#: the fields of `Layers` that `linear` multiplies by
MATRICES = ("qkv", "output", "gate_up", "down")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joint:
    """Weights that make one vector of a token's embedding and of a hidden state of the model that it drafts for
    (`models.draft_head`). h: numbers of that hidden state.
    """

    matrix: jax.Array  # [d, h], of the hidden state alone, or [d, d + h], of both
    bias: jax.Array | None  # [d]
    embedding_norm: jax.Array | None  # [d]
    hidden_norm: jax.Array | None  # [d]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    embedding: jax.Array  # [V, d]; None in a pipeline stage that has none
    layers: tuple[Layers, ...]  # segments
    norm: jax.Array | None  # [d]; None: another pipeline stage has it
    norm_bias: jax.Array | None  # [d]
    head: jax.Array | None  # [V, d]; None: the embedding, or a pipeline stage without one
    #: [P, d]; None: positions are not learned, or another pipeline stage has them
    position_embedding: jax.Array | None = None
    #: [d], behind the embeddings; None: there is none, or another pipeline stage has it
    embedding_norm: jax.Array | None = None
    embedding_norm_bias: jax.Array | None = None
    #: of a smaller model that makes drafts, or of layers behind this one that do, in the runner alone
    draft: Params | None = None
    #: of such layers; None: the model reads tokens alone
    joint: Joint | None = None
    #: i32 [V], of a head over some tokens: what is added to a row's number; None: row i is token i
    token_offsets: jax.Array | None = None
    #: [V], on every device; None: scores have none, or another pipeline stage has it
    head_bias: jax.Array | None = None
    #: of the tower that sees pictures
    vision: VisionParams | None = None
    #: of adapters, in programs that have them
    tables: AdapterTables | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """What layers compute in: that of norms, which are never quantized."""
        names = ("attention_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")
        norms = (getattr(layer, name) for layer in self.layers for name in names)
        found: Any = next((norm for norm in norms if norm is not None), self.embedding)
        return found.dtype


def without_draft(params: Any) -> Any:
    """A model's weights as users know them, without those of the model that drafts for it."""
    has_draft = isinstance(params, Params) and params.draft is not None
    return dataclasses.replace(params, draft=None) if has_draft else params


def draft_params(params: Params) -> Params | None:
    """The weights of what drafts for a model; layers behind it have the model's tables where they have none."""
    draft = params.draft
    if draft is None or draft.joint is None:
        return draft
    head = params.embedding if params.head is None else params.head
    return dataclasses.replace(
        draft,
        embedding=params.embedding if draft.embedding is None else draft.embedding,
        head=head if draft.head is None else draft.head,
        head_bias=params.head_bias if draft.head is None else draft.head_bias,
    )
