"""Which family computes which Hugging Face architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.models import (
    apertus,
    arcee,
    bert,
    cohere,
    deepseek,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    falcon,
    flex_olmo,
    gemma,
    gemma3,
    glm,
    glm4_moe,
    gpt2,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    granite_moe,
    hunyuan,
    llama,
    llava,
    llava_next,
    minimax_m2,
    mistral,
    mixtral,
    modernbert,
    nemotron,
    olmo2,
    olmo3,
    olmoe,
    opt,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen2_vl,
    qwen3,
    qwen3_moe,
    roberta,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from jaxllm.models.bert import BertConfig
from jaxllm.models.decoder_config import DecoderConfig

#: HF class name -> the family's reading of config.json
ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "LlamaForCausalLM": llama.config_from_hf,
    "MistralForCausalLM": mistral.config_from_hf,
    "Qwen2ForCausalLM": qwen2.config_from_hf,
    "Qwen3ForCausalLM": qwen3.config_from_hf,
    "MixtralForCausalLM": mixtral.config_from_hf,
    "Qwen2MoeForCausalLM": qwen2_moe.config_from_hf,
    "Qwen3MoeForCausalLM": qwen3_moe.config_from_hf,
    "OlmoeForCausalLM": olmoe.config_from_hf,
    "GptOssForCausalLM": gpt_oss.config_from_hf,
    "GemmaForCausalLM": gemma.config_from_hf,
    "Gemma2ForCausalLM": gemma.gemma2_config_from_hf,
    "Gemma3ForCausalLM": gemma3.config_from_hf,
    "Gemma3ForConditionalGeneration": gemma3.image_config_from_hf,
    "LlavaForConditionalGeneration": llava.config_from_hf,
    "LlavaNextForConditionalGeneration": llava_next.config_from_hf,
    "Phi3ForCausalLM": phi3.config_from_hf,
    "OPTForCausalLM": opt.config_from_hf,
    "GPT2LMHeadModel": gpt2.config_from_hf,
    "Starcoder2ForCausalLM": starcoder2.config_from_hf,
    "Olmo3ForCausalLM": olmo3.config_from_hf,
    "Exaone4ForCausalLM": exaone4.config_from_hf,
    "SeedOssForCausalLM": seed_oss.config_from_hf,
    # the second is what its first checkpoints say
    **dict.fromkeys(("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"), ernie4_5.config_from_hf),
    "ArceeForCausalLM": arcee.config_from_hf,
    "NemotronForCausalLM": nemotron.config_from_hf,
    "PhiForCausalLM": phi.config_from_hf,
    "GPTJForCausalLM": gptj.config_from_hf,
    "FalconForCausalLM": falcon.config_from_hf,
    "HunYuanDenseV1ForCausalLM": hunyuan.config_from_hf,
    "ApertusForCausalLM": apertus.config_from_hf,
    "GraniteForCausalLM": granite.config_from_hf,
    "Olmo2ForCausalLM": olmo2.config_from_hf,
    "SmolLM3ForCausalLM": smollm3.config_from_hf,
    "GPTNeoXForCausalLM": gpt_neox.config_from_hf,
    "StableLmForCausalLM": stablelm.config_from_hf,
    "CohereForCausalLM": cohere.config_from_hf,
    "Cohere2ForCausalLM": cohere.cohere2_config_from_hf,
    "DeepseekV2ForCausalLM": deepseek.v2_config_from_hf,
    "DeepseekV3ForCausalLM": deepseek.config_from_hf,
    "GlmForCausalLM": glm.config_from_hf,
    "Glm4ForCausalLM": glm.glm4_config_from_hf,
    "Glm4MoeForCausalLM": glm4_moe.config_from_hf,
    "Dots1ForCausalLM": dots1.config_from_hf,
    "MiniMaxM2ForCausalLM": minimax_m2.config_from_hf,
    "GraniteMoeForCausalLM": granite_moe.config_from_hf,
    "GraniteMoeSharedForCausalLM": granite_moe.shared_config_from_hf,
    "FlexOlmoForCausalLM": flex_olmo.config_from_hf,
    "Ernie4_5_MoeForCausalLM": ernie4_5_moe.config_from_hf,
    "Qwen2VLForConditionalGeneration": qwen2_vl.config_from_hf,
    "Qwen2_5_VLForConditionalGeneration": qwen2_vl.qwen2_5_config_from_hf,
}

CLASSIFIER_SUFFIX = "ForSequenceClassification"
#: families whose tokens see those behind them too
ENCODERS: dict[str, Callable[[Mapping[str, Any]], DecoderConfig | BertConfig]] = {
    "Bert": bert.config_from_hf,
    "Roberta": roberta.config_from_hf,
    "XLMRoberta": roberta.config_from_hf,
    "ModernBert": modernbert.config_from_hf,
}
#: what can only be pooled: the bare models, and those with a classification head
POOLING_ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], DecoderConfig | BertConfig]] = {
    **{
        f"{family}{suffix}": ARCHITECTURES[f"{family}ForCausalLM"]
        for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
        for suffix in ("Model", CLASSIFIER_SUFFIX)
    },
    "Gemma3TextModel": gemma3.embedding_config_from_hf,
    **{
        f"{family}{suffix}": reading
        for family, reading in ENCODERS.items()
        for suffix in ("Model", "ForMaskedLM", CLASSIFIER_SUFFIX)
    },
}


#: fields of config.json that count something, those that are numbers, true or false, token ids, and those that have
#: fields of their own; where a family has them at all
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_COUNTS = (
    *(*_NEEDED, "num_key_value_heads", "head_dim", "max_position_embeddings"),
    # some families' own
    *("ffn_dim", "word_embed_proj_dim", "n_embd", "n_head", "n_inner", "n_layer", "n_positions", "rotary_dim"),
    *("ffn_hidden_size", "num_kv_heads"),
)
_NUMBERS = ("rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MAPPINGS = ("rope_scaling", "rope_parameters", "text_config", "vision_config")


def is_encoder(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a model whose tokens see those behind them too."""
    names = hf.get("architectures") or ()
    return any(POOLING_ARCHITECTURES.get(name) in ENCODERS.values() for name in names)


