"""Granite 3's models with experts, and those of them beside which every token goes through one MLP."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.layers.moe import MoEConfig
from jaxllm.models import granite
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.names import ExpertNames, WeightNames

NAMES = WeightNames(
    moe=ExpertNames(
        module="block_sparse_moe",
        router="router.layer",
        new_module="block_sparse_moe",
        new_router="router",
        joined=("input_linear.weight", "output_linear.weight"),
        shared_module="shared_mlp",
        shared_gate_up=("input_linear",),
        shared_down="output_linear",
    )
)


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    return _with_experts(hf, shared_size=0)


def shared_config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    return _with_experts(hf, shared_size=hf.get("shared_intermediate_size") or 0)


def _with_experts(hf: Mapping[str, Any], *, shared_size: int) -> DecoderConfig:
    model = granite.config_from_hf(hf)
    moe = MoEConfig(
        num_experts=hf.get("num_local_experts", 8),
        top_k=hf.get("num_experts_per_tok", 2),
        intermediate_size=hf["intermediate_size"],
        routing="softmax of chosen",
        shared_size=shared_size,
    )
    return dataclasses.replace(model, moe=moe, layer_moe=(True,) * model.num_layers, names=NAMES, mlp_bias=False)
