"""A GGUF file of every family, with llama.cpp's names, keys and changes: config and weights as from safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file
from support.gguf_files import interleaved, write_gguf

from jaxllm import LLM, SamplingParams
from jaxllm.layers.weight import is_spec
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.weights import loader
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.gguf import GGUFReader
from jaxllm.weights.formats.gguf_families import MODEL_CLASSES
from jaxllm.weights.formats.tensor_files import TensorFiles
from pallas_kernels.quantized import is_quantized

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 8, 4
BASE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 512,
    "rope_theta": 50_000.0,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
PROJECTIONS = tuple(f"{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias"))
TIED = {"tie_word_embeddings": True}
#: GGUF's architecture -> (fields of Hugging Face's config.json, keys of the file)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {}),
    "qwen2": ({}, {}),
    "qwen3": ({}, {}),
    "gemma": (TIED, {}),
    "gemma2": (
        {
            **TIED,
            "sliding_window": 16,
            "query_pre_attn_scalar": HEAD_DIM,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        {"attention.sliding_window": 16, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": (
        {**TIED, "sliding_window": 16, "query_pre_attn_scalar": HEAD_DIM},
        {"attention.sliding_window": 16},
    ),
    "phi3": (
        {"sliding_window": 24, "partial_rotary_factor": 0.5},
        {"attention.sliding_window": 24, "rope.dimension_count": HEAD_DIM // 2},
    ),
    "granite": (
        {
            "attention_multiplier": 0.25,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 8.0,
        },
        {"attention.scale": 0.25, "embedding_scale": 12.0, "residual_scale": 0.5, "logit_scale": 8.0},
    ),
    "olmo2": ({}, {}),
    "smollm3": ({}, {}),
    "gptneox": (
        {"num_key_value_heads": None, "rotary_pct": 0.5, "use_parallel_residual": False},
        {"rope.dimension_count": HEAD_DIM // 2, "use_parallel_residual": False},
    ),
    "stablelm": (
        {"use_parallel_residual": True, "use_qkv_bias": True},
        {"rope.dimension_count": HEAD_DIM // 4, "use_parallel_residual": True},
    ),
    "command-r": ({**TIED, "logit_scale": 0.25, "use_qk_norm": True}, {"logit_scale": 0.25}),
    "cohere2": (
        {**TIED, "logit_scale": 0.25, "sliding_window": 16},
        {"logit_scale": 0.25, "attention.sliding_window": 16},
    ),
    "phi2": ({}, {"rope.dimension_count": HEAD_DIM // 2}),
    "starcoder2": ({"norm_epsilon": 1e-6, "sliding_window": 4096}, {}),
    "nemotron": (
        {"norm_eps": 1e-6, "partial_rotary_factor": 0.25, "attention_bias": True},
        {"rope.dimension_count": HEAD_DIM // 4},
    ),
    "arcee": ({"mlp_bias": True}, {}),
    "seed_oss": ({"attention_out_bias": True}, {}),
    "ernie4_5": ({}, {}),
    "exaone4": ({"sliding_window": 16}, {"attention.sliding_window": 16}),
    "hunyuan-dense": ({}, {}),
    "glm4": ({}, {"rope.dimension_count": HEAD_DIM // 2}),
}

EXPERTS = {"expert_count": 6, "expert_used_count": 2}
WIDE = {"expert_feed_forward_length": 20}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64}
LATENTS = {
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "first_k_dense_replace": 2,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
}
LATENT_KEYS = {
    **EXPERTS,
    **WIDE,
    "attention.kv_lora_rank": 12,
    "rope.dimension_count": 4,
    "leading_dense_block_count": 2,
    "expert_shared_count": 2,
}
#: families with experts, by name -> as FAMILIES, and Hugging Face's class where the architecture has another one
SPARSE: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "llama": (
        {"num_local_experts": 6, "num_experts_per_tok": 2},
        EXPERTS,
        "MixtralForCausalLM",
    ),
    "qwen2moe": (
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 24,
        },
        {**EXPERTS, **WIDE, "expert_shared_feed_forward_length": 24},
        None,
    ),
    "qwen3moe": (
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True},
        {**EXPERTS, **WIDE},
        None,
    ),
    "olmoe": ({"num_experts": 6, "num_experts_per_tok": 2}, EXPERTS, None),
    "gpt-oss": (
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rope_scaling": {**YARN, "truncate": False},
        },
        {**EXPERTS, **YARN_KEYS, "expert_feed_forward_length": 48, "attention.sliding_window": 16},
        None,
    ),
    # as older files have it: keys and values made by one matrix
    "deepseek2 v2": (
        {**LATENTS, "topk_method": "greedy"},
        {**LATENT_KEYS, "attention.key_length": 10, "attention.value_length": 5},
        None,
    ),
    # as newer files have it: by two, and lengths of what is computed
    "deepseek2 v3": (
        {
            **LATENTS,
            "q_lora_rank": 14,
            "n_group": 3,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        {
            **LATENT_KEYS,
            **YARN_KEYS,
            "attention.q_lora_rank": 14,
            "attention.key_length": 16,
            "attention.value_length": 12,
            "attention.key_length_mla": 10,
            "attention.value_length_mla": 5,
            "expert_group_count": 3,
            "expert_group_used_count": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "expert_gating_func": 2,
            "rope.scaling.yarn_log_multiplier": 0.0707,
        },
        "DeepseekV3ForCausalLM",
    ),
}


def write(path: Path, architecture: str, weights: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(BASE["hidden_size"])
    writer.add_feed_forward_length(BASE["intermediate_size"])
    writer.add_head_count(HEADS)
    if architecture != "gptneox":
        writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(BASE["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(BASE["rms_norm_eps"])
    writer.add_layer_norm_eps(BASE["layer_norm_eps"])
    writer.add_rope_freq_base(BASE["rope_theta"])
    for key, value in keys.items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add = {**kinds, list: writer.add_array}[type(value)]
        add(f"{architecture}.{key}", value)
    kind = getattr(gguf.MODEL_ARCH, architecture.upper().replace("-", "_"))
    names = gguf.get_tensor_name_map(kind, LAYERS)
    for name, weight in weights.items():
        # two whose HF names say nothing of what they are
        written = name.replace("_correction_bias", "_correction.bias").replace(".sinks", ".sinks.weight")
        stored_name = names.get_name(written, (".weight", ".bias"))
        assert stored_name is not None, name
        writer.add_tensor(stored_name, stored(architecture, name, weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(architecture: str, name: str, weight: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter makes of a tensor."""
    if architecture in ("llama", "granite", "smollm3", "arcee") and ("q_proj" in name or "k_proj" in name):
        return interleaved(weight, HEADS if "q_proj" in name else KV_HEADS)
    if architecture.startswith(("gemma", "nemotron")) and name.endswith("norm.weight"):
        return weight + 1
    if "shared_expert_gate" in name:
        return weight[0]
    if "query_key_value" in name:
        heads = weight.reshape(HEADS, 3, HEAD_DIM, *weight.shape[1:])
        return np.concatenate([heads[:, i].reshape(-1, *weight.shape[1:]) for i in range(3)])
    return weight


