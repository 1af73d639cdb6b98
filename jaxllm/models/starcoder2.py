"""StarCoder2: LayerNorm, biases, an MLP without a gate, a window (Lozhkov et al. 2024, arXiv:2402.19173)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.names import WeightNames

NAMES = WeightNames(gate_up=("mlp.c_fc",), down="mlp.c_proj")
_DEFAULTS = {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 2, "tie_word_embeddings": True}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    has_biases = hf.get("use_bias", True)
    fields = common_fields({**_DEFAULTS, **hf, "attention_bias": has_biases, "mlp_bias": has_biases})
    return DecoderConfig(
        **{
            **fields,
            "norm": "layer",
            "norm_bias": True,
            "norm_eps": hf.get("norm_epsilon", 1e-5),
            "gated_mlp": False,
            "layer_window": (hf.get("sliding_window"),) * fields["num_layers"],
            "names": NAMES,
        }
    )
