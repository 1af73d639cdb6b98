"""Mistral: Llama with a sliding window in every layer (Jiang et al. 2023, arXiv:2310.06825)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields(hf)
    window, layers = hf.get("sliding_window", 4096), fields["num_layers"]
    # as transformers' Ministral and vLLM read it
    kinds = hf.get("layer_types") or ["sliding_attention"] * layers
    fields["layer_window"] = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return DecoderConfig(**fields)
