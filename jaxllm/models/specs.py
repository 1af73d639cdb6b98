"""The weights of each kind of model: Hugging Face's tensor names, what their axes count, what is fused and stacked."""
# A tree of specs has the form of `Params`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

from jaxllm.layers.weight import Axis, Part, WeightSpec
from jaxllm.models.bert import BertConfig, BertLayers, BertParams
from jaxllm.models.decoder import DecoderConfig, Layers, Params

#: a bias before training
ZERO, ONE = 0.0, 1.0


def decoder_specs(c: DecoderConfig) -> Params:
    """A `Params` tree of `WeightSpec`s, the layers in one segment. Matrices are [out, in], as checkpoints have them."""
    prefix, layers = "model.layers.{layer}.", range(c.num_layers)
    d, vocab, mlp = Axis("embed", c.hidden_size), Axis("vocab", c.vocab_size), Axis("mlp", c.intermediate_size)
    heads, kv_heads = Axis("heads", c.num_heads, c.head_dim), Axis("kv_heads", c.num_kv_heads, c.head_dim)
    qkv = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads, "self_attn.v_proj": kv_heads}
    one = ONE - c.norm_offset

    def matrix(columns: Axis, rows: dict[str, Axis]) -> WeightSpec:
        parts = tuple(Part(f"{prefix}{name}.weight", (axis, columns)) for name, axis in rows.items())
        return WeightSpec(parts=parts, layers=layers)

    def norm(name: str, axis: Axis = d) -> WeightSpec:
        return WeightSpec(parts=(Part(f"{prefix}{name}.weight", (axis,)),), layers=layers, init=one)

    bias = WeightSpec(parts=tuple(Part(f"{prefix}{name}.bias", (axis,)) for name, axis in qkv.items()), layers=layers)
    head_norm = Axis("head_dim", c.head_dim)
    segment = Layers(
        attention_norm=norm("input_layernorm"),
        qkv=matrix(d, qkv),
        qkv_bias=bias if c.qkv_bias else None,
        query_norm=norm("self_attn.q_norm", head_norm) if c.qk_norm else None,
        key_norm=norm("self_attn.k_norm", head_norm) if c.qk_norm else None,
        output=matrix(heads, {"self_attn.o_proj": d}),
        # Llama's "post attention" norm is the one before the MLP; with norms on both sides the name means what it says
        post_attention_norm=norm("post_attention_layernorm") if c.post_norms else None,
        mlp_norm=norm("pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"),
        gate_up=matrix(d, {"mlp.gate_proj": mlp, "mlp.up_proj": mlp}),
        down=matrix(mlp, {"mlp.down_proj": d}),
        post_mlp_norm=norm("post_feedforward_layernorm") if c.post_norms else None,
    )
    return Params(
        embedding=WeightSpec(parts=(Part("model.embed_tokens.weight", (vocab, d)),)),
        layers=(segment,),
        norm=WeightSpec(parts=(Part("model.norm.weight", (d,)),), init=one),
        head=None if c.tie_word_embeddings else WeightSpec(parts=(Part("lm_head.weight", (vocab, d)),)),
    )


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
