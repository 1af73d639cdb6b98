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
    "phi2": ("PhiForCausalLM", "phi"),
    "starcoder2": ("Starcoder2ForCausalLM", "starcoder2"),
    "nemotron": ("NemotronForCausalLM", "nemotron"),
    "arcee": ("ArceeForCausalLM", "arcee"),
    "seed_oss": ("SeedOssForCausalLM", "seed_oss"),
    "ernie4_5": ("Ernie4_5ForCausalLM", "ernie4_5"),
    "exaone4": ("Exaone4ForCausalLM", "exaone4"),
    "hunyuan-dense": ("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense"),
    "command-r": ("CohereForCausalLM", "cohere"),
    "cohere2": ("Cohere2ForCausalLM", "cohere2"),
    "glm4": ("Glm4ForCausalLM", "glm4"),
    "qwen2moe": ("Qwen2MoeForCausalLM", "qwen2_moe"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "olmoe": ("OlmoeForCausalLM", "olmoe"),
    "deepseek2": ("DeepseekV2ForCausalLM", "deepseek_v2"),
    "gpt-oss": ("GptOssForCausalLM", "gpt_oss"),
}
#: families of which a part of each head turns
PARTIAL_ROTARY = frozenset(("phi3", "gptneox", "stablelm", "glm4", "phi2", "nemotron"))
#: families with LayerNorm
LAYER_NORM = frozenset(("gptneox", "stablelm", "command-r", "cohere2", "phi2", "starcoder2", "nemotron"))
#: families that may have experts; those of the architecture "llama" are Mixtrals
SPARSE = frozenset(("llama", "qwen2moe", "qwen3moe", "olmoe", "deepseek2", "gpt-oss"))

# The sizes that llama.cpp recognises by their depth: those whose attention scale is not 1/sqrt(head_dim).
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
# how routers make probabilities of scores, as files number it
_SOFTMAX, _SIGMOID = 1, 2


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
    if view.metadata.get("llama.expert_count"):
        fields |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"} | _experts(
            view, "num_local_experts"
        )
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
    """With windows it is an OLMo 3, whose rotary embedding is stretched in global layers only."""
    window = view.count("attention.sliding_window", None)
    if window is None:
        return {}
    own = {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": window}
    return own | _layer_types(view)


def _layer_types(view: MetadataView) -> dict[str, Any]:
    """Which layers have a window, where the file says it; else the family knows."""
    pattern = view.metadata.get(f"{view.architecture}.attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        return {}
    return {"layer_types": ["sliding_attention" if has_window else "full_attention" for has_window in pattern]}


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


def _phi2(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "gelu_new"}


def _starcoder2(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    """Files say nothing of the window, which all published models have."""
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": config["layer_norm_eps"],
        "sliding_window": view.count("attention.sliding_window", 4096),
        "use_bias": "blk.0.attn_q.bias" in tensors,
    }


def _biases(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _nemotron(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "relu2", "norm_eps": config["layer_norm_eps"], **_biases(tensors)}


def _arcee(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "relu2", **_biases(tensors)}


def _seed_oss(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_biases(tensors), "attention_out_bias": "blk.0.attn_output.bias" in tensors}


def _ernie4_5(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_bias": "blk.0.attn_q.bias" in tensors}


def _exaone4(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    """The larger model's file has a window, and perhaps which layers have it; else all but every fourth do."""
    return {"sliding_window": view.count("attention.sliding_window", None), **_layer_types(view)}


def _hunyuan(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    """The base is written as the scaling has made it."""
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors}


def _command_r(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"logit_scale": view.positive("logit_scale"), "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors}


def _cohere2(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"logit_scale": view.positive("logit_scale"), "sliding_window": view.count("attention.sliding_window")}


def _glm4(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in tensors}


def _experts(view: MetadataView, count: str) -> dict[str, Any]:
    """How many there are, under HF's name `count`, and how many of them a token goes to."""
    return {count: view.count("expert_count"), "num_experts_per_tok": view.count("expert_used_count")}


def _qwen2_moe(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_experts(view, "num_experts"),
        "moe_intermediate_size": view.count("expert_feed_forward_length"),
        "shared_expert_intermediate_size": view.count("expert_shared_feed_forward_length"),
        "norm_topk_prob": False,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
    }


def _qwen3_moe(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_experts(view, "num_experts"),
        "moe_intermediate_size": view.count("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _olmoe(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    clip = view.positive("attention.clamp_kqv", None)
    return {**_experts(view, "num_experts"), "norm_topk_prob": False, "clip_qkv": clip}


def _gpt_oss(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    """Every second layer is global; frequencies are not rounded to whole dimensions."""
    return {
        **_experts(view, "num_local_experts"),
        "intermediate_size": view.count("expert_feed_forward_length"),
        "sliding_window": view.count("attention.sliding_window"),
        "rope_scaling": {**config.get("rope_scaling", {"rope_type": "default"}), "truncate": False},
    }


def _deepseek2(view: MetadataView, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSeek-V2, or V3 where experts are chosen by sigmoids. Newer files describe the attention that is computed, of
    one head of latents, and have the lengths of the model's heads under keys of their own.
    """
    key, value = (
        view.count(f"attention.{name}_length_mla", None) or view.count(f"attention.{name}_length")
        for name in ("key", "value")
    )
    turned = view.count("rope.dimension_count")
    gating = view.get("deepseek2.expert_gating_func", int, _SOFTMAX)
    if gating not in (_SOFTMAX, _SIGMOID):
        raise WeightsError(f"{view.source}: expert_gating_func {gating} is not supported; known are 1 and 2")
    groups = view.count("expert_group_count", 1)
    fields: dict[str, Any] = {
        **_experts(view, "n_routed_experts"),
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": view.count("attention.q_lora_rank", None),
        "kv_lora_rank": view.count("attention.kv_lora_rank"),
        "qk_nope_head_dim": key - turned,
        "qk_rope_head_dim": turned,
        "v_head_dim": value,
        "first_k_dense_replace": view.get("deepseek2.leading_dense_block_count", int, 0),
        "moe_intermediate_size": view.count("expert_feed_forward_length"),
        "n_shared_experts": view.get("deepseek2.expert_shared_count", int, 0),
        "routed_scaling_factor": view.positive("expert_weights_scale", 1.0),
        "norm_topk_prob": view.get("deepseek2.expert_weights_norm", bool, False),
        "n_group": groups,
        "topk_group": view.count("expert_group_used_count", 1),
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
    }
    if gating == _SIGMOID:
        fields |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "topk_method": "noaux_tc"}
    weight = view.positive("rope.scaling.yarn_log_multiplier", None)
    if weight is not None and "rope_scaling" in config:
        # published models have one value for both
        factor = round(10 * weight, 6)
        fields["rope_scaling"] = {**config["rope_scaling"], "mscale": factor, "mscale_all_dim": factor}
    return fields


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
    "phi2": _phi2,
    "starcoder2": _starcoder2,
    "nemotron": _nemotron,
    "arcee": _arcee,
    "seed_oss": _seed_oss,
    "ernie4_5": _ernie4_5,
    "exaone4": _exaone4,
    "hunyuan-dense": _hunyuan,
    "command-r": _command_r,
    "cohere2": _cohere2,
    "glm4": _glm4,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek2": _deepseek2,
    "gpt-oss": _gpt_oss,
}
