"""GPT-2: learned positions, LayerNorm, biases, an MLP without a gate, matrices that are [in, out] in checkpoints
(Radford et al. 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.learned_positions import with_learned_positions
from jaxllm.models.llama import common_fields
from jaxllm.models.names import WeightNames

NAMES = WeightNames(
    prefix="transformer.",
    layer="h.{layer}.",
    embedding="wte",
    position_embedding="wpe",
    norm="ln_f",
    transposed=True,
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    output="attn.c_proj",
    mlp_norm="ln_2",
    gate_up=("mlp.c_fc",),
    down="mlp.c_proj",
)
#: what transformers calls them in other families -> here
_SIZES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def common_sizes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json in the spelling of GPT-2 and GPT-J says, in that of other families."""
    # transformers takes the common name of a config that has both, as overrides make of it
    sizes = {common: hf[own] if own in hf and common not in hf else hf[common] for common, own in _SIZES.items()}
    return {
        **sizes,
        "intermediate_size": hf.get("n_inner") or 4 * sizes["hidden_size"],
        "hidden_act": hf.get("activation_function", "gelu_new"),
        "num_key_value_heads": None,
        "head_dim": None,
    }


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if hf.get(name):
            raise ValidationError(f"{name}=true of GPT-2 is not supported.")
    sizes = common_sizes(hf)
    fields = common_fields(
        {
            "tie_word_embeddings": True,
            **hf,
            **sizes,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_scaling": None,
            "rope_parameters": None,
        }
    )
    return DecoderConfig(
        **{
            **with_learned_positions(hf, fields),
            **({} if hf.get("scale_attn_weights", True) else {"attention_scale": 1.0}),
            "norm": "layer",
            "norm_bias": True,
            "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
            "gated_mlp": False,
            "names": NAMES,
        }
    )