def test_every_family_is_compared() -> None:
    assert {*FAMILIES, *(name.split()[0] for name in SPARSE)} == MODEL_CLASSES.keys()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_file_is_what_the_safetensors_are(architecture: str, tmp_path: Path) -> None:
    fields, keys = FAMILIES[architecture]
    model = model_config({**BASE, **fields, "architectures": [MODEL_CLASSES[architecture][0]]})
    specs, weights = drawn(model)
    save_file(weights, tmp_path / "model.safetensors")
    write(tmp_path / "model.gguf", architecture, weights, keys)
    compare(tmp_path, model, specs)


def test_an_olmo_with_windows_is_an_olmo3(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    own = {"sliding_window": 16, "rope_scaling": YARN, "layer_types": kinds}
    model = model_config({**BASE, **own, "architectures": ["Olmo3ForCausalLM"]})
    specs, weights = drawn(model)
    save_file(weights, tmp_path / "model.safetensors")
    has_window = [kind == "sliding_attention" for kind in kinds]
    keys = {**YARN_KEYS, "attention.sliding_window": 16, "attention.sliding_window_pattern": has_window}
    write(tmp_path / "model.gguf", "olmo2", weights, keys)
    compare(tmp_path, model, specs)


def test_older_phi2_files_have_queries_keys_and_values_together(tmp_path: Path) -> None:
    fields, keys = FAMILIES["phi2"]
    model = model_config({**BASE, **fields, "architectures": ["PhiForCausalLM"]})
    specs, weights = drawn(model)
    save_file(weights, tmp_path / "model.safetensors")
    fused = {name: weight for name, weight in weights.items() if not name.endswith(PROJECTIONS)}
    for name in weights:
        if ".q_proj." in name:
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            # the table's name of what the file has
            fused[name.replace("self_attn.q_proj", "self_attn.qkv_proj")] = np.concatenate(parts)
    write(tmp_path / "model.gguf", "phi2", fused, keys)
    compare(tmp_path, model, specs)


def drawn(model: DecoderConfig) -> tuple[Any, dict[str, np.ndarray]]:
    """Its specs, and random weights under the names that a checkpoint has them."""
    specs, random = decoder_specs(model), np.random.default_rng(0)
    weights = {
        name: random.standard_normal(spec.tensor_shape(part)).astype(np.float32)
        for spec in jax.tree.leaves(specs, is_leaf=is_spec)
        for name, part in spec.tensors()
    }
    return specs, weights


def compare(folder: Path, model: DecoderConfig, specs: Any) -> None:
    """What is read of model.gguf with what is read of model.safetensors."""
    checkpoint = Checkpoint(folder / "model.gguf")
    assert model_config(checkpoint.config) == model
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    float32, prefix = jnp.dtype(jnp.float32), model.names.prefix
    found = checkpoint.load(specs, float32, device, prefix=prefix, seed=0, progress=False)
    with TensorFiles(folder) as reader:
        expected = loader.load(reader, specs, float32, device, progress=False)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    with GGUFReader(folder / "model.gguf") as reader:
        for name in reader.names():
            np.testing.assert_array_equal(reader.read(name, slice(3, 9)), reader.read(name)[3:9])


def with_stacked_experts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What llama.cpp's converter makes of experts' tensors, under the names that it looks for in its table."""
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        layer, _, of = name.partition(".experts.")
        expert, _, module = of.partition(".")
        if not of:
            found[name] = weight
        elif expert.isdigit():
            found.setdefault(f"{layer}.experts.{module}", []).append(weight)
        elif of.startswith("gate_up_proj"):
            kind = "bias" if of.endswith("bias") else "weight"
            for i, half in enumerate(("gate_proj", "up_proj")):
                found[f"{layer}.experts.{half}.{kind}"] = np.moveaxis(weight[..., i::2], -1, 1)
        else:
            kind = "bias" if of.endswith("bias") else "weight"
            found[f"{layer}.experts.down_proj.{kind}"] = np.moveaxis(weight, -1, 1)
    return {name: np.stack(weight) if isinstance(weight, list) else weight for name, weight in found.items()}


def with_keys_and_values_apart(weights: dict[str, np.ndarray], fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """What newer converters make of the matrix of which a DeepSeek's keys and values are made."""
    found = {}
    for name, weight in weights.items():
        if "kv_b_proj" not in name:
            found[name] = weight
            continue
        heads = weight.reshape(HEADS, -1, weight.shape[1])
        keys, values = np.split(heads, [fields["qk_nope_head_dim"]], axis=1)
        found[name.replace("kv_b_proj", "k_b_proj")] = keys.swapaxes(1, 2)
        found[name.replace("kv_b_proj", "v_b_proj")] = values
    return found


@pytest.mark.parametrize("name", SPARSE)
def test_experts_are_what_the_safetensors_are(name: str, tmp_path: Path) -> None:
    """Config and weights, as wholes and in pieces."""
    fields, keys, class_name = SPARSE[name]
    architecture = name.split()[0]
    model = model_config({**BASE, **fields, "architectures": [class_name or MODEL_CLASSES[architecture][0]]})
    specs, weights = drawn(model)
    save_file(weights, tmp_path / "model.safetensors")
    stored = with_stacked_experts(weights)
    if name.endswith("v3"):
        stored = with_keys_and_values_apart(stored, fields)
    write(tmp_path / "model.gguf", architecture, stored, keys)
    compare(tmp_path, model, specs)


@pytest.mark.parametrize(
    ("architecture", "kind", "fields"),
    [
        ("llama", Kind.Q4_0, {"num_local_experts": 6}),
        ("qwen3moe", Kind.Q5_1, {"num_experts": 6, "moe_intermediate_size": 64, "norm_topk_prob": True}),
    ],
    ids=["Mixtral", "Qwen3-MoE"],
)
def test_experts_in_their_blocks_give_what_transformers_gives(
    architecture: str, kind: Kind, fields: dict[str, Any], tmp_path: Path
) -> None:
    """An engine that keeps a file's blocks, beside transformers with what the gguf package makes of them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name = "MixtralForCausalLM" if architecture == "llama" else MODEL_CLASSES[architecture][0]
    size = {"intermediate_size": 64, "num_hidden_layers": 2, "num_experts_per_tok": 2}
    config = {**BASE, **size, **fields, "architectures": [name]}
    model_type = "mixtral" if architecture == "llama" else MODEL_CLASSES[architecture][1]
    _, weights = drawn(model_config(config))
    weights = {name: weight if "norm" in name else weight / 3 for name, weight in weights.items()}
    rounded = {
        name: weight
        if weight.ndim == 1 or name.endswith(".gate.weight")
        else gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        for name, weight in weights.items()
    }
    save_file(rounded, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    keys = {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 64}

    def experts(writer: gguf.GGUFWriter) -> None:
        for key, value in keys.items():
            writer.add_uint32(f"{architecture}.{key}", value)

    file = write_gguf(tmp_path / "model.gguf", architecture, with_stacked_experts(weights), kind, experts)
    prompt = np.random.default_rng(1).integers(0, BASE["vocab_size"], 30).tolist()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0].log_softmax(-1).numpy()
    arguments: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 1, "enforce_eager": True}
    with LLM(file, quantization="gguf", skip_tokenizer_init=True, **arguments) as llm:
        (params,) = llm.apply_model(lambda params: params)
        experts_of_both = [layer.sparse.experts for layer in params.layers]
        assert all(is_quantized(one.gate_up) and is_quantized(one.down) for one in experts_of_both)
        asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, logprobs=1)
        (output,) = llm.generate({"prompt_token_ids": prompt}, asked, use_tqdm=False)
    assert output.prompt_logprobs is not None
    positions: Any = output.prompt_logprobs[1:]
    found = [position[token].logprob for position, token in zip(positions, prompt[1:], strict=True)]
    np.testing.assert_allclose(found, expected[np.arange(29), prompt[1:]], atol=2e-4)
    assert output.outputs[0].token_ids[0] == expected[-1].argmax()


def test_experts_in_a_form_that_is_not_known_are_refused(tmp_path: Path) -> None:
    """As llama.cpp wrote Mixtrals before it stacked them."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_head_count(HEADS)
    writer.add_tensor("blk.0.ffn_gate.0.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightsError, match=r"tensor 'blk\.0\.ffn_gate\.0\.weight' is not one that .* 'llama' has"):
        GGUFReader(tmp_path / "m.gguf")
