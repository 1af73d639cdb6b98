"""Granite 3: Llama with factors on embeddings, scores, branches and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        **{
            **common_fields(hf),
            "embedding_scale": hf.get("embedding_multiplier", 1.0),
            "residual_scale": hf.get("residual_multiplier", 1.0),
            "attention_scale": hf.get("attention_multiplier", 1.0),
            "logits_scale": 1.0 / hf.get("logits_scaling", 1.0),
        }
    )
