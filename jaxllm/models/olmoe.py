"""OLMoE: Llama with experts in every layer, and norms over all heads of queries and keys together (Muennighoff et al.
2024, arXiv:2409.02060).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.layers.moe import MoEConfig
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields({"rms_norm_eps": 1e-5, **hf})
    moe = MoEConfig(
        num_experts=hf.get("num_experts", 64),
        top_k=hf.get("num_experts_per_tok", 8),
        intermediate_size=hf["intermediate_size"],
        renormalise=bool(hf.get("norm_topk_prob")),
    )
    own = {"qk_norm": True, "qk_norm_of": "joint", "qkv_clip": hf.get("clip_qkv")}
    own |= {"moe": moe, "layer_moe": (True,) * fields["num_layers"]}
    return DecoderConfig(**{**fields, **own})
