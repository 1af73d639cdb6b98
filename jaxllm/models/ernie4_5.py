"""ERNIE 4.5 without experts: Llama whose rotary embeddings pair neighbours (Baidu 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields

_DEFAULTS = {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    has_biases = bool(hf.get("use_bias"))
    fields = common_fields({**_DEFAULTS, **hf, "attention_bias": has_biases, "mlp_bias": has_biases}, theta=500000.0)
    return DecoderConfig(**{**fields, "rope_interleaved": True})
