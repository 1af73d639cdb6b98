"""MiniMax-M2: experts in every layer, chosen by sigmoids and a bias; norms over all heads of queries and keys together,
of which a part of each head turns (https://huggingface.co/MiniMaxAI/MiniMax-M2).
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
        module="block_sparse_moe",
        correction="e_score_correction_bias",
        new_correction="e_score_correction_bias",
        gate_up=("w1", "w3"),
        down="w2",
    )
)
#: what published configs say, and no other value is computed
_ONLY = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0,
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    check(hf, _ONLY)
    if any(kind != 1 for kind in hf.get("attn_type_list") or ()):
        raise ValidationError(
            f"attn_type_list={hf['attn_type_list']!r:.80} of config.json asks for linear attention, which is not "
            "supported; only softmax attention (1) is."
        )
    hf = {"head_dim": 128, "num_local_experts": 256, "num_experts_per_tok": 8, **hf}
    turned = hf.get("rotary_dim")
    fields = common_fields(hf, theta=5e6, rotary_factor=turned / hf["head_dim"] if turned else 1.0)
    moe = MoEConfig(
        num_experts=hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        intermediate_size=hf["intermediate_size"],
        routing="sigmoid",
        renormalise=True,
    )
    own = {
        "qkv_bias": False,
        "output_bias": False,
        "qk_norm": True,
        "qk_norm_of": "joint",
        "moe": moe,
        "layer_moe": (True,) * fields["num_layers"],
        "names": NAMES,
    }
    return DecoderConfig(**{**fields, **own})
