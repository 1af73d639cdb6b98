"""Phi-1, 1.5 and 2: LayerNorm, biases also of the scores, attention and MLP beside each other behind one norm, a part
of each head turns (Li et al. 2023, arXiv:2309.05463).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.names import WeightNames

NAMES = WeightNames(norm="final_layernorm", output="self_attn.dense", gate_up=("mlp.fc1",), down="mlp.fc2")


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    if hf.get("qk_layernorm"):
        raise ValidationError("qk_layernorm=true of Phi is not supported.")
    fields = common_fields(
        {"hidden_act": "gelu_new", **hf, "attention_bias": True, "mlp_bias": True, "head_dim": None}, rotary_factor=0.5
    )
    return DecoderConfig(
        **{
            **fields,
            "norm": "layer",
            "norm_bias": True,
            "norm_eps": hf.get("layer_norm_eps", 1e-5),
            "parallel": True,
            "shared_norm": True,
            "gated_mlp": False,
            "head_bias": True,
            "names": NAMES,
        }
    )
