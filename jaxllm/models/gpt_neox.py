"""GPT-NeoX and Pythia: LayerNorm, biases, an MLP without a gate beside attention, of each head a part turns (Black et
al. 2022, arXiv:2204.06745).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.names import WeightNames

NAMES = WeightNames(
    prefix="gpt_neox.",
    embedding="embed_in",
    norm="final_layer_norm",
    head="embed_out",
    qkv=("attention.query_key_value",),
    qkv_by_head=True,
    output="attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields(
        {
            "hidden_act": "gelu",
            "attention_bias": True,
            **hf,
            "mlp_bias": True,
            "head_dim": None,
            "num_key_value_heads": None,
        },
        theta=hf.get("rotary_emb_base", 10000.0),
        rotary_factor=hf.get("rotary_pct", 0.25),
    )
    return DecoderConfig(
        **{
            **fields,
            "norm": "layer",
            "norm_bias": True,
            "norm_eps": hf.get("layer_norm_eps", 1e-5),
            "parallel": hf.get("use_parallel_residual", True),
            "gated_mlp": False,
            "names": NAMES,
        }
    )
