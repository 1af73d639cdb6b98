"""The weights of each kind of model: Hugging Face's tensor names, what their axes count, what is fused and stacked."""
# A tree of specs has the form of `Params`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from jaxllm.layers.activation import XIELU
from jaxllm.layers.moe import Experts, MoEConfig, SparseMLP
from jaxllm.layers.weight import Axis, Part, Rows, WeightSpec
from jaxllm.models.bert import BertConfig, BertLayers, BertParams
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.mla import latent_specs
from jaxllm.models.names import ExpertNames
from jaxllm.models.params import Layers, Params
from jaxllm.models.vision import vision_specs

#: a bias before training
ZERO, ONE = 0.0, 1.0


def decoder_specs(c: DecoderConfig) -> Params:
    """A `Params` tree of `WeightSpec`s, a segment for each run of equal layers. Matrices are [out, in], as checkpoints
    have them.
    """
    names, d, vocab = c.names, Axis("embed", c.hidden_size), Axis("vocab", c.vocab_size)
    last, one = f"{names.prefix}{names.norm}", ONE - c.norm_offset
    segments, first = [], 0
    kinds = enumerate(c.layer_moe if c.moe else (False,) * c.num_layers)
    for (sparse, _), run in itertools.groupby(kinds, key=lambda kind: (kind[1], not c.first_norm and kind[0] == 0)):
        layers = range(first, first + len(list(run)))
        segments.append(_segment(c, layers, c.moe if sparse else None))
        first = layers.stop

    def outer_norm(kind: str, init: float) -> WeightSpec:
        return WeightSpec(parts=(Part(f"{names.prefix}{names.embedding_norm}.{kind}", (d,)),), init=init)

    return Params(
        embedding=WeightSpec(parts=(Part(f"{names.prefix}{names.embedding}.weight", (vocab, d)),)),
        position_embedding=_positions(c, d) if c.position_rows else None,
        embedding_norm=outer_norm("weight", one) if c.embedding_norm else None,
        embedding_norm_bias=outer_norm("bias", ZERO) if c.embedding_norm and c.norm_bias else None,
        layers=tuple(segments),
        norm=WeightSpec(parts=(Part(f"{last}.weight", (d,)),), init=one),
        norm_bias=WeightSpec(parts=(Part(f"{last}.bias", (d,)),), init=ZERO) if c.norm_bias else None,
        head=None if c.tie_word_embeddings else WeightSpec(parts=(Part(f"{names.head}.weight", (vocab, d)),)),
        head_bias=_head_bias(c) if c.head_bias else None,
        vision=None if c.vision is None else vision_specs(c.vision),
    )


def _positions(c: DecoderConfig, d: Axis) -> WeightSpec:
    name = f"{c.names.prefix}{c.names.position_embedding}.weight"
    return WeightSpec(parts=(Part(name, (Axis("positions", c.position_rows), d)),))


def _head_bias(c: DecoderConfig) -> WeightSpec:
    # small, and added to the scores of all tokens, so every device has it
    return WeightSpec(parts=(Part(f"{c.names.head}.bias", (Axis("whole vocab", c.vocab_size),)),), init=ZERO)


