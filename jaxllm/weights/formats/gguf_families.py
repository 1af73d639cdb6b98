"""What a GGUF file's metadata says of one family only, as the fields that Hugging Face's config.json has for it.

Constants of a family that llama.cpp knows by heart are here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.gguf_header import TensorInfo

if TYPE_CHECKING:
    from jaxllm.weights.formats.gguf_config import MetadataView

#: GGUF's architecture -> Hugging Face's class and model_type
MODEL_CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma": ("GemmaForCausalLM", "gemma"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "granite": ("GraniteForCausalLM", "granite"),
    "olmo2": ("Olmo2ForCausalLM", "olmo2"),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3"),
    "gptneox": ("GPTNeoXForCausalLM", "gpt_neox"),
    "stablelm": ("StableLmForCausalLM", "stablelm"),
    "command-r": ("CohereForCausalLM", "cohere"),
    "cohere2": ("Cohere2ForCausalLM", "cohere2"),
    "glm4": ("Glm4ForCausalLM", "glm4"),
}
#: families of which a part of each head turns
PARTIAL_ROTARY = frozenset(("phi3", "gptneox", "stablelm", "glm4"))
#: families with LayerNorm
LAYER_NORM = frozenset(("gptneox", "stablelm", "command-r", "cohere2"))

# The sizes that llama.cpp recognises by their depth: those whose attention scale is not 1/sqrt(head_dim).
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62


def family_fields(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that only this family's config.json has.

    Args:
        config: the fields that all families share.

    Raises:
        WeightsError: a key is missing or malformed, or names what the family here does not compute.
    """
    family = _FIELDS.get(view.architecture)
    return family(view, tensors, config) if family else {}


def _llama(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }
    window = view.count("attention.sliding_window", None)
    if window is not None:
        # Llama has no window: with one, the file was made from a Mistral.
        fields |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return fields


def _gemma(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    """Every second layer is global."""
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": view.count("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _query_scalar(config, _GEMMA2_27B_LAYERS),
        "attn_logit_softcapping": view.positive("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": view.positive("final_logit_softcapping", 30.0),
    }


def _gemma3(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    """Every sixth layer is global; local ones rotate with theta 10,000. The file stores the window only."""
    layers = config["num_hidden_layers"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": view.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
        "rope_local_base_freq": view.positive("rope.freq_base_swa", 10_000.0),
        "query_pre_attn_scalar": _query_scalar(config, _GEMMA3_27B_LAYERS),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _query_scalar(config: Mapping[str, Any], layers_of_27b: int) -> int:
    if config["num_hidden_layers"] == layers_of_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _phi3(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    # 0 is written where there is no window
    return {"sliding_window": view.get("phi3.attention.sliding_window", int, 0) or None}


def _granite(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention_multiplier": view.positive("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": view.positive("embedding_scale", 1.0),
        "residual_multiplier": view.positive("residual_scale", 1.0),
        "logits_scaling": view.positive("logit_scale", 1.0),
    }


def _olmo2(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    if view.count("attention.sliding_window", None) is not None:
        raise WeightsError(f"{view.source}: an OLMo with windows (OLMo 3) is not supported; use an OLMo 2")
    return {}


def _gpt_neox(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_act": "gelu",
        "use_parallel_residual": view.get("gptneox.use_parallel_residual", bool, True),
        "attention_bias": "blk.0.attn_qkv.bias" in tensors,
    }


def _stablelm(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "use_parallel_residual": view.get("stablelm.use_parallel_residual", bool, False),
        "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
    }


def _command_r(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"logit_scale": view.positive("logit_scale"), "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors}


def _cohere2(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"logit_scale": view.positive("logit_scale"), "sliding_window": view.count("attention.sliding_window")}


def _glm4(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in tensors}


_FIELDS: dict[str, Callable[..., dict[str, Any]]] = {
    "llama": _llama,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "olmo2": _olmo2,
    "gptneox": _gpt_neox,
    "stablelm": _stablelm,
    "command-r": _command_r,
    "cohere2": _cohere2,
    "glm4": _glm4,
}
