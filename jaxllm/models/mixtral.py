"""Mixtral: Mistral with experts in place of the MLPs (Jiang et al. 2024, arXiv:2401.04088)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.layers.moe import MoEConfig
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.names import ExpertNames, WeightNames

NAMES = WeightNames(moe=ExpertNames(module="block_sparse_moe", gate_up=("w1", "w3"), down="w2"))


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields({"num_key_value_heads": 8, "rms_norm_eps": 1e-5, **hf}, theta=1e6)
    moe = MoEConfig(
        num_experts=hf.get("num_local_experts", 8),
        top_k=hf.get("num_experts_per_tok", 2),
        intermediate_size=hf["intermediate_size"],
        renormalise=True,
    )
    layers = {
        "layer_window": (hf.get("sliding_window"),) * fields["num_layers"],
        "layer_moe": (True,) * fields["num_layers"],
    }
    return DecoderConfig(**{**fields, **layers, "moe": moe, "names": NAMES})
