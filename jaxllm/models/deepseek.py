"""DeepSeek-V2, V3 and R1: latent attention (`layers.mla`); layers with experts are refused (DeepSeek-AI 2024,
arXiv:2405.04434 and arXiv:2412.19437).

The layers for predicting several tokens, which checkpoints of V3 have behind the last one, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.layers.mla import LatentConfig
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.llama import common_fields, rope_scaling
from jaxllm.models.rope_scaling import kind_of

_DIMS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(**_fields(hf))


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf.get("attention_bias"):
        raise ValidationError("attention_bias=true is not supported for latent attention; only false is.")
    if hf.get("quantization_config"):
        kind = hf["quantization_config"].get("quant_method")
        raise ValidationError(
            f"the checkpoint's weights are quantized (quant_method {kind!r}), which cannot be read yet; take one in "
            "bfloat16."
        )
    if hf.get("n_routed_experts") and hf.get("first_k_dense_replace", 0) < hf["num_hidden_layers"]:
        raise ValidationError(
            f"layers from first_k_dense_replace={hf.get('first_k_dense_replace', 0)} on have "
            f"{hf['n_routed_experts']} experts, which are not supported yet; what works are layers without."
        )
    rank, plain, turned, value = (hf[name] for name in _DIMS)
    # rotary embeddings turn a part of each head, which is all of what `common_fields` is told
    fields = common_fields({**hf, "head_dim": turned, "num_key_value_heads": None})
    latents = LatentConfig(
        query_rank=hf.get("q_lora_rank"), rank=rank, plain_dim=plain, turned_dim=turned, value_dim=value
    )
    return {
        **fields,
        "head_dim": latents.query_dim,
        "latents": latents,
        "attention_scale": _attention_scale(hf, latents.query_dim),
        "rope_interleaved": hf.get("rope_interleave", True),
    }


def _attention_scale(hf: Mapping[str, Any], dim: int) -> float:
    """With yarn, scores grow with the square of what its paper has for the length of the context."""
    scaling = rope_scaling(hf) or {}
    weight = scaling.get("mscale_all_dim") or 0.0
    if kind_of(scaling) == "default" or not weight or scaling["factor"] <= 1:
        return dim**-0.5
    return dim**-0.5 * (0.1 * weight * math.log(scaling["factor"]) + 1.0) ** 2
