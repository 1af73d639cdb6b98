"""Gemma 3: local and global layers, norms on both sides of attention and MLP, scaled embeddings (Gemma Team 2025,
arXiv:2503.19786); and where it sees pictures, SigLIP's tower, of whose features the mean is taken over squares of
neighbours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.layers.rope import Rotary
from jaxllm.models.clip_vision import clip_config
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.gemma import NAMES, gemma_fields
from jaxllm.models.llama import MAX_MODEL_LEN, rope
from jaxllm.models.projector import ProjectorConfig


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = gemma_fields(hf)
    layers, head_dim = fields["num_layers"], fields["head_dim"]
    kinds = hf.get("layer_types") or _layer_types(layers, hf.get("sliding_window_pattern", 6))
    window = hf.get("sliding_window", 4096)
    local = [kind == "sliding_attention" for kind in kinds]
    return DecoderConfig(
        **{
            **fields,
            # scaled in the config already
            "max_position_embeddings": hf["max_position_embeddings"],
            "rope": _rope(hf, head_dim),
            "layer_rope": tuple(1 if is_local else 0 for is_local in local),
            "layer_window": tuple(window if is_local else None for is_local in local),
            "qk_norm": True,
            "post_norms": True,
            "names": NAMES,
            "attention_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
            "attention_softcap": hf.get("attn_logit_softcapping"),
            "logits_softcap": hf.get("final_logit_softcapping"),
        }
    )


def embedding_config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """EmbeddingGemma, whose tokens see those behind them too where `use_bidirectional_attention` says so; a window then
    reaches half as far, in both directions (Schechter Vera et al. 2025, arXiv:2509.20354).
    """
    if not hf.get("use_bidirectional_attention"):
        return config_from_hf(hf)
    window = hf.get("sliding_window", 4096) // 2 + 1
    model = config_from_hf({**hf, "use_bidirectional_attention": False, "sliding_window": window})
    return dataclasses.replace(model, causal=False)


#: what `text_config` leaves out when it is this, as Google's own checkpoints do
_TEXT_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}


def image_config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Of a model that sees pictures, which reads text as the text model does.

    Raises:
        KeyError, ValidationError: as `common_fields` and `clip_config`.
    """
    model = config_from_hf({**text_alone(hf), MAX_MODEL_LEN: hf.get(MAX_MODEL_LEN)})
    vision = hf["vision_config"]
    patches = vision.get("image_size", 224) // vision.get("patch_size", 16)
    tokens = hf.get("mm_tokens_per_image", 256)
    side = math.isqrt(tokens)
    if side**2 != tokens or not 0 < side <= patches or patches % side:
        raise ValidationError(
            f"mm_tokens_per_image={tokens} of config.json must be a square whose side divides the {patches} patches of "
            "a picture's side"
        )
    eps = vision.get("layer_norm_eps", 1e-6)
    projector = ProjectorConfig(output_size=model.hidden_size, pooled_side=patches // side, norm_eps=eps)
    return dataclasses.replace(model, vision=clip_config(vision, projector), sees_whole_pictures=True)


def text_alone(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text part by itself."""
    text = hf["text_config"]
    special = {name: hf[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in hf}
    tied = hf.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    own = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "tie_word_embeddings": tied}
    return {**_TEXT_DEFAULTS, **special, **text, **own}


def _layer_types(num_layers: int, pattern: int) -> list[str]:
    """Every `pattern`-th layer sees everything."""
    return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(num_layers)]


def _rope(hf: Mapping[str, Any], head_dim: int) -> tuple[Rotary, Rotary]:
    """(global, local). Older configs have two thetas at the top level, newer ones `rope_parameters` by layer type."""
    parameters = hf.get("rope_parameters") or {
        "full_attention": {**(hf.get("rope_scaling") or {}), "rope_theta": hf.get("rope_theta", 1e6)},
        "sliding_attention": {"rope_theta": hf.get("rope_local_base_freq", 1e4)},
    }
    whole, local = parameters["full_attention"], parameters["sliding_attention"]
    return (
        rope(hf, head_dim, whole.get("rope_theta", 1e6), whole),
        rope(hf, head_dim, local.get("rope_theta", 1e4), local),
    )
