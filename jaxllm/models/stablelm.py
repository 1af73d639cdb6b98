"""StableLM: Llama with LayerNorm, a part of each head that turns, and, in its larger models, the MLP beside attention
and norms of each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.names import WeightNames

NAMES = WeightNames(query_norm="self_attn.q_layernorm.norms.{head}", key_norm="self_attn.k_layernorm.norms.{head}")


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    parallel = hf.get("use_parallel_residual", False)
    return DecoderConfig(
        **{
            **common_fields({**hf, "head_dim": None}, rotary_factor=0.25),
            "norm": "layer",
            "norm_bias": True,
            "norm_eps": hf.get("layer_norm_eps", 1e-5),
            "parallel": parallel,
            "shared_norm": parallel,
            "qkv_bias": hf.get("use_qkv_bias", False),
            "output_bias": False,
            "mlp_bias": False,
            "qk_norm": hf.get("qk_layernorm", False),
            "qk_norm_of": "own",
            "names": NAMES,
        }
    )
