"""GPT-OSS: experts with biases and a bounded activation, a sink beside the scores of every head, and windows in every
other layer (OpenAI 2025, arXiv:2508.10925).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.layers.activation import CLAMPED, CLAMPED_AT, CLAMPED_SLOPE
from jaxllm.layers.moe import MoEConfig
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.names import ExpertNames, WeightNames

NAMES = WeightNames(moe=ExpertNames(router="router", stacked=True))
ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    for name, known in (("swiglu_alpha", CLAMPED_SLOPE), ("swiglu_limit", CLAMPED_AT)):
        if hf.get(name, known) != known:
            raise ValidationError(f"{name}={hf[name]} is not supported; supported: {known}")
    defaults: dict[str, Any] = {"attention_bias": True, "head_dim": 64, "rms_norm_eps": 1e-5}
    if not (hf.get("rope_scaling") or hf.get("rope_parameters")):
        defaults["rope_parameters"] = ROPE
        hf = {name: value for name, value in hf.items() if name != "rope_parameters"}
    fields = common_fields({**defaults, **hf}, theta=150000.0)
    num_layers = fields["num_layers"]
    kinds = hf.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]
    moe = MoEConfig(
        num_experts=hf.get("num_local_experts", 128),
        top_k=hf.get("num_experts_per_tok", 4),
        intermediate_size=hf["intermediate_size"],
        routing="softmax of chosen",
        router_bias=True,
        expert_bias=True,
    )
    own = {
        "layer_window": tuple(hf.get("sliding_window", 128) if kind == "sliding_attention" else None for kind in kinds),
        "attention_sinks": True,
        "activation": CLAMPED,
        "moe": moe,
        "layer_moe": (True,) * num_layers,
        "names": NAMES,
    }
    return DecoderConfig(**{**fields, **own})
