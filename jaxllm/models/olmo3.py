"""OLMo 3: OLMo 2 with windows in three of four layers, whose rotary embedding is not stretched (OLMo Team 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields, rope, rope_scaling, rope_theta

_THETA = 500000.0


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Older configs say at the top level how all layers turn and how the global ones are stretched, newer ones have
    `rope_parameters` by layer type.
    """
    own = hf.get("rope_parameters") or {}
    by_kind = "full_attention" in own or "sliding_attention" in own
    whole = own.get("full_attention") if by_kind else rope_scaling(hf)
    local = {"rope_theta": rope_theta(hf, _THETA), **((own.get("sliding_attention") or {}) if by_kind else {})}
    fields = common_fields(
        {"rms_norm_eps": 1e-5, **hf, "rope_scaling": None, "rope_parameters": whole}, theta=hf.get("rope_theta", _THETA)
    )
    layers = fields["num_layers"]
    kinds = hf.get("layer_types") or [
        "sliding_attention" if (layer + 1) % 4 else "full_attention" for layer in range(layers)
    ]
    is_local = [kind == "sliding_attention" for kind in kinds[:layers]]
    window = hf.get("sliding_window", 4096)
    return DecoderConfig(
        **{
            **fields,
            "rope": (*fields["rope"], rope(hf, fields["head_dim"], local["rope_theta"], local)),
            "layer_rope": tuple(map(int, is_local)),
            "layer_window": tuple(window if sees_part else None for sees_part in is_local),
            "pre_norms": False,
            "post_norms": True,
            "qk_norm": True,
            "qk_norm_of": "joint",
        }
    )
