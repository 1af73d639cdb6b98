"""EXAONE 4: norms behind the branches and of each head; in the larger model three of four layers have a window, and the
others no rotary embedding (LG AI Research 2025, arXiv:2507.11407).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.smollm3 import with_no_rope


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields({"rms_norm_eps": 1e-5, "num_key_value_heads": 32, **hf})
    fields = {**fields, "pre_norms": False, "post_norms": True, "qk_norm": True}
    window = hf.get("sliding_window", 4096)
    if window is None:
        return DecoderConfig(**fields)
    is_local = [kind == "sliding_attention" for kind in _kinds(hf, fields["num_layers"])]
    return DecoderConfig(
        **{
            **fields,
            "rope": with_no_rope(fields["rope"]),
            "layer_rope": tuple(0 if sees_part else 1 for sees_part in is_local),
            "layer_window": tuple(window if sees_part else None for sees_part in is_local),
        }
    )


def _kinds(hf: Mapping[str, Any], num_layers: int) -> list[str]:
    """Of each layer. A pattern is a text such as "LLLG", local and global layers, whose last layer is global at all
    times, or the distance between global layers.
    """
    if hf.get("layer_types"):
        return hf["layer_types"][:num_layers]
    pattern = hf.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):
        is_local = [pattern[layer % len(pattern)] == "L" and layer < num_layers - 1 for layer in range(num_layers)]
    else:
        is_local = [bool(pattern) and (layer + 1) % pattern > 0 for layer in range(num_layers)]
    return ["sliding_attention" if sees_part else "full_attention" for sees_part in is_local]
