"""The vision towers of CLIP (Radford et al. 2021, arXiv:2103.00020) and SigLIP (Zhai et al. 2023, arXiv:2303.15343):
transformers over the patches of square pictures of one size, with learned positions and LayerNorm. CLIP has a token of
its own in front of the patches, and a norm in front of the layers; SigLIP has neither.
"""
# A tree of specs has the form of `ClipParams`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.layers.activation import ACTIVATIONS, activate
from jaxllm.layers.context import Context
from jaxllm.layers.linear import linear
from jaxllm.layers.norm import layer_norm
from jaxllm.layers.vision import Patches, frame_attention
from jaxllm.layers.weight import Axis, Part, WeightSpec
from jaxllm.models.projector import Projector, ProjectorConfig, project, projector_specs
from jaxllm.models.segments import through_layers

#: `model_type` of vision_config -> what it leaves out, as transformers has it
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
_BOTH = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "num_channels": 3,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Shapes and choices of one tower and its projector. Hashable: a compiled encoder is made for one of these."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    activation: str
    norm_eps: float
    channels: int
    #: pixels of a picture's side, and of a patch's
    image_size: int
    patch_size: int
    #: CLIP's token in front of the patches, and its norm in front of the layers; else patches have a bias
    class_token: bool
    #: layers behind which features are taken, of all of them together
    feature_layers: tuple[int, ...]
    #: whether the tower's last norm is in front of what is taken
    last_norm: bool
    #: whether the first feature is dropped: CLIP's own token
    drops_first: bool
    projector: ProjectorConfig
    #: how many squares a picture may be, ascending: more than one of LLaVA-NeXT's, the whole and its tiles
    squares: tuple[int, ...] = (1,)
    #: whether rows of vectors end in one that is learned
    has_newline: bool = False

    @property
    def side(self) -> int:
        """Patches of a picture's side; pixels that are left over are not seen."""
        return self.image_size // self.patch_size

    @property
    def fixed_patches(self) -> int:
        """Of every square."""
        return self.side**2

    @property
    def merge_size(self) -> int:
        """Patches of a side whose features become one."""
        return self.projector.pooled_side

    @property
    def merge_unit(self) -> int:
        return self.merge_size**2

    @property
    def patch_numbers(self) -> int:
        """Numbers of a patch of pixels."""
        return self.channels * self.patch_size**2

    @property
    def output_size(self) -> int:
        return self.projector.output_size

    @property
    def has_windows(self) -> bool:
        return False

    def num_vectors(self, num_patches: int) -> int:
        """That so many patches become, of whole squares."""
        squares = num_patches // self.fixed_patches
        return num_patches // self.merge_unit + squares * (self.class_token - self.drops_first)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClipLayers:
    """Weights of some layers, stacked. L layers, v the tower's hidden size, F its intermediate size."""

    attention_norm: jax.Array  # [L, v]
    attention_norm_bias: jax.Array  # [L, v]
    attention_in: jax.Array  # [L, 3v, v]
    attention_in_bias: jax.Array  # [L, 3v]
    attention_out: jax.Array  # [L, v, v]
    attention_out_bias: jax.Array  # [L, v]
    mlp_norm: jax.Array  # [L, v]
    mlp_norm_bias: jax.Array  # [L, v]
    mlp_in: jax.Array  # [L, F, v]
    mlp_in_bias: jax.Array  # [L, F]
    mlp_out: jax.Array  # [L, v, F]
    mlp_out_bias: jax.Array  # [L, v]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClipParams:
    """P: places of patches, and of CLIP's own token in front of them."""

    patch_embedding: jax.Array  # [v, channels, patch_size, patch_size]
    patch_bias: jax.Array | None  # [v]
    class_embedding: jax.Array | None  # [v]
    positions: jax.Array  # [P, v]
    first_norm: jax.Array | None  # [v]
    first_norm_bias: jax.Array | None  # [v]
    #: cut behind `feature_layers`; those behind the last of them are saved, and not computed
    layers: tuple[ClipLayers, ...]
    last_norm: jax.Array  # [v]
    last_norm_bias: jax.Array  # [v]
    projector: Projector
    #: [d], of the language model
    newline: jax.Array | None = None


