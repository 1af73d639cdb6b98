"""Layers behind a model that predict the token after the next one, of the next token and of what the model knows in
front of it: EAGLE (Li et al. 2024, arXiv:2401.15077), EAGLE-3 (2025, arXiv:2503.01840), and the layers for predicting
several tokens of DeepSeek-V3 (2024, arXiv:2412.19437, section 2.2).

They take pairs: a token, and a hidden state of the token before it, the model's own or, further ahead, their own. So a
sequence's first token has none, and nobody sees its place in their cache. Positions are counted from the first pair.

    EAGLE      x = W [embedding; hidden]                     a layer without a norm in front of attention
    EAGLE-3    hidden = W [three of the model's layers]      a layer with attention of [norm(embedding); norm(hidden)]
    MTP        x = W [norm(embedding); norm(hidden)]         one layer as the model's last

EAGLE's heads may have more layers behind that one, which are as a model's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.cache import KVCacheGroup
from jaxllm.layers.attention import Cache
from jaxllm.layers.context import Context, StepBatch
from jaxllm.layers.embedding import embed, with_embeddings
from jaxllm.layers.linear import linear
from jaxllm.layers.norm import rms_norm
from jaxllm.layers.rope import rope_tables
from jaxllm.layers.token_exchange import of_all_copies
from jaxllm.layers.weight import Axis, Part, WeightSpec, is_spec
from jaxllm.models.decoder import decoder_layer, layouts
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Joint, Params
from jaxllm.models.segments import resegment, through_layers
from jaxllm.models.specs import decoder_specs
from pallas_kernels.batch import AttentionBatch

Kind = Literal["eagle", "eagle3", "mtp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftHead:
    """What such layers are, besides the layers themselves. Hashable, as `DecoderConfig`."""

    kind: Kind
    #: numbers of a hidden state that they take of the model; of EAGLE-3's, of each
    hidden_size: int
    #: of EAGLE-3: the model's layers whose inputs it takes; (): what the model has behind its last norm
    keeps: tuple[int, ...] = ()
    #: of EAGLE-3: the normed hidden state goes past attention, not the hidden state
    norm_before_residual: bool = False
    #: of EAGLE: whether its matrix has a bias
    bias: bool = False
    #: tables of its own; False: the model's
    own_embedding: bool = False
    own_head: bool = False
    #: tokens that it can draft; None: all
    num_tokens: int | None = None
    #: of tensors that belong to no layer, and the module of the matrix
    prefix: str = ""
    matrix: str = "fc"
    #: of MTP: the modules of the norms of a pair's embedding and hidden state
    norms: tuple[str, str] = ("enorm", "hnorm")
    #: of MTP: what the next pair takes of its own is behind the last norm
    hands_on_normed: bool = False


def head_specs(head: DraftHead, model: DecoderConfig) -> Params:
    """A `Params` tree of `WeightSpec`s, as `decoder_specs`.

    Args:
        model: its layers.
    """
    specs: Any = decoder_specs(model)
    if model.num_layers > 1:
        specs = resegment(specs, (1, model.num_layers - 1))
    first, *others = specs.layers
    d, hidden = Axis("embed", model.hidden_size), Axis("embed", head.hidden_size)
    prefix = f"{model.names.prefix}{model.names.layer}".format(layer=0)

    def norm(name: str) -> WeightSpec:
        return WeightSpec(parts=(Part(f"{name}.weight", (d,)),), init=1.0)

    columns = Axis("embed", len(head.keeps) * hidden.size if head.keeps else d.size + hidden.size)
    embedding_norm = hidden_norm = None
    if head.kind == "eagle3":
        hidden_norm = norm(f"{prefix}hidden_norm")
        specs = dataclasses.replace(specs, layers=(_of_two_inputs(first), *others))
    elif head.kind == "mtp":
        embedding_norm, hidden_norm = (norm(f"{head.prefix}{module}") for module in head.norms)
    else:
        first = dataclasses.replace(first, attention_norm=None)
        specs = dataclasses.replace(specs, layers=(first, *others), norm=None)
    joint = Joint(
        matrix=WeightSpec(parts=(Part(f"{head.prefix}{head.matrix}.weight", (d, columns)),)),  # pyright: ignore
        bias=WeightSpec(parts=(Part(f"{head.prefix}{head.matrix}.bias", (d,)),), init=0.0) if head.bias else None,  # pyright: ignore
        embedding_norm=embedding_norm,  # pyright: ignore[reportArgumentType]
        hidden_norm=hidden_norm,  # pyright: ignore[reportArgumentType]
    )
    offsets = scores = None
    if head.own_head:
        scores = specs.head
    if head.num_tokens is not None:
        rows = Axis("drafted tokens", head.num_tokens)
        offsets = WeightSpec(parts=(Part("d2t", (rows,)),), init=0, dtype="int32")
        scores = WeightSpec(parts=(Part(f"{model.names.head}.weight", (Axis("vocab", head.num_tokens), d)),))
    specs = dataclasses.replace(
        specs,
        embedding=specs.embedding if head.own_embedding else None,
        head=scores,
        joint=joint,
        token_offsets=offsets,
    )
    if head.kind != "eagle3":
        return specs
    return jax.tree.map(_as_speculators_names_it, specs, is_leaf=is_spec)


def _of_two_inputs(layer: Any) -> Any:
    """The specs of a layer whose queries, keys and values are made of an embedding and a hidden state."""

    def wider(part: Part) -> Part:
        rows, columns = part.axes
        return dataclasses.replace(part, axes=(rows, columns._replace(units=2 * columns.units)))

    qkv = dataclasses.replace(layer.qkv, parts=tuple(map(wider, layer.qkv.parts)))
    return dataclasses.replace(layer, qkv=qkv)


def _as_speculators_names_it(spec: WeightSpec) -> WeightSpec:
    def either(part: Part) -> Part:
        other = part.name.replace("midlayer.", "layers.0.")
        return part if other == part.name else dataclasses.replace(part, alternative=Part(other, part.axes))

    return dataclasses.replace(spec, parts=tuple(map(either, spec.parts)))


def head_hidden(context: Context, head: DraftHead, params: Params, hidden: jax.Array) -> jax.Array:
    """What the layers take of a token, and is kept of it, [T, d]; of what the model has of it: [T, hidden_size], or of
    EAGLE-3 [T, len(keeps) * hidden_size].
    """
    assert params.joint is not None
    return linear(context, hidden, params.joint.matrix) if head.kind == "eagle3" else hidden


def head_forward(
    context: Context,
    head: DraftHead,
    model: DecoderConfig,
    groups: tuple[KVCacheGroup, ...],
    params: Params,
    cache: Cache,
    batch: StepBatch,
    hidden: jax.Array,
) -> tuple[Cache, jax.Array]:
    """One step through the layers.

    Args:
        context, head, model, groups: static, as in `decoder.forward`.
        batch: tokens at their positions in the sequence.
        hidden: [T, d], of each one's token before it (`head_hidden`, or what this function returned).

    Returns:
        (cache, hidden): [T, d], what the next token takes; scores are of it, behind `decoder.last_norm`.
    """
    joint, eps, attention = params.joint, model.norm_eps, batch.attention
    assert joint is not None and isinstance(attention, AttentionBatch)
    # nobody sees the place of the token that has no pair, nor what comes behind a token: its pair is no part of a block
    valid = attention.token_valid & (attention.positions > 0)
    attention = dataclasses.replace(attention, token_valid=valid, seen_to=None)
    batch = dataclasses.replace(batch, attention=attention)
    cos, sin = rope_tables(jnp.maximum(attention.positions - 1, 0), model.rope)
    embedding = embed(context, params.embedding, batch.tokens, hidden.dtype)
    if model.embedding_scale != 1.0:
        embedding = embedding * jnp.asarray(model.embedding_scale, embedding.dtype)
    if batch.embeddings is not None and batch.embeddings.shape == embedding.shape:
        embedding = with_embeddings(embedding, batch)
    normed_hidden = hidden if joint.hidden_norm is None else rms_norm(hidden, joint.hidden_norm, eps)
    if head.kind == "eagle3":
        x = normed_hidden if head.norm_before_residual else hidden
    else:
        if joint.embedding_norm is not None:
            embedding = rms_norm(embedding, joint.embedding_norm, eps)
        pair = jnp.concatenate([embedding, normed_hidden], axis=1)
        x = linear(context, pair, joint.matrix, joint.bias)
    valid = None if model.moe is None else of_all_copies(context, attention.token_valid)

    def layer(carry, weights, place, *, pair: bool):
        x, cache = carry
        layout, rope = place
        if pair and head.kind == "eagle3":
            normed = jnp.concatenate([rms_norm(embedding, weights.attention_norm, eps), normed_hidden], axis=1)
        elif weights.attention_norm is None:
            normed = x
        else:
            normed = rms_norm(x, weights.attention_norm, eps)
        turned = cos[rope], sin[rope]
        x, cache, _ = decoder_layer(context, model, weights, layout, *turned, x, normed, cache, batch, valid)
        return x, cache

    layout = dataclasses.replace(layouts(model.kv_specs, groups, cache.shape[0]), first=1)
    places = layout, np.asarray(model.layer_rope, np.int32)
    for pair, segments in ((True, params.layers[:1]), (False, params.layers[1:])):
        here = jax.tree.map(lambda array, pair=pair: array[:1] if pair else array[1:], places)
        x, cache = through_layers(functools.partial(layer, pair=pair), (x, cache), segments, here)
    return cache, x
