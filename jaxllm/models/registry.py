"""Which family computes which Hugging Face architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxllm.errors import ValidationError
from jaxllm.models import gemma3, llama, mistral, qwen2, qwen3
from jaxllm.models.decoder import DecoderConfig

#: HF class name -> the family's reading of config.json
ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "LlamaForCausalLM": llama.config_from_hf,
    "MistralForCausalLM": mistral.config_from_hf,
    "Qwen2ForCausalLM": qwen2.config_from_hf,
    "Qwen3ForCausalLM": qwen3.config_from_hf,
    "Gemma3ForCausalLM": gemma3.config_from_hf,
}


def model_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """The model that a config.json describes.

    Raises:
        ValidationError: an unknown architecture (the text lists the known ones), a missing field, or a value that
            the decoder cannot compute.
    """
    names: Sequence[str] = hf.get("architectures") or ()
    for name in names:
        if name in ARCHITECTURES:
            try:
                return ARCHITECTURES[name](hf)
            except KeyError as error:
                raise ValidationError(f"config.json has no field {error.args[0]!r}, which {name} needs") from None
    shown = ", ".join(names) or f"none (model_type {hf.get('model_type')!r})"
    raise ValidationError(f"Model architectures [{shown}] are not supported. Supported: {', '.join(ARCHITECTURES)}.")
