"""The vision towers of Qwen2.5-VL (arXiv:2502.13923) and Qwen2-VL (arXiv:2409.12191): patches of pixels become vectors
of the language model, one of every `merge_size` ** 2 patches.

Qwen2.5-VL attends within windows in all layers but a few, with RMSNorm and a gated MLP; Qwen2-VL attends in whole
frames, with LayerNorm and a plain MLP.
"""
# A tree of specs has the form of `QwenVisionParams`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.api.errors import ValidationError
from jaxllm.layers.activation import ACTIVATIONS, activate, gated
from jaxllm.layers.context import Context
from jaxllm.layers.linear import linear
from jaxllm.layers.norm import layer_norm, rms_norm
from jaxllm.layers.rope import apply_rope
from jaxllm.layers.vision import Patches, axial_tables, frame_attention, window_attention
from jaxllm.layers.weight import Axis, Part, WeightSpec
from jaxllm.models.segments import through_layers

_EPS = 1e-6
_ROPE_THETA = 10000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """Shapes and choices of one tower. Hashable: a compiled encoder is made for one of these."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    #: of what it gives: the language model's hidden size
    output_size: int
    activation: str
    #: Qwen2.5-VL's: RMSNorm, and a gated MLP with biases; else LayerNorm and a plain one
    gated: bool
    channels: int
    #: pixels of a patch's side, frames of a patch, patches of a merged one's side
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    #: layers that see whole frames; the others see windows
    full_layers: tuple[int, ...]
    #: pixels of a window's side
    window_size: int

    @property
    def patch_numbers(self) -> int:
        """Numbers of a patch of pixels."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """Most patches of a window."""
        return (self.window_side * self.merge_size) ** 2

    @property
    def window_side(self) -> int:
        """Merged patches of a window's side."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def merge_unit(self) -> int:
        """Patches that become one vector."""
        return self.merge_size**2

    @property
    def has_windows(self) -> bool:
        return len(self.full_layers) < self.num_layers

    def num_vectors(self, num_patches: int) -> int:
        """That so many patches become."""
        return num_patches // self.merge_unit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QwenVisionLayers:
    """Weights of the tower's layers, stacked. L layers, v the tower's hidden size, F its intermediate size."""

    attention_norm: jax.Array  # [L, v]
    attention_norm_bias: jax.Array | None  # [L, v]
    attention_in: jax.Array  # [L, 3v, v]
    attention_in_bias: jax.Array  # [L, 3v]
    attention_out: jax.Array  # [L, v, v]
    attention_out_bias: jax.Array  # [L, v]
    mlp_norm: jax.Array  # [L, v]
    mlp_norm_bias: jax.Array | None  # [L, v]
    mlp_in: jax.Array  # [L, 2F, v]; without a gate [L, F, v]
    mlp_in_bias: jax.Array  # [L, 2F]; [L, F]
    mlp_out: jax.Array  # [L, v, F]
    mlp_out_bias: jax.Array  # [L, v]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QwenVisionParams:
    """M: patches that become one vector, d: the language model's hidden size."""

    patch_embedding: jax.Array  # [v, channels, temporal_patch_size, patch_size, patch_size]
    layers: QwenVisionLayers
    merger_norm: jax.Array  # [v]
    merger_norm_bias: jax.Array | None  # [v]
    merger_in: jax.Array  # [M * v, M * v]
    merger_in_bias: jax.Array  # [M * v]
    merger_out: jax.Array  # [d, M * v]
    merger_out_bias: jax.Array  # [d]


