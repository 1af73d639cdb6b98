"""Where each weight comes from: Hugging Face tensor names, fused, stacked by layer or each layer by itself."""
# A tree of sources has the form of `Params`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
from typing import TypeVar

from jaxllm.models.bert import BertConfig, BertLayers, BertParams
from jaxllm.models.decoder import DecoderConfig, Layers, Params
from jaxllm.models.layer_stack import separate


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint, [rows, ...]; `name` holds ``{layer}`` when there is one a layer."""

    name: str
    rows: int


@dataclasses.dataclass(frozen=True)
class Source:
    """One array of `Params`: its parts joined along their first axis, stacked over `layers` (None: not stacked)."""

    parts: tuple[Part, ...]
    layers: int | None
    columns: int | None = None
    #: norms start at one minus this in a randomly initialised model; None: a matrix, drawn at random
    norm_offset: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        leading = () if self.layers is None else (self.layers,)
        trailing = () if self.columns is None else (self.columns,)
        return (*leading, sum(part.rows for part in self.parts), *trailing)

    def tensors(self) -> list[tuple[str, Part]]:
        """Every tensor that this array is made of, by its name in the checkpoint."""
        layers = range(self.layers) if self.layers is not None else (0,)
        return [(part.name.format(layer=layer), part) for layer in layers for part in self.parts]

    def of_layer(self, layer: int) -> Source:
        """The part of one layer of what is stacked."""
        parts = tuple(Part(part.name.format(layer=layer), part.rows) for part in self.parts)
        return dataclasses.replace(self, parts=parts, layers=None)


Body = TypeVar("Body", Params, BertParams)


def separate_sources(sources: Body, num_layers: int) -> Body:
    """The sources of a model whose layers are separate (`models.layer_stack`), from those of stacked ones."""
    return dataclasses.replace(sources, layers=separate(sources.layers, num_layers, Source.of_layer))


def decoder_sources(c: DecoderConfig) -> Params:
    """A `Params` tree of `Source`s. Linear weights are [out, in], as checkpoints have them."""
    prefix, d = "model.layers.{layer}.", c.hidden_size
    query, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def matrix(columns: int, **rows: int) -> Source:
        parts = tuple(Part(f"{prefix}{name.replace('__', '.')}.weight", n) for name, n in rows.items())
        return Source(parts, c.num_layers, columns)

    def norm(name: str, size: int = d) -> Source:
        return Source((Part(f"{prefix}{name}.weight", size),), c.num_layers, norm_offset=c.norm_offset)

    bias = Source(
        tuple(Part(f"{prefix}self_attn.{n}_proj.bias", size) for n, size in (("q", query), ("k", kv), ("v", kv))),
        c.num_layers,
    )
    layers = Layers(
        attention_norm=norm("input_layernorm"),
        qkv=matrix(d, self_attn__q_proj=query, self_attn__k_proj=kv, self_attn__v_proj=kv),
        qkv_bias=bias if c.qkv_bias else None,
        query_norm=norm("self_attn.q_norm", c.head_dim) if c.qk_norm else None,
        key_norm=norm("self_attn.k_norm", c.head_dim) if c.qk_norm else None,
        output=matrix(query, self_attn__o_proj=d),
        # Llama's "post attention" norm is the one before the MLP; with norms on both sides the name means what it says
        post_attention_norm=norm("post_attention_layernorm") if c.post_norms else None,
        mlp_norm=norm("pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"),
        gate_up=matrix(d, mlp__gate_proj=c.intermediate_size, mlp__up_proj=c.intermediate_size),
        down=matrix(c.intermediate_size, mlp__down_proj=d),
        post_mlp_norm=norm("post_feedforward_layernorm") if c.post_norms else None,
    )
    return Params(
        embedding=Source((Part("model.embed_tokens.weight", c.vocab_size),), None, d),
        layers=layers,
        norm=Source((Part("model.norm.weight", d),), None, norm_offset=c.norm_offset),
        head=None if c.tie_word_embeddings else Source((Part("lm_head.weight", c.vocab_size),), None, d),
    )


def bert_sources(c: BertConfig) -> BertParams:
    """A `BertParams` tree of `Source`s."""
    prefix, d, f = "bert.encoder.layer.{layer}.", c.hidden_size, c.intermediate_size

    def matrix(columns: int, rows: int, *names: str) -> Source:
        return Source(tuple(Part(f"{prefix}{name}.weight", rows) for name in names), c.num_layers, columns)

    def bias(rows: int, *names: str) -> Source:
        return Source(tuple(Part(f"{prefix}{name}.bias", rows) for name in names), c.num_layers, norm_offset=1.0)

    def norm(name: str) -> Source:
        return Source((Part(f"{prefix}{name}.weight", d),), c.num_layers, norm_offset=0.0)

    def table(name: str, rows: int) -> Source:
        return Source((Part(f"bert.embeddings.{name}.weight", rows),), None, d)

    attention = ("attention.self.query", "attention.self.key", "attention.self.value")
    layers = BertLayers(
        qkv=matrix(d, d, *attention),
        qkv_bias=bias(d, *attention),
        output=matrix(d, d, "attention.output.dense"),
        output_bias=bias(d, "attention.output.dense"),
        attention_norm=norm("attention.output.LayerNorm"),
        attention_norm_bias=bias(d, "attention.output.LayerNorm"),
        up=matrix(d, f, "intermediate.dense"),
        up_bias=bias(f, "intermediate.dense"),
        down=matrix(f, d, "output.dense"),
        down_bias=bias(d, "output.dense"),
        mlp_norm=norm("output.LayerNorm"),
        mlp_norm_bias=bias(d, "output.LayerNorm"),
    )
    return BertParams(
        embedding=table("word_embeddings", c.vocab_size),
        position_embedding=table("position_embeddings", c.max_position_embeddings),
        type_embedding=table("token_type_embeddings", c.type_vocab_size),
        embedding_norm=Source((Part("bert.embeddings.LayerNorm.weight", d),), None, norm_offset=0.0),
        embedding_norm_bias=Source((Part("bert.embeddings.LayerNorm.bias", d),), None, norm_offset=1.0),
        layers=layers,
    )
