"""OLMo 2: norms behind the branches only, and over all heads of queries and keys together (OLMo Team 2024,
arXiv:2501.00656).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    fields = common_fields({"rms_norm_eps": 1e-5, **hf})
    return DecoderConfig(**{**fields, "pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_of": "joint"})
