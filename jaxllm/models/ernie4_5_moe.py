"""ERNIE 4.5 with experts, which a softmax and a bias choose, beside an MLP that every token goes through (Baidu 2025,
ERNIE 4.5 Technical Report).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.layers.moe import MoEConfig
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.deepseek import check
from jaxllm.models.llama import common_fields
from jaxllm.models.names import ExpertNames, WeightNames

NAMES = WeightNames(
    moe=ExpertNames(
        correction="moe_statics.e_score_correction_bias",
        new_correction="gate.moe_statics.e_score_correction_bias",
        correction_is_row=True,
    )
)
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_intermediate_size": 1536,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    check(hf, {"use_bias": False, "moe_norm_min": 1e-12, "moe_gate": "topk", "moe_use_aux_free": True})
    # as transformers calls two of them, too, and takes them so where a config has both
    other = {"moe_num_experts": "num_experts", "moe_k": "num_experts_per_tok"}
    hf = {**_DEFAULTS, **hf, **{name: hf[alias] for name, alias in other.items() if alias in hf}}
    fields = common_fields(hf, theta=500000.0)
    layers, first, last = fields["num_layers"], hf["moe_layer_start_index"], hf["moe_layer_end_index"]
    last = layers - 1 if last == -1 else last
    sparse = tuple((i + 1) % hf["moe_layer_interval"] == 0 and first <= i <= last for i in range(layers))
    own: dict[str, Any] = {
        "rope_interleaved": True,
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "names": NAMES,
    }
    if any(sparse):
        if not isinstance(hf["moe_num_experts"], int) or not isinstance(hf["moe_intermediate_size"], int):
            raise ValidationError(
                f"moe_num_experts={hf['moe_num_experts']} and moe_intermediate_size={hf['moe_intermediate_size']} must "
                "be numbers: experts of several kinds, for pictures, are not supported."
            )
        moe = MoEConfig(
            num_experts=hf["moe_num_experts"],
            top_k=hf["moe_k"],
            intermediate_size=hf["moe_intermediate_size"],
            routing="corrected softmax",
            float32_router=True,
            shared_size=hf["moe_intermediate_size"] * hf["moe_num_shared_experts"],
        )
        own |= {"moe": moe, "layer_moe": sparse}
    return DecoderConfig(**{**fields, **own})
