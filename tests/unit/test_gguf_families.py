"""A GGUF file of every family, with llama.cpp's names, keys and changes: config and weights as from safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.gguf_files import interleaved

from jaxllm.layers.weight import is_spec
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.weights import loader
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.formats.gguf_families import MODEL_CLASSES
from jaxllm.weights.formats.safetensors import SafetensorsReader

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
    "glm4": ({}, {"rope.dimension_count": HEAD_DIM // 2}),
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
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture}.{key}", value)
    kind = getattr(gguf.MODEL_ARCH, architecture.upper().replace("-", "_"))
    names = gguf.get_tensor_name_map(kind, LAYERS)
    for name, weight in weights.items():
        stored_name = names.get_name(name, (".weight", ".bias"))
        assert stored_name is not None, name
        writer.add_tensor(stored_name, stored(architecture, name, weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(architecture: str, name: str, weight: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter makes of a tensor."""
    if architecture in ("llama", "granite", "smollm3") and ("q_proj" in name or "k_proj" in name):
        return interleaved(weight, HEADS if "q_proj" in name else KV_HEADS)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return weight + 1
    if "query_key_value" in name:
        heads = weight.reshape(HEADS, 3, HEAD_DIM, *weight.shape[1:])
        return np.concatenate([heads[:, i].reshape(-1, *weight.shape[1:]) for i in range(3)])
    return weight


def test_every_family_is_compared() -> None:
    assert FAMILIES.keys() == MODEL_CLASSES.keys()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_file_is_what_the_safetensors_are(architecture: str, tmp_path: Path) -> None:
    fields, keys = FAMILIES[architecture]
    model = model_config({**BASE, **fields, "architectures": [MODEL_CLASSES[architecture][0]]})
    specs = decoder_specs(model)
    random = np.random.default_rng(0)
    weights = {
        name: random.standard_normal(part.tensor_shape).astype(np.float32)
        for spec in jax.tree.leaves(specs, is_leaf=is_spec)
        for name, part in spec.tensors()
    }
    save_file(weights, tmp_path / "model.safetensors")
    write(tmp_path / "model.gguf", architecture, weights, keys)

    checkpoint = Checkpoint(tmp_path / "model.gguf")
    assert model_config(checkpoint.config) == model
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    float32, prefix = jnp.dtype(jnp.float32), model.names.prefix
    found = checkpoint.load(specs, float32, device, prefix=prefix, seed=0, progress=False)
    with SafetensorsReader(tmp_path) as reader:
        expected = loader.load(reader, specs, float32, device, progress=False)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
