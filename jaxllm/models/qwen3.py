"""Qwen3: Qwen2 without biases, with RMS norms on queries and keys (Yang et al. 2025, arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.qwen2 import layer_windows


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields({"head_dim": 128, **hf})
    return DecoderConfig(
        **{
            **fields,
            "qk_norm": True,
            "layer_window": layer_windows(hf, fields["num_layers"]),
        }
    )
