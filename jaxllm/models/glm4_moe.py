"""GLM-4.5 and 4.6: experts as DeepSeek-V3 has them, behind attention of keys and values (GLM-4.5 Team 2025,
arXiv:2508.06471).

The layer for predicting several tokens, which checkpoints have behind the last one, is `mtp.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.deepseek import check, experts
from jaxllm.models.llama import common_fields

_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    check(hf, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    hf = {**_DEFAULTS, **hf}
    own = {"output_bias": False, "mlp_bias": False, "qk_norm": bool(hf.get("use_qk_norm"))}
    sparse = experts(hf, groups=hf["n_group"], renormalise=bool(hf["norm_topk_prob"]), routing="sigmoid")
    return DecoderConfig(**{**common_fields(hf, rotary_factor=0.5), **own, **sparse})
