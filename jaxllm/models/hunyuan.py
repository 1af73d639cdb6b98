"""Hunyuan without experts: Llama with norms of queries and keys behind the rotary embedding (Tencent 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields, rope_scaling, rope_theta
from jaxllm.models.names import WeightNames
from jaxllm.models.rope_scaling import kind_of

NAMES = WeightNames(query_norm="self_attn.query_layernorm", key_norm="self_attn.key_layernorm")


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Scalings with an `alpha` are called dynamic, and depend on no length: they change the base alone."""
    if hf.get("use_cla"):
        raise ValidationError("use_cla=true of Hunyuan is not supported: each layer has keys and values of its own.")
    scaling, theta = rope_scaling(hf), rope_theta(hf)
    if scaling is not None and scaling.get("alpha") and kind_of(scaling) == "dynamic":
        dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        scaling = {"rope_theta": theta * scaling["alpha"] ** (dim / (dim - 2))}
    fields = common_fields({"rms_norm_eps": 1e-5, **hf, "rope_scaling": None, "rope_parameters": scaling}, theta=theta)
    return DecoderConfig(
        **{**fields, "qk_norm": hf.get("use_qk_norm", True), "qk_norm_behind_rope": True, "names": NAMES}
    )