def _segment(c: DecoderConfig, layers: range, moe: MoEConfig | None) -> Layers:
    """Of some equal layers, which have experts if `moe` is given."""
    names = c.names
    prefix = f"{names.prefix}{names.layer}"
    d, mlp = Axis("embed", c.hidden_size), Axis("mlp", c.intermediate_size)
    heads, kv_heads = Axis("heads", c.num_heads, c.head_dim), Axis("kv_heads", c.num_kv_heads, c.head_dim)
    qkv, gate_up = (heads, kv_heads, kv_heads), (mlp, mlp) if c.gated_mlp else (mlp,)
    one = ONE - c.norm_offset

    def joined(modules: tuple[str, ...], rows: Sequence[Axis], *columns: Axis, kind: str = "weight") -> WeightSpec:
        places: Sequence[Rows | None] = (None,) * len(rows)
        if len(modules) < len(rows):
            places = _shared_rows(rows, by_unit=modules is names.qkv and names.qkv_by_head)
            modules *= len(rows)
        parts = (
            Part(f"{prefix}{module}.{kind}", (axis, *columns), place, names.transposed and len(columns) > 0)
            for module, axis, place in zip(modules, rows, places, strict=True)
        )
        return WeightSpec(parts=tuple(parts), layers=layers)

    def bias(has: bool, modules: tuple[str, ...], *rows: Axis) -> WeightSpec | None:
        return joined(modules, rows, kind="bias") if has else None

    def norm(has: bool, module: str, *axes: Axis) -> WeightSpec | None:
        part = Part(f"{prefix}{module}.weight", axes or (d,))
        return WeightSpec(parts=(part,), layers=layers, init=one) if has else None

    def norm_bias(has: bool, module: str) -> WeightSpec | None:
        part = Part(f"{prefix}{module}.bias", (d,))
        return WeightSpec(parts=(part,), layers=layers, init=ZERO) if has and c.norm_bias else None

    def head_norm(module: str, axis: Axis) -> WeightSpec | None:
        if c.qk_norm and "{head}" in module:
            each = Axis("head_dim", c.head_dim)
            parts = (Part(f"{prefix}{module.replace('{head}', str(i))}.weight", (each,)) for i in range(axis.units))
            return WeightSpec(parts=tuple(parts), layers=layers, init=one)
        own = (Axis(axis.name, axis.units), Axis("head_dim", c.head_dim))
        axes = {"shared": own[1:], "own": own, "joint": (axis,)}[c.qk_norm_of]
        return norm(c.qk_norm, module, *axes)

    two_norms = c.pre_norms and not c.shared_norm
    first_norm = c.pre_norms and (c.first_norm or layers[0] > 0)
    sinks = WeightSpec(parts=(Part(f"{prefix}{names.sinks}", (Axis("heads", c.num_heads),)),), layers=layers)
    numbers = (
        Part(f"{prefix}{names.activation}.{name}", (Axis("numbers", 1),), scalar=name in ("beta", "eps"))
        for name in ("alpha_p", "alpha_n", "beta", "eps")
    )
    activation = WeightSpec(parts=tuple(numbers), layers=layers, init=0.5)
    latents, values = None, heads
    if c.latents is not None:
        values = Axis("heads", c.num_heads, c.latents.value_dim)
        latents = latent_specs(
            c.latents, prefix=prefix, layers=layers, hidden_size=c.hidden_size, num_heads=c.num_heads
        )
    return Layers(
        attention_norm=norm(first_norm, names.attention_norm),
        attention_norm_bias=norm_bias(first_norm, names.attention_norm),
        qkv=joined(names.qkv, qkv, d) if c.latents is None else None,
        qkv_bias=bias(c.qkv_bias, names.qkv, *qkv),
        query_norm=head_norm(names.query_norm, heads),
        key_norm=head_norm(names.key_norm, kv_heads),
        sinks=sinks if c.attention_sinks else None,
        output=joined((names.output,), (d,), values),
        output_bias=bias(c.output_bias, (names.output,), d),
        post_attention_norm=norm(c.post_norms, names.post_attention_norm),
        mlp_norm=norm(two_norms, names.mlp_norm),
        mlp_norm_bias=norm_bias(two_norms, names.mlp_norm),
        gate_up=joined(names.gate_up, gate_up, d) if moe is None else None,
        gate_up_bias=bias(c.mlp_bias and moe is None, names.gate_up, *gate_up),
        down=joined((names.down,), (d,), mlp) if moe is None else None,
        down_bias=bias(c.mlp_bias and moe is None, (names.down,), d),
        post_mlp_norm=norm(c.post_norms, names.post_mlp_norm),
        activation=activation if c.activation == XIELU and moe is None else None,
        sparse=None if moe is None else sparse_specs(moe, names.moe, prefix, layers, d),
        latents=latents,
    )


