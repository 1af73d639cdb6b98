"""Config.json into `DecoderConfig`, in transformers' older and newer spelling, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.models.registry import ARCHITECTURES, model_config, pooling_model_config
from jaxllm.weights.checkpoint import Checkpoint

BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def config(architecture: str, **fields: Any):
    return model_config({**BASE, "architectures": [architecture], **fields})


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(ValidationError) as caught:
        config("MambaForCausalLM")
    for name in ("MambaForCausalLM", *ARCHITECTURES):
        assert name in str(caught.value)
    with pytest.raises(ValidationError, match="none"):
        model_config({**BASE, "model_type": "mamba"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": "many"}, "vocab_size of config.json must be an integer, got 'many'"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers of config.json must be an integer, got 2.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers of config.json must be at least 1, got 0"),
        ({"max_position_embeddings": -1}, "max_position_embeddings of config.json must be at least 1, got -1"),
        ({"rope_theta": "big"}, "rope_theta of config.json must be a number, got 'big'"),
        ({"rms_norm_eps": [1]}, r"rms_norm_eps of config.json must be a number, got \[1\]"),
        ({"rope_scaling": [1]}, r"rope_scaling of config.json must be an object with fields, got \[1\]"),
        ({"hidden_size": None}, "config.json has no field 'hidden_size', which LlamaForCausalLM needs"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings of config.json must be true or false, got 'yes'"),
        ({"eos_token_id": "x"}, "eos_token_id of config.json must be an integer, got 'x'"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id of config.json must be an integer, got 'x'"),
        ({"architectures": [7]}, "architectures of config.json must contain only strings, got 7"),
    ],
)
def test_fields_of_another_kind_are_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        model_config({**BASE, "architectures": ["LlamaForCausalLM"], **fields})


def test_null_stands_for_the_default():
    assert config("LlamaForCausalLM", rms_norm_eps=None, rope_theta=None) == config("LlamaForCausalLM")


def test_one_architecture_may_be_a_text():
    assert model_config({**BASE, "architectures": "LlamaForCausalLM"}) == config("LlamaForCausalLM")


def test_the_first_known_architecture_is_taken():
    fields = {**BASE, "architectures": ["Unknown", "Qwen2ForCausalLM", "LlamaForCausalLM"]}
    assert model_config(fields).qkv_bias


@pytest.mark.parametrize(
    ("architecture", "old", "new"),
    [
        (
            "LlamaForCausalLM",
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        ),
        (
            "LlamaForCausalLM",
            {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0}},
        ),
        (
            "Qwen2ForCausalLM",
            {"rope_theta": 1e6, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4},
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 2,
            },
        ),
        (
            "Gemma3ForCausalLM",
            {
                "sliding_window": 8,
                "sliding_window_pattern": 3,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            {
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
        ),
        (
            "GPTNeoXForCausalLM",
            {"rotary_pct": 0.5, "rotary_emb_base": 500},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500, "partial_rotary_factor": 0.5}},
        ),
        (
            "GlmForCausalLM",
            {"rope_theta": 500, "partial_rotary_factor": 0.75},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500, "partial_rotary_factor": 0.75}},
        ),
        (
            "Cohere2ForCausalLM",
            {"sliding_window": 8, "sliding_window_pattern": 3},
            {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
        ),
        (
            "Olmo3ForCausalLM",
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            {
                "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
        ),
        (
            "Exaone4ForCausalLM",
            {"sliding_window": 8, "sliding_window_pattern": "LLG"},
            {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
        ),
        (
            "HunYuanDenseV1ForCausalLM",
            {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "alpha": 10.0, "factor": 1.0}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4 * 10.0 ** (16 / 14)}},
        ),
        (
            "SmolLM3ForCausalLM",
            {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 8},
            {
                "no_rope_layers": [1, 1, 0, 1, 1, 0],
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "full_attention", "sliding_attention"] * 2,
            },
        ),
    ],
)
def test_both_spellings_mean_the_same(architecture: str, old: dict[str, Any], new: dict[str, Any]):
    ours = config(architecture, **old)
    assert ours == config(architecture, **new)
    assert ours != config(architecture)


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_theta": 7e3},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 7e3, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"partial_rotary_factor": 0.75},
        {"rope_scaling": None},
    ],
)
def test_overrides_of_either_spelling_are_heard(overrides: dict[str, Any], tmp_path: Path):
    """As hf_overrides has them, of a config.json that transformers 5 has written."""
    own = {"rope_theta": 500.0, "partial_rotary_factor": 0.25}
    newer = {"rope_parameters": {"rope_type": "default", **own}}
    fields = {**BASE, "architectures": ["PhiForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps({**fields, **newer}))
    ours = model_config(Checkpoint(tmp_path, "dummy", overrides).config)
    assert ours == model_config({**fields, **own, **overrides})
    assert (ours == config("PhiForCausalLM", **newer)) == (overrides == {"rope_scaling": None})


def test_an_override_that_says_not_which_layers_is_refused(tmp_path: Path):
    kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "rope_parameters": kinds}))
    for name, value in (("rope_theta", 5e5), ("rope_scaling", {"rope_type": "linear", "factor": 2.0})):
        with pytest.raises(ValidationError, match=f"'{name}', and config.json .*full_attention, sliding_attention"):
            Checkpoint(tmp_path, "dummy", {name: value})
    assert Checkpoint(tmp_path, "dummy", {"rope_parameters": {}}).config["rope_parameters"] == {}


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "GPTJForCausalLM"])
def test_a_size_may_be_overridden_by_its_common_name(architecture: str):
    own = {"n_embd": 64, "n_head": 4, "n_layer": 12, "n_positions": 512, "vocab_size": 300, "rotary_dim": 8}
    model = model_config({**own, "architectures": [architecture], "num_hidden_layers": 2})
    assert (model.num_layers, model.hidden_size, model.max_position_embeddings) == (2, 64, 512)
    moe = config("Ernie4_5_MoeForCausalLM", moe_k=6, moe_num_experts=64, num_experts_per_tok=2, num_experts=8).moe
    assert moe is not None and (moe.num_experts, moe.top_k) == (8, 2)


def test_gemmas_gelu_is_the_tanh_form():
    for name in ("GemmaForCausalLM", "Gemma2ForCausalLM"):
        assert config(name, hidden_act="gelu") == config(name)
        assert config(name).activation == "gelu_pytorch_tanh"


def test_windows_are_the_layers_own():
    assert config("LlamaForCausalLM", sliding_window=8).layer_window == (None,) * 6
    assert config("MistralForCausalLM", sliding_window=8).layer_window == (8,) * 6
    assert config("MistralForCausalLM", sliding_window=None).layer_window == (None,) * 6
    assert config("Qwen3ForCausalLM", sliding_window=8, max_window_layers=0).layer_window == (None,) * 6
    gemma = config("Gemma3ForCausalLM", sliding_window=8)
    assert gemma.layer_window == (8, 8, 8, 8, 8, None) and gemma.layer_rope == (1, 1, 1, 1, 1, 0)
    assert config("Gemma2ForCausalLM", sliding_window=8).layer_window == (8, None) * 3
    cohere = config("Cohere2ForCausalLM", sliding_window=8)
    assert cohere.layer_window == (8, 8, 8, None, 8, 8) and cohere.layer_rope == (0, 0, 0, 1, 0, 0)


def test_missing_fields_have_transformers_defaults():
    """As in config files that transformers itself wrote without them."""
    transformers = pytest.importorskip("transformers")
    fields = {name: value for name, value in BASE.items() if name not in ("head_dim", "num_attention_heads")}
    for name in [name for name in ARCHITECTURES if name.endswith(("ForCausalLM", "LMHeadModel"))]:
        if name.startswith("Deepseek"):
            continue  # a config of theirs without its sizes is refused: it would be some other model's
        kind = {"Gemma3": "Gemma3Text", "Ernie4_5_": "Ernie4_5"}.get(
            family := re.sub("ForCausalLM|LMHeadModel", "", name), family
        )
        # its default is more than these heads have
        own = {"rotary_dim": 8} if family == "GPTJ" else {}
        full = getattr(transformers, f"{kind}Config")(**fields, **own, num_attention_heads=4).to_dict()
        ours = config(name, num_attention_heads=4, head_dim=full.get("head_dim"), **own)
        del full["architectures"]
        assert ours == config(name, **full), name
        if family in ("Qwen3", "Gemma", "Gemma2", "Gemma3", "Glm", "Glm4"):
            without = {key: value for key, value in BASE.items() if key != "head_dim"}
            assert model_config({**without, "architectures": [name]}).head_dim == full["head_dim"]


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
        ("LlamaForCausalLM", {"hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported: silu"),
        ("LlamaForCausalLM", {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple"),
        ("LlamaForCausalLM", {"head_dim": 15}, "head_dim=15 is odd"),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "mrope"}}, "'mrope' is not supported"),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear"}}, "no field 'factor', which LlamaFor"),
        ("LlamaForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("OPTForCausalLM", {"do_layer_norm_before": False}, "do_layer_norm_before=false of OPT"),
        ("OPTForCausalLM", {"word_embed_proj_dim": 32}, "word_embed_proj_dim=32 is not supported: it must be"),
        ("OPTForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "learned positions, 512 of"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true of GPT-2"),
        ("GPT2LMHeadModel", {"n_embd": "wide"}, "n_embd of config.json must be an integer, got 'wide'"),
        ("PhiForCausalLM", {"qk_layernorm": True}, "qk_layernorm=true of Phi"),
        ("GPTJForCausalLM", {}, "rotary_dim=64 is not supported: it must be even, and at most head_dim=16"),
        ("FalconForCausalLM", {"alibi": True}, "alibi=true of Falcon is not supported"),
        ("FalconForCausalLM", {"num_ln_in_parallel_attn": 2}, "with new_decoder_architecture=false"),
        ("HunYuanDenseV1ForCausalLM", {"use_cla": True}, "use_cla=true of Hunyuan"),
        ("Glm4MoeForCausalLM", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported; only 'sigmoid'"),
        ("Dots1ForCausalLM", {"topk_method": "greedy"}, "topk_method='greedy' is not supported; only 'noaux_tc'"),
        ("MiniMaxM2ForCausalLM", {"attn_type_list": [1, 0]}, r"attn_type_list=\[1, 0\] of config.json asks for linear"),
        ("MiniMaxM2ForCausalLM", {"use_qk_norm": False}, "use_qk_norm=False is not supported; only True"),
        ("Ernie4_5_MoeForCausalLM", {"use_bias": True}, "use_bias=True is not supported; only False"),
        ("Ernie4_5_MoeForCausalLM", {"moe_num_experts": [64, 64]}, r"moe_num_experts=\[64, 64\] and moe_inter"),
        ("FlexOlmoForCausalLM", {"num_experts": 4}, "num_experts_per_tok=5 is more than the num_experts=4"),
        ("StableLmForCausalLM", {"partial_rotary_factor": 0.2}, r"partial_rotary_factor x head_dim \(16\)=3 is odd"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused(architecture: str, fields: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        config(architecture, **fields)


def test_an_encoder_without_positions_is_refused():
    fields = {**BASE, "architectures": ["XLMRobertaModel"], "max_position_embeddings": 2, "pad_token_id": 1}
    with pytest.raises(ValidationError, match="the first 2 are not used, since pad_token_id=1"):
        pooling_model_config(fields)
    with pytest.raises(ValidationError, match="classifier_activation 'mish' is not supported"):
        pooling_model_config({**BASE, "architectures": ["ModernBertModel"], "classifier_activation": "mish"})


@pytest.mark.parametrize("field", [name for name in BASE if name not in ("head_dim", "num_key_value_heads")])
def test_a_missing_field_is_named(field: str):
    fields = {name: value for name, value in BASE.items() if name != field and name != "head_dim"}
    with pytest.raises(ValidationError, match=f"no field '{field}', which LlamaForCausalLM needs"):
        model_config({**fields, "architectures": ["LlamaForCausalLM"]})


def test_the_text_of_a_model_with_images():
    """Gemma 3 4B's own config.json leaves out what transformers has as a default."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    vision = {"hidden_size": 1152, "num_attention_heads": 16, "image_size": 896, "patch_size": 14}
    found = model_config(
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": vision}
    )
    assert found.vision is not None and found.vision.num_vectors(64 * 64) == 256
    found = dataclasses.replace(found, vision=None, sees_whole_pictures=False)
    rest = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    assert found == config("Gemma3ForCausalLM", **text, **rest, max_position_embeddings=131072)
    with pytest.raises(ValidationError, match="no field 'text_config'"):
        config("Gemma3ForConditionalGeneration")
