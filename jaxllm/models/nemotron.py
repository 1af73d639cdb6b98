"""Nemotron 4 and Minitron: LayerNorm whose weights are stored less 1, an MLP without a gate, whose activation is a
squared ReLU, a part of each head turns (Parmar et al. 2024, arXiv:2402.16819).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.arcee import NAMES
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        **{
            **common_fields({"hidden_act": "relu2", **hf}, rotary_factor=0.5),
            "norm": "layer",
            "norm_bias": True,
            "norm_offset": 1.0,
            "norm_eps": hf.get("norm_eps", 1e-5),
            "gated_mlp": False,
            "names": NAMES,
        }
    )
