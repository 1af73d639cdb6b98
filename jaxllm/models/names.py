"""What the families' checkpoints call their tensors, in transformers' spelling."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """The modules of sparse layers, of a layer as those of `WeightNames`."""

    #: of all that follows
    module: str = "mlp"
    router: str = "gate"
    #: what helps the router to choose, a tensor
    correction: str = "gate.e_score_correction_bias"
    #: what transformers 5 calls these where it saves them in a form of its own
    new_module: str = "mlp"
    new_router: str = "gate"
    new_correction: str = "gate.e_score_correction_bias"
    #: whether that tensor has an axis of one in front
    correction_is_row: bool = False
    #: whether a layer's experts are stacked at all times: [in, out], gate and up in turn, with biases
    stacked: bool = False
    #: or so: the tensors of gate and up, one below the other, and of down, [out, in]; None: they are not
    joined: tuple[str, str] | None = None
    #: else of each expert, ``experts.{expert}.``; transformers 5 has those of a layer stacked, under names of its own
    gate_up: tuple[str, str] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    #: of the shared MLP; None: `module`
    shared_module: str | None = None
    shared_gate_up: tuple[str, ...] = ("shared_experts.gate_proj", "shared_experts.up_proj")
    shared_down: str = "shared_experts.down_proj"
    shared_gate: str = "shared_expert_gate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierNames:
    """The layers of an encoder's classification head, and what is between them. In front of all of these names is
    nothing.
    """

    dense: str
    classifier: str
    #: behind the dense layer
    activation: str = "tanh"
    #: a LayerNorm behind that; None: there is none
    norm: str | None = None
    #: whether the dense layer and the norm have biases
    dense_bias: bool = True
    norm_bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightNames:
    """The modules of one family, ``.weight`` and ``.bias`` left out; as most families have them where nothing is said.

    Several projections under one name are a single tensor.
    """

    #: in front of all but the head
    prefix: str = "model."
    #: of a layer, behind the prefix
    layer: str = "layers.{layer}."
    embedding: str = "embed_tokens"
    position_embedding: str = "embed_positions"
    embedding_norm: str = "embedding_norm"
    norm: str = "norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    #: whether the layers' matrices are [in, out] there, as those of transformers' Conv1D
    transposed: bool = False
    #: whether the rows of one tensor are each KV head's queries, key and value in turn, not all queries first
    qkv_by_head: bool = False
    #: with ``{head}``: each head's weights are a tensor of their own
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    output: str = "self_attn.o_proj"
    post_attention_norm: str = "post_attention_layernorm"
    # the "post attention" norm of Llama and most others is the one in front of the MLP
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    #: of its numbers, where it has some
    activation: str = "mlp.act_fn"
    post_mlp_norm: str = "post_feedforward_layernorm"
    moe: ExpertNames = ExpertNames()
