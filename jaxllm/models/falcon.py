"""Falcon: LayerNorm, an MLP without a gate beside attention, one KV head or few; the larger ones have a norm for each
of the two (Almazrouei et al. 2023, arXiv:2311.16867).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields
from jaxllm.models.names import WeightNames

NAMES = WeightNames(
    prefix="transformer.",
    layer="h.{layer}.",
    embedding="word_embeddings",
    norm="ln_f",
    qkv=("self_attention.query_key_value",),
    qkv_by_head=True,
    output="self_attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
_OWN_NORMS = dataclasses.replace(NAMES, attention_norm="ln_attn", mlp_norm="ln_mlp")


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    if hf.get("alibi"):
        raise ValidationError("alibi=true of Falcon is not supported: supported are rotary embeddings.")
    heads, is_new = hf["num_attention_heads"], bool(hf.get("new_decoder_architecture"))
    parallel = is_new or hf.get("parallel_attn", True)
    norms = hf.get("num_ln_in_parallel_attn") or (2 if is_new else 1)
    if norms not in ((1, 2) if is_new else (1,)):
        flag = f"new_decoder_architecture={str(is_new).lower()}"
        raise ValidationError(f"num_ln_in_parallel_attn={norms} of Falcon is not supported with {flag}.")
    kv_heads = (hf.get("num_kv_heads") or heads) if is_new else 1 if hf.get("multi_query", True) else heads
    has_biases = bool(hf.get("bias"))
    fields = common_fields(
        {
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            **hf,
            "intermediate_size": hf.get("ffn_hidden_size") or 4 * hf["hidden_size"],
            "hidden_act": hf.get("activation") or "gelu",
            "num_key_value_heads": kv_heads,
            "head_dim": None,
            "attention_bias": has_biases,
            "mlp_bias": has_biases,
        }
    )
    return DecoderConfig(
        **{
            **fields,
            "norm": "layer",
            "norm_bias": True,
            "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
            "parallel": parallel,
            "shared_norm": parallel and norms == 1,
            "gated_mlp": False,
            "names": _OWN_NORMS if norms == 2 else NAMES,
        }
    )
