"""Arcee's AFM: Llama with an MLP without a gate, whose activation is a squared ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.names import WeightNames

NAMES = WeightNames(gate_up=("mlp.up_proj",))


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields({"hidden_act": "relu2", "rms_norm_eps": 1e-5, **hf})
    return DecoderConfig(**{**fields, "gated_mlp": False, "names": NAMES})