def sparse_specs(moe: MoEConfig, names: ExpertNames, prefix: str, layers: range, d: Axis) -> SparseMLP:
    """Of the experts of some layers, and what belongs to them.

    Args:
        prefix: of a layer's tensors, with ``{layer}``.
        d: the hidden size.
    """
    experts = Axis("experts" if moe.expert_parallel else "whole experts", moe.num_experts)
    own = Axis("whole mlp" if moe.expert_parallel else "mlp", moe.intermediate_size)
    shared = Axis("mlp", moe.shared_size)
    new = f"{prefix}{names.new_module}."

    def spec(*parts: Part, experts: Axis | None = None, **fields: Any) -> WeightSpec:
        return WeightSpec(parts=parts, layers=layers, experts=experts, **fields)

    def plain(module: str, *axes: Axis) -> Part:
        return Part(f"{prefix}{names.module}.{module}.weight", axes)

    def of_shared(module: str, *axes: Axis, rows: Rows | None = None) -> Part:
        return Part(f"{prefix}{names.shared_module or names.module}.{module}.weight", axes, rows)

    def joined(tensor: str, stacked: str, *axes: Axis, rows: Rows | None = None) -> Part:
        other = Part(f"{new}experts.{stacked}", axes, rows)
        return Part(f"{prefix}{names.module}.{tensor}", axes, rows, alternative=other)

    def of_each(module: str, stacked: str, *axes: Axis, rows: Rows | None = None) -> Part:
        other = Part(f"{new}experts.{stacked}", axes, rows)
        return Part(f"{prefix}{names.module}.experts.{{expert}}.{module}.weight", axes, alternative=other)

    def of_all(module: str, other: str, *axes: Axis, rows: Rows | None = None) -> Part:
        # GGUF files have each expert's as other families do
        own = Part(f"{prefix}{names.module}.experts.{{expert}}.{other}", axes)
        return Part(f"{prefix}{names.module}.experts.{module}", axes, rows, len(axes) > 1, own)

    gate_up_bias = down_bias = None
    if names.stacked:
        places = list(zip(names.gate_up, _shared_rows((own, own), by_unit=True), strict=True))
        gate_up = spec(
            *(of_all("gate_up_proj", f"{name}.weight", own, d, rows=rows) for name, rows in places), experts=experts
        )
        down = spec(of_all("down_proj", f"{names.down}.weight", d, own), experts=experts)
        if moe.expert_bias:
            biases = (of_all("gate_up_proj_bias", f"{name}.bias", own, rows=rows) for name, rows in places)
            gate_up_bias = spec(*biases, experts=experts)
            down_bias = spec(of_all("down_proj_bias", f"{names.down}.bias", d), experts=experts)
    elif names.joined is not None:
        both, last = names.joined
        places = _shared_rows((own, own), by_unit=False)
        gate_up = spec(*(joined(both, "gate_up_proj", own, d, rows=rows) for rows in places), experts=experts)
        down = spec(joined(last, "down_proj", d, own), experts=experts)
    else:
        places = zip(names.gate_up, _shared_rows((own, own), by_unit=False), strict=True)
        gate_up = spec(*(of_each(name, "gate_up_proj", own, d, rows=rows) for name, rows in places), experts=experts)
        down = spec(of_each(names.down, "down_proj", d, own), experts=experts)
    has_shared, scored = moe.shared_size > 0, Axis("whole experts", moe.num_experts)
    router = dataclasses.replace(
        plain(names.router, scored, d), alternative=Part(f"{new}{names.new_router}.weight", (scored, d))
    )
    router_bias = Part(f"{prefix}{names.module}.{names.router}.bias", (scored,))
    row = (Axis("row", 1), scored) if names.correction_is_row else (scored,)
    correction = Part(
        f"{prefix}{names.module}.{names.correction}", row, alternative=Part(f"{new}{names.new_correction}", row)
    )
    shared_rows: Sequence[Rows | None] = (None, None)
    shared_gate_up = names.shared_gate_up
    if len(shared_gate_up) < len(shared_rows):
        shared_rows, shared_gate_up = _shared_rows((shared, shared), by_unit=False), shared_gate_up * 2
    shared_parts = (
        of_shared(name, shared, d, rows=rows) for name, rows in zip(shared_gate_up, shared_rows, strict=True)
    )
    return SparseMLP(
        router=spec(router, dtype="float32" if moe.float32_router else None),
        router_bias=spec(router_bias) if moe.router_bias else None,
        correction=spec(correction, init=ZERO, dtype="float32") if moe.has_correction else None,
        experts=Experts(gate_up=gate_up, gate_up_bias=gate_up_bias, down=down, down_bias=down_bias),
        shared_gate_up=spec(*shared_parts) if has_shared else None,
        shared_down=spec(of_shared(names.shared_down, d, shared)) if has_shared else None,
        shared_gate=spec(of_shared(names.shared_gate, Axis("gate", 1), d)) if moe.shared_gate else None,
    )


