"""SmolLM3: Llama whose layers are in part without rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.layers.rope import Rotary
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields({"tie_word_embeddings": True, **hf}, theta=2000000.0)
    layers, window = fields["num_layers"], hf.get("sliding_window")
    interval = hf.get("no_rope_layer_interval", 4)
    turned: Sequence[int] = hf.get("no_rope_layers") or [(layer + 1) % interval for layer in range(layers)]
    windows: tuple[int | None, ...] = (None,) * layers
    if hf.get("use_sliding_window") and window is not None:
        kinds = hf.get("layer_types") or ["full_attention" if has_rope else "sliding_attention" for has_rope in turned]
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])
    return DecoderConfig(
        **{
            **fields,
            "rope": with_no_rope(fields["rope"]),
            # what the field is called is not what it says: 1 is a layer with rotary embedding
            "layer_rope": tuple(0 if has_rope else 1 for has_rope in turned[:layers]),
            "layer_window": windows,
        }
    )


def with_no_rope(rope: tuple[Rotary, ...]) -> tuple[Rotary, Rotary]:
    """A model's rotary embedding, and as the second one that turns nothing."""
    (turning,) = rope
    return turning, Rotary((0.0,) * len(turning.inverse_frequencies))
