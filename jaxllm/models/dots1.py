"""dots.llm1: Qwen3's attention and DeepSeek-V3's experts (rednote-hilab 2025, arXiv:2506.05767)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.deepseek import check, experts
from jaxllm.models.llama import common_fields

_DEFAULTS: dict[str, Any] = {"n_group": 1, "topk_group": 1, "sliding_window": 4096, "max_window_layers": 62}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    # published configs call the rule of sigmoids by the method's name
    scoring = {"scoring_func": "sigmoid"} if hf.get("scoring_func") == "noaux_tc" else {}
    check({**hf, **scoring}, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    hf = {**_DEFAULTS, **hf}
    fields, window = common_fields(hf), hf["sliding_window"]
    kinds = hf.get("layer_types") or [
        "full_attention" if window is None or i < hf["max_window_layers"] else "sliding_attention"
        for i in range(fields["num_layers"])
    ]
    own = {
        "mlp_bias": False,
        "qk_norm": True,
        "layer_window": tuple(window if kind == "sliding_attention" else None for kind in kinds),
    }
    sparse = experts(hf, groups=hf["n_group"] or 1, renormalise=bool(hf.get("norm_topk_prob")), routing="sigmoid")
    return DecoderConfig(**{**fields, **own, **sparse})
