"""Qwen2-MoE: Qwen2 with experts in place of some layers' MLPs, beside one MLP that every token goes through (Yang et
al. 2024, arXiv:2407.10671).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.models import qwen2
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.names import ExpertNames, WeightNames
from jaxllm.models.qwen3_moe import with_experts

NAMES = WeightNames(
    moe=ExpertNames(
        shared_gate_up=("shared_expert.gate_proj", "shared_expert.up_proj"), shared_down="shared_expert.down_proj"
    )
)

DEFAULTS: dict[str, Any] = {
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    hf = {**DEFAULTS, **hf}
    model = dataclasses.replace(qwen2.config_from_hf(hf), names=NAMES, qkv_bias=hf.get("qkv_bias", True))
    return with_experts(model, hf, shared_size=hf["shared_expert_intermediate_size"], shared_gate=True)
