"""Gemma 1 and 2: scaled embeddings and norms that store weight - 1 (Gemma Team 2024, arXiv:2403.08295); Gemma 2 caps
scores and has every other layer see a window (arXiv:2408.00118).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.names import WeightNames

#: of Gemma 2 and 3, which have norms on both sides
NAMES = WeightNames(mlp_norm="pre_feedforward_layernorm")


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(**gemma_fields(hf))


def gemma2_config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = gemma_fields(hf)
    kinds = hf.get("layer_types") or ["sliding_attention", "full_attention"] * fields["num_layers"]
    window = hf.get("sliding_window", 4096)
    windows = [window if kind == "sliding_attention" else None for kind in kinds[: fields["num_layers"]]]
    return DecoderConfig(
        **{
            **fields,
            "layer_window": tuple(windows),
            "post_norms": True,
            "attention_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
            "attention_softcap": hf.get("attn_logit_softcapping", 50.0),
            "logits_softcap": hf.get("final_logit_softcapping", 30.0),
            "names": NAMES,
        }
    )


def gemma_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of `DecoderConfig` that all Gemmas share.

    Raises:
        KeyError, ValidationError: as `common_fields`.
    """
    if hf.get("use_bidirectional_attention"):
        raise ValidationError(
            "use_bidirectional_attention=true is for Gemma3TextModel, to be pooled: what generates is causal"
        )
    activation = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu_pytorch_tanh"
    # Google's first configs say "gelu", and mean the tanh form
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    fields = common_fields({"head_dim": 256, "tie_word_embeddings": True, **hf, "hidden_act": activation})
    return {**fields, "norm_offset": 1.0, "embedding_scale": fields["hidden_size"] ** 0.5}
