"""GLM-4: fused gate and up, neighbours paired in the part of each head that turns; GLM-4-0414 has norms behind the
branches, too (GLM Team 2024, arXiv:2406.12793).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.names import WeightNames

NAMES = WeightNames(
    gate_up=("mlp.gate_up_proj",),
    post_attention_norm="post_self_attn_layernorm",
    post_mlp_norm="post_mlp_layernorm",
)
_DEFAULTS = {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-07, "attention_bias": True}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(**_fields(hf))


def glm4_config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(**{**_fields(hf), "post_norms": True})


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = common_fields({**_DEFAULTS, **hf}, rotary_factor=0.5)
    return {**fields, "output_bias": False, "rope_interleaved": True, "names": NAMES}