def clip_config(
    hf: Mapping[str, Any],
    projector: ProjectorConfig,
    *,
    feature_layers: tuple[int, ...] | None = None,
    drops_first: bool = False,
) -> ClipConfig:
    """The tower that `vision_config` of a config.json describes.

    Args:
        feature_layers: behind which features are taken, from the end where negative (-1: behind the last); None:
            behind the tower's last norm.
        drops_first: whether the first feature is.

    Raises:
        ValidationError: a field has a value that the tower cannot compute.
    """
    kind = hf.get("model_type", "siglip_vision_model")
    if kind not in _DEFAULTS:
        raise ValidationError(
            f"model_type {kind!r} of vision_config is not supported; supported: {', '.join(_DEFAULTS)}"
        )
    hf = {**_BOTH, **_DEFAULTS[kind], **hf}
    layers, heads, hidden = hf["num_hidden_layers"], hf["num_attention_heads"], hf["hidden_size"]
    if hf["hidden_act"] not in ACTIVATIONS:
        raise ValidationError(
            f"hidden_act {hf['hidden_act']!r} of vision_config is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    if hidden % heads:
        raise ValidationError(f"vision_config: {heads} heads do not divide {hidden} numbers")
    taken = (layers,) if feature_layers is None else tuple(n % (layers + 1) for n in feature_layers)
    if feature_layers is not None and any(not -layers - 1 <= n <= layers for n in feature_layers):
        raise ValidationError(f"vision_feature_layer={list(feature_layers)}: vision_config has {layers} layers")
    config = ClipConfig(
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=hf["intermediate_size"],
        num_heads=heads,
        activation=hf["hidden_act"],
        norm_eps=hf["layer_norm_eps"],
        channels=hf["num_channels"],
        image_size=hf["image_size"],
        patch_size=hf["patch_size"],
        class_token=kind == "clip_vision_model",
        feature_layers=taken,
        last_norm=feature_layers is None,
        drops_first=drops_first,
        projector=projector,
    )
    if config.side < 1 or config.side % config.merge_size:
        raise ValidationError(
            f"vision_config: a picture has {config.side} patches a side, of which {config.merge_size} cannot be put "
            "together"
        )
    return config


def clip_specs(c: ClipConfig) -> ClipParams:
    """A `ClipParams` tree of `WeightSpec`s; every device has all of it."""
    v, mlp = Axis("vision", c.hidden_size), Axis("vision mlp", c.intermediate_size)
    patch = Axis("rows", c.patch_size), Axis("columns", c.patch_size)

    def outside(name: str, *axes: Axis, **fields: Any) -> WeightSpec:
        return WeightSpec(parts=(Part(f"vision_tower.{name}", axes),), **fields)

    def segment(layers: range) -> ClipLayers:
        def of(*names: str, rows: Axis, columns: tuple[Axis, ...] = (), kind: str = "weight", **fields: Any):
            parts = tuple(
                Part(f"vision_tower.encoder.layers.{{layer}}.{name}.{kind}", (rows, *columns)) for name in names
            )
            return WeightSpec(parts=parts, layers=layers, **fields)

        def bias(*names: str, rows: Axis) -> WeightSpec:
            return of(*names, rows=rows, kind="bias", init=0.0)

        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return ClipLayers(
            attention_norm=of("layer_norm1", rows=v, init=1.0),
            attention_norm_bias=bias("layer_norm1", rows=v),
            attention_in=of(*qkv, rows=v, columns=(v,)),
            attention_in_bias=bias(*qkv, rows=v),
            attention_out=of("self_attn.out_proj", rows=v, columns=(v,)),
            attention_out_bias=bias("self_attn.out_proj", rows=v),
            mlp_norm=of("layer_norm2", rows=v, init=1.0),
            mlp_norm_bias=bias("layer_norm2", rows=v),
            mlp_in=of("mlp.fc1", rows=mlp, columns=(v,)),
            mlp_in_bias=bias("mlp.fc1", rows=mlp),
            mlp_out=of("mlp.fc2", rows=v, columns=(mlp,)),
            mlp_out_bias=bias("mlp.fc2", rows=v),
        )

    clip = c.class_token
    places = Axis("places", c.fixed_patches + clip)
    bounds = sorted({0, *c.feature_layers, c.num_layers})
    return ClipParams(
        patch_embedding=outside("embeddings.patch_embedding.weight", v, Axis("channels", c.channels), *patch),
        patch_bias=None if clip else outside("embeddings.patch_embedding.bias", v, init=0.0),
        class_embedding=outside("embeddings.class_embedding", v) if clip else None,
        positions=outside("embeddings.position_embedding.weight", places, v),
        # transformers' own spelling
        first_norm=outside("pre_layrnorm.weight", v, init=1.0) if clip else None,
        first_norm_bias=outside("pre_layrnorm.bias", v, init=0.0) if clip else None,
        layers=tuple(segment(range(first, last)) for first, last in itertools.pairwise(bounds)),
        last_norm=outside("post_layernorm.weight", v, init=1.0),
        last_norm_bias=outside("post_layernorm.bias", v, init=0.0),
        projector=projector_specs(c.projector, len(c.feature_layers) * c.hidden_size),
        newline=WeightSpec(parts=(Part("image_newline", (Axis("embed", c.output_size),)),)) if c.has_newline else None,
    )


def encode(context: Context, config: ClipConfig, params: ClipParams, pixels: jax.Array, patches: Patches) -> jax.Array:
    """The patches of one picture as vectors of the language model. Nothing in a square sees another one.

    Args:
        context, config: static.
        pixels: [`fixed_patches` of each square, `patch_numbers`], normalized, in the dtype of the weights; those whose
            features become one follow each other.

    Returns:
        [num_vectors, output_size], in the order of the patches.
    """
    heads, dim = config.num_heads, config.hidden_size // config.num_heads
    clip, scale, squares = config.class_token, dim**-0.5, len(pixels) // config.fixed_patches
    x = linear(context, pixels, params.patch_embedding.reshape(config.hidden_size, -1), params.patch_bias)
    place = (patches.positions[:, 0] * config.side + patches.positions[:, 1]) % config.fixed_patches
    x = x + params.positions[place + clip]
    if params.class_embedding is not None:
        first = jnp.broadcast_to(params.class_embedding + params.positions[0], (squares, 1, config.hidden_size))
        x = jnp.concatenate([first, x.reshape(squares, -1, config.hidden_size)], axis=1).reshape(-1, config.hidden_size)
    if params.first_norm is not None:
        x = layer_norm(x, params.first_norm, params.first_norm_bias, config.norm_eps)
    frames = jnp.pad(patches.frames.reshape(squares, -1), ((0, 0), (int(clip), 0)))
    attend = jax.vmap(functools.partial(frame_attention, scale=scale))

    def layer(x: jax.Array, w: ClipLayers, _: Any) -> jax.Array:
        normed = layer_norm(x, w.attention_norm, w.attention_norm_bias, config.norm_eps)
        qkv = linear(context, normed, w.attention_in, w.attention_in_bias).reshape(squares, -1, 3 * heads, dim)
        query, key, value = jnp.split(qkv, 3, axis=2)
        attended = attend(query, key, value, frames).reshape(-1, heads * dim)
        x = x + linear(context, attended, w.attention_out, w.attention_out_bias)
        normed = layer_norm(x, w.mlp_norm, w.mlp_norm_bias, config.norm_eps)
        y = activate(config.activation, linear(context, normed, w.mlp_in, w.mlp_in_bias))
        return x + linear(context, y, w.mlp_out, w.mlp_out_bias)

    bounds = sorted({0, *config.feature_layers})
    behind = {0: x}
    for (first, last), segment in zip(itertools.pairwise(bounds), params.layers, strict=False):
        behind[last] = x = through_layers(layer, x, (segment,), np.zeros(last - first, np.int32))
    features = jnp.concatenate([behind[number] for number in config.feature_layers], axis=-1)
    if config.last_norm:
        features = layer_norm(features, params.last_norm, params.last_norm_bias, config.norm_eps)
    features = features.reshape(squares, -1, features.shape[-1])[:, int(config.drops_first) :]
    return project(context, config.projector, params.projector, features.reshape(-1, features.shape[-1]))