def _shared_rows(axes: Sequence[Axis], *, by_unit: bool) -> list[Rows]:
    """Where the parts of a tensor lie that has them one below the other; or, by unit, the first one's first unit, the
    second one's first unit and so on, then all second units. Of parts with more units than another as many lie next to
    each other as share one of that.
    """
    total, groups = sum(axis.size for axis in axes), min(axis.units for axis in axes) if by_unit else 1
    firsts = itertools.accumulate((axis.size // groups for axis in axes), initial=0)
    return [
        Rows(first, total // groups, total, axis.units // groups) for first, axis in zip(firsts, axes, strict=False)
    ]


def bert_specs(c: BertConfig) -> BertParams:
    """A `BertParams` tree of `WeightSpec`s, the layers in one segment."""
    prefix, layers = f"{c.prefix}encoder.layer.{{layer}}.", range(c.num_layers)
    d, vocab, mlp = Axis("embed", c.hidden_size), Axis("vocab", c.vocab_size), Axis("mlp", c.intermediate_size)
    heads = Axis("heads", c.num_heads, c.head_dim)

    def matrix(columns: Axis, rows: Axis, *names: str) -> WeightSpec:
        return WeightSpec(parts=tuple(Part(f"{prefix}{name}.weight", (rows, columns)) for name in names), layers=layers)

    def bias(rows: Axis, *names: str) -> WeightSpec:
        return WeightSpec(
            parts=tuple(Part(f"{prefix}{name}.bias", (rows,)) for name in names), layers=layers, init=ZERO
        )

    def norm(name: str) -> WeightSpec:
        return WeightSpec(parts=(Part(f"{prefix}{name}.weight", (d,)),), layers=layers, init=ONE)

    def outside(name: str, *axes: Axis, init: float | None = None) -> WeightSpec:
        return WeightSpec(parts=(Part(f"{c.prefix}embeddings.{name}", axes),), init=init)

    attention = ("attention.self.query", "attention.self.key", "attention.self.value")
    segment = BertLayers(
        qkv=matrix(d, heads, *attention),
        qkv_bias=bias(heads, *attention),
        output=matrix(heads, d, "attention.output.dense"),
        output_bias=bias(d, "attention.output.dense"),
        attention_norm=norm("attention.output.LayerNorm"),
        attention_norm_bias=bias(d, "attention.output.LayerNorm"),
        up=matrix(d, mlp, "intermediate.dense"),
        up_bias=bias(mlp, "intermediate.dense"),
        down=matrix(mlp, d, "output.dense"),
        down_bias=bias(d, "output.dense"),
        mlp_norm=norm("output.LayerNorm"),
        mlp_norm_bias=bias(d, "output.LayerNorm"),
    )
    positions = Axis("positions", c.first_position + c.max_position_embeddings)
    return BertParams(
        embedding=outside("word_embeddings.weight", vocab, d),
        position_embedding=outside("position_embeddings.weight", positions, d),
        type_embedding=outside("token_type_embeddings.weight", Axis("types", c.type_vocab_size), d),
        embedding_norm=outside("LayerNorm.weight", d, init=ONE),
        embedding_norm_bias=outside("LayerNorm.bias", d, init=ZERO),
        layers=(segment,),
    )
