"""Qwen3-MoE: Qwen3 with experts in place of some layers' MLPs (Yang et al. 2025, arXiv:2505.09388)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.layers.moe import MoEConfig
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields

DEFAULTS: dict[str, Any] = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields(hf)
    # no layer is without it, other than in Qwen3
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    fields |= {"qk_norm": True, "layer_window": (window,) * fields["num_layers"]}
    # as transformers 5 calls them when it saves; checkpoints of the hub have `num_experts`
    saved = {"num_experts": hf["num_local_experts"]} if "num_local_experts" in hf else {}
    return with_experts(DecoderConfig(**fields), {**DEFAULTS, **saved, **hf})


def with_experts(model: DecoderConfig, hf: Mapping[str, Any], **fields: Any) -> DecoderConfig:
    """A Qwen with experts in every `decoder_sparse_step`-th layer, but those of `mlp_only_layers`.

    Args:
        fields: of `MoEConfig`, beside those that all Qwens have.
    """
    step, dense = hf.get("decoder_sparse_step") or 1, hf.get("mlp_only_layers") or ()
    layers = tuple((i + 1) % step == 0 and i not in dense for i in range(model.num_layers))
    num_experts, top_k = hf["num_experts"], hf["num_experts_per_tok"]
    if not num_experts or not any(layers):
        return model
    moe = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=hf["moe_intermediate_size"],
        renormalise=bool(hf.get("norm_topk_prob")),
        **fields,
    )
    return dataclasses.replace(model, moe=moe, layer_moe=layers)
