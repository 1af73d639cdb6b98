"""Command R: LayerNorm without biases, attention and MLP beside each other behind one norm, neighbours paired in rotary
embeddings; Command R7B (Cohere 2) has windows, and no rotary embedding in the layers without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.smollm3 import with_no_rope


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(**{**_fields(hf, theta=500000.0), "qk_norm": bool(hf.get("use_qk_norm")), "qk_norm_of": "own"})


def cohere2_config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = _fields({**hf, "head_dim": None}, theta=10000.0)
    layers, pattern = fields["num_layers"], hf.get("sliding_window_pattern", 4)
    kinds = hf.get("layer_types") or [
        "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)
    ]
    window = hf.get("sliding_window", 4096)
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])
    return DecoderConfig(
        **{
            **fields,
            "rope": with_no_rope(fields["rope"]),
            "layer_rope": tuple(1 if window is None else 0 for window in windows),
            "layer_window": windows,
        }
    )


def _fields(hf: Mapping[str, Any], theta: float) -> dict[str, Any]:
    return {
        **common_fields({"tie_word_embeddings": True, **hf}, theta=theta),
        "norm": "layer",
        "norm_eps": hf.get("layer_norm_eps", 1e-5),
        "parallel": True,
        "shared_norm": True,
        "rope_interleaved": True,
        "logits_scale": hf.get("logit_scale", 0.0625),
    }
