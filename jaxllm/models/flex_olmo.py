"""FlexOlmo: OLMo 2 with experts in place of the MLPs (Shi et al. 2025, arXiv:2507.07024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.layers.moe import MoEConfig
from jaxllm.models import olmo2
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import rope_theta


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    model = olmo2.config_from_hf({"rms_norm_eps": 1e-6, "rope_theta": rope_theta(hf, 500000.0), **hf})
    moe = MoEConfig(
        num_experts=hf.get("num_experts", 7),
        top_k=hf.get("num_experts_per_tok", 5),
        intermediate_size=hf["intermediate_size"],
        renormalise=bool(hf.get("norm_topk_prob")),
    )
    return dataclasses.replace(model, moe=moe, layer_moe=(True,) * model.num_layers, mlp_bias=False)