def model_config(hf: Mapping[str, Any], max_model_len: int | None = None) -> DecoderConfig:
    """The generating model that a config.json describes.

    Args:
        max_model_len: tokens of the longest sequence that it will run, on which some rotary embeddings depend; None:
            as many as it can.

    Raises:
        ValidationError: an unknown architecture (the text lists the known ones), a missing field, or a value that
            the model cannot compute.
    """
    return _read(hf, ARCHITECTURES, max_model_len)


def pooling_model_config(hf: Mapping[str, Any], max_model_len: int | None = None) -> DecoderConfig | BertConfig:
    """As `model_config`, of a model that is to be pooled: its body."""
    return _read(hf, {**ARCHITECTURES, **POOLING_ARCHITECTURES}, max_model_len)


Config = TypeVar("Config")


def _read(
    hf: Mapping[str, Any], known: Mapping[str, Callable[[Mapping[str, Any]], Config]], max_model_len: int | None
) -> Config:
    # in most fields null has a meaning of its own; in these it stands for none
    hf = {name: value for name, value in hf.items() if value is not None or name not in (*_NEEDED, *_NUMBERS, *_FLAGS)}
    _check_fields(hf)
    names: Sequence[str] = checks.strings("architectures of config.json", hf.get("architectures") or [])
    for name in names:
        if name in known:
            try:
                return known[name]({**hf, llama.MAX_MODEL_LEN: max_model_len})
            except KeyError as error:
                raise ValidationError(f"config.json has no field {error.args[0]!r}, which {name} needs") from None
    shown = ", ".join(names) or f"none (model_type {hf.get('model_type')!r})"
    supported = ", ".join({**ARCHITECTURES, **POOLING_ARCHITECTURES})
    raise ValidationError(f"Model architectures [{shown}] are not supported. Supported: {supported}.")


def _check_fields(hf: Mapping[str, Any]) -> None:
    """Refuse values of another kind, which a family would stumble over somewhere."""
    given = {name: value for name, value in hf.items() if value is not None}
    for name in given.keys() & set(_COUNTS):
        if checks.integer(f"{name} of config.json", given[name]) < 1:
            raise ValidationError(f"{name} of config.json must be at least 1, got {given[name]}.")
    for name in given.keys() & set(_NUMBERS):
        checks.real(f"{name} of config.json", given[name])
    for name in given.keys() & set(_FLAGS):
        if not isinstance(given[name], bool):
            raise ValidationError(f"{name} of config.json must be true or false, got {given[name]!r:.80}.")
    for name in given.keys() & set(_TOKENS):
        for token in given[name] if isinstance(given[name], list) else [given[name]]:
            checks.integer(f"{name} of config.json", token)
    for name in given.keys() & set(_MAPPINGS):
        if not isinstance(given[name], Mapping):
            raise ValidationError(f"{name} of config.json must be an object with fields, got {given[name]!r:.80}.")
