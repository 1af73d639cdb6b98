"""Qwen2-VL (arXiv:2409.12191) and Qwen2.5-VL (arXiv:2502.13923): Qwen2 over texts and pictures, with positions of three
axes: time, row and column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.models import qwen2
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import MAX_MODEL_LEN
from jaxllm.models.qwen_vision import vision_config


def config_from_hf(hf: Mapping[str, Any], *, gated: bool = False) -> DecoderConfig:
    """Of Qwen2-VL, or with `gated` of Qwen2.5-VL.

    Raises:
        KeyError, ValidationError: as `common_fields` and `vision_config`.
    """
    text = text_alone(hf)
    sections = _sections(text)
    own = {"rope_scaling": _without_sections(text.get("rope_scaling") or text.get("rope_parameters"))}
    model = qwen2.config_from_hf({**text, **own, "rope_parameters": None, MAX_MODEL_LEN: hf.get(MAX_MODEL_LEN)})
    half = model.head_dim // 2
    if len(sections) != 3 or sum(sections) != half:
        raise ValidationError(
            f"mrope_section={list(sections)} of config.json must have three numbers that add up to half of a head, "
            f"{half}"
        )
    vision = vision_config(hf["vision_config"], gated=gated, output_size=model.hidden_size)
    return dataclasses.replace(model, rope_sections=sections, vision=vision)


def qwen2_5_config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    return config_from_hf(hf, gated=True)


def text_alone(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the language model, which older configs have beside `vision_config` and newer ones in
    `text_config`.
    """
    text = hf.get("text_config") or {}
    return {**{name: value for name, value in hf.items() if name not in ("vision_config", "text_config")}, **text}


def _sections(text: Mapping[str, Any]) -> tuple[int, ...]:
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    return tuple(scaling.get("mrope_section") or (16, 24, 24))


def _without_sections(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """A scaling as models with positions of one axis have it."""
    kept = {name: value for name, value in (scaling or {}).items() if name != "mrope_section"}
    for name in ("type", "rope_type"):
        if kept.get(name) == "mrope":
            kept[name] = "default"
    return kept or {"rope_type": "default"}
