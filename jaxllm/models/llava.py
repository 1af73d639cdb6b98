"""LLaVA 1.5 (Liu et al. 2023, arXiv:2310.03744): a language model behind CLIP's or SigLIP's tower and two matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.layers.activation import ACTIVATIONS
from jaxllm.models import llama, mistral, qwen2
from jaxllm.models.clip_vision import clip_config
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.projector import ProjectorConfig

#: `model_type` of text_config -> the class of the language model, its reading, and what its config leaves out
_TEXTS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        llama.config_from_hf,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    ),
    "mistral": ("MistralForCausalLM", mistral.config_from_hf, {}),
    "qwen2": ("Qwen2ForCausalLM", qwen2.config_from_hf, {}),
}
_STRATEGIES = ("default", "full")


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """
    Raises:
        KeyError, ValidationError: as `common_fields` and `clip_config`.
    """
    text = text_alone(hf)
    _, read, _ = _TEXTS[text["model_type"]]
    model = read({**text, llama.MAX_MODEL_LEN: hf.get(llama.MAX_MODEL_LEN)})
    strategy = hf.get("vision_feature_select_strategy", "default")
    if strategy not in _STRATEGIES:
        raise ValidationError(f"vision_feature_select_strategy={strategy!r} must be one of {', '.join(_STRATEGIES)}")
    activation = hf.get("projector_hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ValidationError(
            f"projector_hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    bias = hf.get("multimodal_projector_bias", True)
    layers = hf.get("vision_feature_layer", -2)
    vision = clip_config(
        {"model_type": "clip_vision_model", **hf["vision_config"]},
        ProjectorConfig(output_size=model.hidden_size, activation=activation, bias=bias),
        feature_layers=tuple(layers) if isinstance(layers, list | tuple) else (layers,),
        drops_first=strategy == "default",
    )
    return dataclasses.replace(model, vision=vision)


def text_alone(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the language model by itself.

    Raises:
        ValidationError: it is of a family that is not read here.
    """
    text = hf["text_config"]
    kind = text.get("model_type", "llama")
    if kind not in _TEXTS:
        raise ValidationError(
            f"model_type {kind!r} of text_config is not supported in LLaVA; supported: {', '.join(_TEXTS)}"
        )
    name, _, defaults = _TEXTS[kind]
    tied = text.get("tie_word_embeddings", hf.get("tie_word_embeddings", False))
    special = {name: hf[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in hf}
    own = {"architectures": [name], "model_type": kind, "tie_word_embeddings": tied}
    return {**defaults, **special, **text, **own}