def vision_config(hf: Mapping[str, Any], *, gated: bool, output_size: int) -> QwenVisionConfig:
    """The tower that `vision_config` of a config.json describes.

    Args:
        gated: whether it is Qwen2.5-VL's.
        output_size: the language model's hidden size.

    Raises:
        KeyError: a field is missing.
        ValidationError: a field has a value that the tower cannot compute.
    """
    hidden = hf["hidden_size"] if gated else hf["embed_dim"]
    activation = hf.get("hidden_act") or ("silu" if gated else "quick_gelu")
    if activation not in ACTIVATIONS:
        raise ValidationError(
            f"hidden_act {activation!r} of vision_config is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    given = hf.get("out_hidden_size", output_size) if gated else hf["hidden_size"]
    if given != output_size:
        raise ValidationError(
            f"vision_config makes vectors of {given} numbers, and those of the language model have {output_size}"
        )
    layers, heads = hf["depth"], hf["num_heads"]
    if hidden % heads or hidden // heads % 4:
        raise ValidationError(f"vision_config: {heads} heads do not divide {hidden} numbers into multiples of 4")
    merge, patch, window = hf.get("spatial_merge_size", 2), hf.get("patch_size", 14), hf.get("window_size", 112)
    if gated and window % (merge * patch):
        raise ValidationError(f"window_size={window} of vision_config is no multiple of {merge * patch}")
    full = tuple(hf.get("fullatt_block_indexes", (7, 15, 23, 31))) if gated else tuple(range(layers))
    return QwenVisionConfig(
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=hf["intermediate_size"] if gated else int(hidden * hf.get("mlp_ratio", 4)),
        num_heads=heads,
        output_size=output_size,
        activation=activation,
        gated=gated,
        channels=hf.get("in_channels", hf.get("in_chans", 3)),
        patch_size=patch,
        temporal_patch_size=hf.get("temporal_patch_size", 2),
        merge_size=merge,
        full_layers=tuple(layer for layer in full if layer < layers),
        window_size=window,
    )


def vision_specs(c: QwenVisionConfig) -> QwenVisionParams:
    """A `QwenVisionParams` tree of `WeightSpec`s; every device has all of it."""
    v, unit = Axis("vision", c.hidden_size), Axis("merged", c.merge_unit * c.hidden_size)
    mlp, out = Axis("vision mlp", c.intermediate_size), Axis("embed", c.output_size)
    layers = range(c.num_layers)

    def of_layers(*names: str, rows: Axis, columns: tuple[Axis, ...] = (), kind: str = "weight", **fields: Any):
        parts = tuple(Part(f"visual.blocks.{{layer}}.{name}.{kind}", (rows, *columns)) for name in names)
        return WeightSpec(parts=parts, layers=layers, **fields)

    def outside(name: str, *axes: Axis, **fields: Any) -> WeightSpec:
        return WeightSpec(parts=(Part(f"visual.{name}", axes),), **fields)

    def norm_bias(spec: WeightSpec) -> WeightSpec | None:
        return None if c.gated else spec

    mlp_in = ("mlp.gate_proj", "mlp.up_proj") if c.gated else ("mlp.fc1",)
    mlp_out = "mlp.down_proj" if c.gated else "mlp.fc2"
    patch = Axis("rows", c.patch_size), Axis("columns", c.patch_size)
    return QwenVisionParams(
        patch_embedding=outside(
            "patch_embed.proj.weight", v, Axis("channels", c.channels), Axis("frames", c.temporal_patch_size), *patch
        ),
        layers=QwenVisionLayers(
            attention_norm=of_layers("norm1", rows=v, init=1.0),
            attention_norm_bias=norm_bias(of_layers("norm1", rows=v, kind="bias", init=0.0)),
            attention_in=of_layers("attn.qkv", rows=Axis("vision qkv", 3 * c.hidden_size), columns=(v,)),
            attention_in_bias=of_layers("attn.qkv", rows=Axis("vision qkv", 3 * c.hidden_size), kind="bias", init=0.0),
            attention_out=of_layers("attn.proj", rows=v, columns=(v,)),
            attention_out_bias=of_layers("attn.proj", rows=v, kind="bias", init=0.0),
            mlp_norm=of_layers("norm2", rows=v, init=1.0),
            mlp_norm_bias=norm_bias(of_layers("norm2", rows=v, kind="bias", init=0.0)),
            mlp_in=of_layers(*mlp_in, rows=mlp, columns=(v,)),
            mlp_in_bias=of_layers(*mlp_in, rows=mlp, kind="bias", init=0.0),
            mlp_out=of_layers(mlp_out, rows=v, columns=(mlp,)),
            mlp_out_bias=of_layers(mlp_out, rows=v, kind="bias", init=0.0),
        ),
        merger_norm=outside("merger.ln_q.weight", v, init=1.0),
        merger_norm_bias=norm_bias(outside("merger.ln_q.bias", v, init=0.0)),
        merger_in=outside("merger.mlp.0.weight", unit, unit),
        merger_in_bias=outside("merger.mlp.0.bias", unit, init=0.0),
        merger_out=outside("merger.mlp.2.weight", out, unit),
        merger_out_bias=outside("merger.mlp.2.bias", out, init=0.0),
    )


def encode(
    context: Context, config: QwenVisionConfig, params: QwenVisionParams, pixels: jax.Array, patches: Patches
) -> jax.Array:
    """Patches as vectors of the language model.

    Args:
        context, config: static.
        pixels: [N, `patch_numbers`], normalized, in the dtype of the weights; those that are merged follow each other,
            and so do those of a window.

    Returns:
        [N / `merge_unit`, output_size], in the order of the patches.
    """
    heads, dim = config.num_heads, config.hidden_size // config.num_heads
    scale = dim**-0.5
    cos, sin = axial_tables(patches.positions, dim, _ROPE_THETA)
    x = linear(context, pixels, params.patch_embedding.reshape(config.hidden_size, -1))

    def attend(is_full: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        def whole() -> jax.Array:
            return frame_attention(query, key, value, patches.frames, scale=scale)

        def windows() -> jax.Array:
            size = config.window_patches
            return window_attention(query, key, value, patches.windows, scale=scale, size=size)

        if not config.has_windows:
            return whole()
        return lax.cond(is_full, whole, windows)

    def layer(x: jax.Array, w: QwenVisionLayers, is_full: jax.Array) -> jax.Array:
        normed = _norm(config, x, w.attention_norm, w.attention_norm_bias)
        qkv = linear(context, normed, w.attention_in, w.attention_in_bias).reshape(-1, 3 * heads, dim)
        query, key, value = jnp.split(qkv, 3, axis=1)
        query, key = (apply_rope(each, cos, sin) for each in (query, key))
        attended = attend(is_full, query, key, value).reshape(-1, heads * dim)
        x = x + linear(context, attended, w.attention_out, w.attention_out_bias)
        y = linear(context, _norm(config, x, w.mlp_norm, w.mlp_norm_bias), w.mlp_in, w.mlp_in_bias)
        y = gated(config.activation, y) if config.gated else activate(config.activation, y)
        return x + linear(context, y, w.mlp_out, w.mlp_out_bias)

    is_full = np.isin(np.arange(config.num_layers), config.full_layers)
    x = through_layers(layer, x, (params.layers,), is_full)
    x = _norm(config, x, params.merger_norm, params.merger_norm_bias)
    x = x.reshape(-1, config.merge_unit * config.hidden_size)
    x = activate("gelu", linear(context, x, params.merger_in, params.merger_in_bias))
    return linear(context, x, params.merger_out, params.merger_out_bias)


def _norm(config: QwenVisionConfig, x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    return rms_norm(x, weight, _EPS) if config.gated else layer_norm(x, weight, bias, _EPS)
