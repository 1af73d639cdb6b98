"""Seed-OSS: Llama with biases of queries, keys and values (ByteDance Seed Team 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields({"head_dim": 128, "num_key_value_heads": 8, "attention_bias": True, **hf})
    return DecoderConfig(**{**fields, "output_bias": bool(hf.get("attention_out_bias"))})
