"""DeepSeek-V2, V3 and R1: latent attention (`layers.mla`), and experts behind the first layers (DeepSeek-AI 2024,
arXiv:2405.04434 and arXiv:2412.19437).

The layer for predicting several tokens, which checkpoints of V3 have behind the last one, is `mtp.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from jaxllm.api.errors import ValidationError
from jaxllm.layers.mla import LatentConfig
from jaxllm.layers.moe import MoEConfig
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields, rope_scaling
from jaxllm.models.rope_scaling import kind_of

#: what configs of DeepSeek-V3 leave out
_V3 = {
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
_DIMS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """DeepSeek-V3's experts are chosen by sigmoids and a bias."""
    check(hf, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    hf = {**_V3, **hf}
    sparse = experts(hf, groups=hf["n_group"], renormalise=bool(hf["norm_topk_prob"]), routing="sigmoid")
    return DecoderConfig(**_fields(hf), **sparse)


def v2_config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """DeepSeek-V2's experts are chosen by a softmax, in the best groups or among all."""
    check(hf, {"scoring_func": "softmax", "norm_topk_prob": False})
    method = hf.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise ValidationError(f"topk_method {method!r} is not supported; supported: greedy, group_limited_greedy")
    groups = hf["n_group"] if method == "group_limited_greedy" else 1
    return DecoderConfig(**_fields(hf), **experts(hf, groups=groups, renormalise=False, routing="softmax"))


def check(hf: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    """Refuse what no published model has, and implementations do not agree on."""
    for name, value in only.items():
        if hf.get(name, value) != value:
            raise ValidationError(f"{name}={hf[name]!r} is not supported; only {value!r} is.")


def experts(
    hf: Mapping[str, Any], *, groups: int, renormalise: bool, routing: Literal["softmax", "sigmoid"]
) -> dict[str, Any]:
    """Constructor arguments of `DecoderConfig`: none where there are no experts.

    Args:
        groups: of which the `topk_group` best ones have the experts of a token.
    """
    first, step = hf.get("first_k_dense_replace") or 0, hf.get("moe_layer_freq") or 1
    layers = tuple(i >= first and i % step == 0 for i in range(hf["num_hidden_layers"]))
    number = hf.get("n_routed_experts")
    if not number or not any(layers):
        return {}
    top_k, top_groups = hf["num_experts_per_tok"], hf["topk_group"] if groups > 1 else 1
    if number % groups or top_groups > groups or top_k > number // groups * top_groups:
        raise ValidationError(
            f"num_experts_per_tok={top_k} of n_routed_experts={number} cannot be chosen in the topk_group={top_groups} "
            f"best of n_group={groups}: groups have equally many experts, and the best ones enough."
        )
    moe = MoEConfig(
        num_experts=number,
        top_k=top_k,
        intermediate_size=hf["moe_intermediate_size"],
        routing=routing,
        renormalise=renormalise,
        groups=groups,
        top_groups=top_groups,
        scale=hf.get("routed_scaling_factor") or 1.0,
        shared_size=hf["moe_intermediate_size"] * (hf.get("n_shared_experts") or 0),
    )
    return {"moe": moe, "layer_moe": layers}


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf.get("attention_bias"):
        raise ValidationError("attention_bias=true is not supported for latent attention; only false is.")
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
