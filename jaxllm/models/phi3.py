"""Phi-3 and Phi-4: Llama with fused projections; of Phi-4-mini's heads a part turns (Abdin et al. 2024,
arXiv:2404.14219).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.names import WeightNames

NAMES = WeightNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields({"rms_norm_eps": 1e-5, **hf}, rotary_factor=1.0)
    return DecoderConfig(
        **{**fields, "layer_window": (hf.get("sliding_window"),) * fields["num_layers"], "names": NAMES}
    )
