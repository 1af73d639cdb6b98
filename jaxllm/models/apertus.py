"""Apertus: norms of each head, an MLP without a gate, whose activation is learned (Swiss AI Initiative 2025,
arXiv:2509.14233).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.layers.activation import XIELU
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields, rope_scaling, rope_theta
from jaxllm.models.names import WeightNames

NAMES = WeightNames(attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm", gate_up=("mlp.up_proj",))
_THETA = 12000000.0
#: where a config says nothing
_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    scaling = rope_scaling(hf) or {**_SCALING, "rope_theta": rope_theta(hf, _THETA)}
    learns = hf.get("hidden_act", XIELU) == XIELU
    own = {"rope_scaling": None, "rope_parameters": scaling, **({"hidden_act": None} if learns else {})}
    fields = common_fields({"rms_norm_eps": 1e-5, **hf, **own}, theta=rope_theta(hf, _THETA))
    return DecoderConfig(
        **{
            **fields,
            "activation": XIELU if learns else fields["activation"],
            "qk_norm": True,
            "gated_mlp": False,
            "names": NAMES,
        }
    )
