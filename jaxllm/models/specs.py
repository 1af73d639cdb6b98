"""The weights of each kind of model: Hugging Face's tensor names, what their axes count, what is fused and stacked."""
# A tree of specs has the form of `Params`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jaxllm.layers.weight import Axis, Part, Rows, WeightSpec
from jaxllm.models.bert import BertConfig, BertLayers, BertParams
from jaxllm.models.decoder import DecoderConfig, Layers, Params
from jaxllm.models.mla import latent_specs

#: a bias before training
ZERO, ONE = 0.0, 1.0


def decoder_specs(c: DecoderConfig) -> Params:
    """A `Params` tree of `WeightSpec`s, the layers in one segment. Matrices are [out, in], as checkpoints have them."""
    names, layers = c.names, range(c.num_layers)
    prefix = f"{names.prefix}{names.layer}"
    d, vocab, mlp = Axis("embed", c.hidden_size), Axis("vocab", c.vocab_size), Axis("mlp", c.intermediate_size)
    heads, kv_heads = Axis("heads", c.num_heads, c.head_dim), Axis("kv_heads", c.num_kv_heads, c.head_dim)
    qkv, gate_up = (heads, kv_heads, kv_heads), (mlp, mlp) if c.gated_mlp else (mlp,)
    one = ONE - c.norm_offset

    def joined(modules: tuple[str, ...], rows: Sequence[Axis], *columns: Axis, kind: str = "weight") -> WeightSpec:
        places: Sequence[Rows | None] = (None,) * len(rows)
        if len(modules) < len(rows):
            places = _shared_rows(rows, by_unit=modules is names.qkv and names.qkv_by_head)
            modules *= len(rows)
        parts = (
            Part(f"{prefix}{module}.{kind}", (axis, *columns), place)
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
    latents, values = None, heads
    if c.latents is not None:
        values = Axis("heads", c.num_heads, c.latents.value_dim)
        latents = latent_specs(
            c.latents, prefix=prefix, layers=layers, hidden_size=c.hidden_size, num_heads=c.num_heads
        )
    segment = Layers(
        attention_norm=norm(c.pre_norms, names.attention_norm),
        attention_norm_bias=norm_bias(c.pre_norms, names.attention_norm),
        qkv=joined(names.qkv, qkv, d) if c.latents is None else None,
        qkv_bias=bias(c.qkv_bias, names.qkv, *qkv),
        query_norm=head_norm(names.query_norm, heads),
        key_norm=head_norm(names.key_norm, kv_heads),
        output=joined((names.output,), (d,), values),
        output_bias=bias(c.output_bias, (names.output,), d),
        post_attention_norm=norm(c.post_norms, names.post_attention_norm),
        mlp_norm=norm(two_norms, names.mlp_norm),
        mlp_norm_bias=norm_bias(two_norms, names.mlp_norm),
        gate_up=joined(names.gate_up, gate_up, d),
        gate_up_bias=bias(c.mlp_bias, names.gate_up, *gate_up),
        down=joined((names.down,), (d,), mlp),
        down_bias=bias(c.mlp_bias, (names.down,), d),
        post_mlp_norm=norm(c.post_norms, names.post_mlp_norm),
        latents=latents,
    )
    last = f"{names.prefix}{names.norm}"
    return Params(
        embedding=WeightSpec(parts=(Part(f"{names.prefix}{names.embedding}.weight", (vocab, d)),)),
        layers=(segment,),
        norm=WeightSpec(parts=(Part(f"{last}.weight", (d,)),), init=one),
        norm_bias=WeightSpec(parts=(Part(f"{last}.bias", (d,)),), init=ZERO) if c.norm_bias else None,
        head=None if c.tie_word_embeddings else WeightSpec(parts=(Part(f"{names.head}.weight", (vocab, d)),)),
    )


def _shared_rows(axes: Sequence[Axis], *, by_unit: bool) -> list[Rows]:
    """Where the parts of a tensor lie that has them one below the other; or, by unit, the first one's first unit, the
    second one's first unit and so on, then all second units.
    """
    total, step = sum(axis.size for axis in axes), sum(axis.width for axis in axes)
    firsts = itertools.accumulate((axis.width if by_unit else axis.size for axis in axes), initial=0)
    return [Rows(first, step if by_unit else axis.width, total) for first, axis in zip(firsts, axes, strict=False)]


def bert_specs(c: BertConfig) -> BertParams:
    """A `BertParams` tree of `WeightSpec`s, the layers in one segment."""
    prefix, layers = "bert.encoder.layer.{layer}.", range(c.num_layers)
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
        return WeightSpec(parts=(Part(f"bert.embeddings.{name}", axes),), init=init)

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
    return BertParams(
        embedding=outside("word_embeddings.weight", vocab, d),
        position_embedding=outside("position_embeddings.weight", Axis("positions", c.max_position_embeddings), d),
        type_embedding=outside("token_type_embeddings.weight", Axis("types", c.type_vocab_size), d),
        embedding_norm=outside("LayerNorm.weight", d, init=ONE),
        embedding_norm_bias=outside("LayerNorm.bias", d, init=ZERO),
        layers=(segment,),
    )
