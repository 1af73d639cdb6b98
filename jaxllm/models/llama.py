"""Llama 2 and 3, and the fields of a Hugging Face config that the dense families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.layers.activation import ACTIVATIONS
from jaxllm.layers.rope import Rotary
from jaxllm.models.decoder_config import DecoderConfig, attention_scale
from jaxllm.models.rope_scaling import kind_of, longest_context, rotary

#: what `registry` adds to a config.json: the length that the engine is asked to run, None where nobody says
MAX_MODEL_LEN = "max_model_len"


def common_fields(
    hf: Mapping[str, Any], *, theta: float = 10000.0, rotary_factor: float | None = None
) -> dict[str, Any]:
    """Constructor arguments of `DecoderConfig` for a Llama-like config.json.

    Args:
        theta: of the rotary embedding where the config has none.
        rotary_factor: which part of each head turns where the config does not say; None: the family turns whole heads,
            and a config that says otherwise is refused.

    Raises:
        KeyError: a field is missing.
        ValidationError: a field has a value that the decoder cannot compute.
    """
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    activation = hf.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise ValidationError(f"hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    if heads % kv_heads:
        raise ValidationError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    scaling, rotary_dim = rope_scaling(hf), head_dim
    if rotary_factor is not None:
        scaling = dict(scaling or {})
        rotary_dim = int(
            head_dim * scaling.pop("partial_rotary_factor", hf.get("partial_rotary_factor", rotary_factor))
        )
    if rotary_dim % 2:
        of = "head_dim" if rotary_dim == head_dim else f"partial_rotary_factor x head_dim ({head_dim})"
        raise ValidationError(f"{of}={rotary_dim} is odd; rotary embeddings need an even one")
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": longest_context(scaling, hf["max_position_embeddings"]),
        "default_length": default_length(hf),
        "rope": (rope(hf, rotary_dim, rope_theta(hf, theta), scaling),),
        "layer_rope": (0,) * layers,
        "layer_window": (None,) * layers,
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        "qkv_bias": bool(hf.get("attention_bias")),
        "output_bias": bool(hf.get("attention_bias")),
        "mlp_bias": bool(hf.get("mlp_bias")),
        "activation": activation,
        "attention_scale": attention_scale(head_dim),
    }


def rope(hf: Mapping[str, Any], head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Rotary:
    """One of a model's rotary embeddings, for the length that the engine runs.

    Args:
        head_dim: how many numbers of a head turn.
    """
    longest = hf.get(MAX_MODEL_LEN) or default_length(hf) or longest_context(scaling, hf["max_position_embeddings"])
    trained = hf["max_position_embeddings"]
    return rotary(head_dim, theta, scaling, max_position_embeddings=trained, max_model_len=longest)


def rope_theta(hf: Mapping[str, Any], default: float = 10000.0) -> float:
    """`rope_theta`, where older (top level) or newer (`rope_parameters`) configs have it."""
    return (
        (rope_scaling(hf) or {}).get("rope_theta")
        or (hf.get("rope_parameters") or {}).get("rope_theta")
        or hf.get("rope_theta")
        or default
    )


def rope_scaling(hf: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`rope_scaling` or `rope_parameters`, with the length that some configs have beside it."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters")
    original = hf.get("original_max_position_embeddings")
    if not scaling or original is None:
        return scaling
    return {**scaling, "original_max_position_embeddings": original}


def default_length(hf: Mapping[str, Any]) -> int | None:
    """The engine's `max_model_len` unless one is asked for; None: the longest context. As in vLLM, longrope's long
    factors, with which short texts come out worse, are for those who ask for long ones.
    """
    original = hf.get("original_max_position_embeddings")
    return original if kind_of(hf.get("rope_scaling") or hf.get("rope_parameters")) == "longrope" else None


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(**common_fields(hf))
