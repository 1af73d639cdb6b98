"""Qwen2 and Qwen2.5: biases on queries, keys and values; optionally a sliding window in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields(hf)
    windows = layer_windows(hf, fields["num_layers"])
    return DecoderConfig(**{**fields, "qkv_bias": True, "output_bias": False, "layer_window": windows})


def layer_windows(hf: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """With `use_sliding_window`, layers have a window from `max_window_layers` on, or where `layer_types` says so."""
    if not hf.get("use_sliding_window"):
        return (None,) * num_layers
    kinds = hf.get("layer_types")
    if kinds is not None:
        return tuple(hf["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)
    full = hf.get("max_window_layers", 28)
    return tuple(None if layer < full else hf["sliding_window"] for layer in range(num_layers))
