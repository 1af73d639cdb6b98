"""OPT: learned positions, LayerNorm, biases, ReLU without a gate (Zhang et al. 2022, arXiv:2205.01068)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.learned_positions import with_learned_positions
from jaxllm.models.llama import common_fields
from jaxllm.models.names import WeightNames

#: rows that fairseq kept for padding
_ROWS_IN_FRONT = 2
NAMES = WeightNames(
    embedding="decoder.embed_tokens",
    position_embedding="decoder.embed_positions",
    norm="decoder.final_layer_norm",
    layer="decoder.layers.{layer}.",
    attention_norm="self_attn_layer_norm",
    output="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    gate_up=("fc1",),
    down="fc2",
)
#: fields whose other values are of OPT-350M and of two models of before 2022
_ONLY = {
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "layer_norm_elementwise_affine": True,
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    for name, value in _ONLY.items():
        if hf.get(name, value) != value:
            raise ValidationError(f"{name}={str(hf[name]).lower()} of OPT is not supported.")
    width, own = hf["hidden_size"], hf.get("word_embed_proj_dim")
    if own not in (None, width):
        raise ValidationError(f"word_embed_proj_dim={own} is not supported: it must be the hidden_size, {width}.")
    has_biases = hf.get("enable_bias", True)
    fields = common_fields(
        {
            "tie_word_embeddings": True,
            **hf,
            "intermediate_size": hf.get("ffn_dim", 3072),
            "hidden_act": hf.get("activation_function", "relu"),
            "attention_bias": has_biases,
            "mlp_bias": has_biases,
            "num_key_value_heads": None,
            "head_dim": None,
            "rope_scaling": None,
            "rope_parameters": None,
        }
    )
    return DecoderConfig(
        **{
            **with_learned_positions(hf, fields, first=_ROWS_IN_FRONT),
            "norm": "layer",
            "norm_bias": True,
            "norm_eps": 1e-5,
            "gated_mlp": False,
            "names": NAMES,
        }
    )
