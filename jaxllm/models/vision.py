"""Towers that see pictures, of whichever kind: their weights, and what they compute."""

from __future__ import annotations

from typing import cast

import jax

from jaxllm.layers.context import Context
from jaxllm.layers.vision import Patches
from jaxllm.models import clip_vision, qwen_vision
from jaxllm.models.clip_vision import ClipConfig, ClipParams
from jaxllm.models.qwen_vision import QwenVisionConfig, QwenVisionParams

VisionConfig = QwenVisionConfig | ClipConfig
VisionParams = QwenVisionParams | ClipParams


def vision_specs(config: VisionConfig) -> VisionParams:
    """A tree of `WeightSpec`s, of the form of the tower's params."""
    return clip_vision.clip_specs(config) if isinstance(config, ClipConfig) else qwen_vision.vision_specs(config)


def encode(
    context: Context, config: VisionConfig, params: VisionParams, pixels: jax.Array, patches: Patches
) -> jax.Array:
    """Patches as vectors of the language model, [`num_vectors`, `output_size`]: `clip_vision.encode` or
    `qwen_vision.encode`.
    """
    if isinstance(config, ClipConfig):
        return clip_vision.encode(context, config, cast(ClipParams, params), pixels, patches)
    return qwen_vision.encode(context, config, cast(QwenVisionParams, params), pixels, patches)
