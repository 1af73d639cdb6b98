"""ModernBERT, an encoder that is built as decoders are: rotary embeddings, gates, norms in front, and in most layers
windows that reach both ways (Warner et al. 2024, arXiv:2412.13663).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.layers.activation import ACTIVATIONS
from jaxllm.layers.rope import Rotary
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llama import common_fields, rope
from jaxllm.models.names import ClassifierNames, WeightNames

NAMES = WeightNames(
    embedding="embeddings.tok_embeddings",
    embedding_norm="embeddings.norm",
    norm="final_norm",
    attention_norm="attn_norm",
    qkv=("attn.Wqkv",),
    output="attn.Wo",
    mlp_norm="mlp_norm",
    gate_up=("mlp.Wi",),
    down="mlp.Wo",
)
#: of the rotary embeddings: of layers that see all, and of those that see a window
_THETAS = {"full_attention": ("global_rope_theta", 160000.0), "sliding_attention": ("local_rope_theta", 10000.0)}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The model of a config.json.

    Raises:
        KeyError, ValidationError: as `common_fields`.
    """
    hf = {"max_position_embeddings": 8192, **hf, "hidden_act": hf.get("hidden_activation") or "gelu"}
    own_rope = ("rope_parameters", "rope_scaling")
    fields = common_fields({name: value for name, value in hf.items() if name not in own_rope})
    layers, every = fields["num_layers"], hf.get("global_attn_every_n_layers") or 3
    kinds = hf.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    local = [kind == "sliding_attention" for kind in kinds]
    activation = hf.get("classifier_activation") or "gelu"
    if activation not in ACTIVATIONS:
        raise ValidationError(
            f"classifier_activation {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    norm_bias = bool(hf.get("norm_bias"))
    classifier = ClassifierNames(
        dense="head.dense",
        classifier="classifier",
        activation=activation,
        norm="head.norm",
        dense_bias=bool(hf.get("classifier_bias")),
        norm_bias=norm_bias,
    )
    # `local_attention` counts both directions
    window = hf.get("local_attention", 128) // 2 + 1
    own = {
        "norm": "layer",
        "norm_eps": hf.get("norm_eps", 1e-5),
        "norm_bias": norm_bias,
        "embedding_norm": True,
        "first_norm": False,
        "rope": tuple(_rope(hf, fields["head_dim"], kind) for kind in _THETAS),
        "layer_rope": tuple(1 if is_local else 0 for is_local in local),
        "layer_window": tuple(window if is_local else None for is_local in local),
        "causal": False,
        "classifier": classifier,
        "names": NAMES,
    }
    return DecoderConfig(**{**fields, **own})


def _rope(hf: Mapping[str, Any], head_dim: int, kind: str) -> Rotary:
    """Older configs have two thetas at the top level, newer ones `rope_parameters` by kind of layer."""
    name, theta = _THETAS[kind]
    parameters = {**(hf.get("rope_scaling") or {}), **((hf.get("rope_parameters") or {}).get(kind) or {})}
    return rope(hf, head_dim, parameters.get("rope_theta") or hf.get(name) or theta, parameters)
