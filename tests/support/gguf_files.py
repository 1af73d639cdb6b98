"""GGUF files of tiny models, written the way llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB, LAYERS = 4, 2, 8, 32, 64, 40, 2


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Q and K: the two halves of every head, row by row in turn."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def hf_weights(architecture: str, tied: bool = False, head_dim: int = HEAD_DIM) -> dict[str, np.ndarray]:
    rng, hidden, ffn = np.random.default_rng(7), HEADS * head_dim, 2 * HEADS * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, hidden)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if architecture == "gemma3":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, out in (("q", HEADS * head_dim), ("k", KV_HEADS * head_dim), ("v", KV_HEADS * head_dim)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (out, hidden)
            if architecture == "qwen2":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (out,)
            if architecture in ("qwen3", "gemma3") and name != "v":
                shapes[f"{at}.self_attn.{name}_norm.weight"] = (head_dim,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, HEADS * head_dim)
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"{at}.{norm}.weight": (hidden,) for norm in norms}
    return {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    architecture: str,
    weights: dict[str, np.ndarray],
    kind: Kind | Callable[[str], Kind] = Kind.F32,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Write HF weights the way llama.cpp's converter does, names by the ``gguf`` package's own table. Of a mixture of
    experts, those of a layer are one array, and routers stay as they are. `kind`: of all matrices, or of each by its
    Hugging Face name.
    """
    writer = gguf.GGUFWriter(path, architecture)
    hidden = weights["model.embed_tokens.weight"].shape[1]
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(hidden // HEADS)
    writer.add_value_length(hidden // HEADS)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(50_000.0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
    if architecture == "gemma3":
        writer.add_sliding_window(16)
    edit(writer)
    tensor_names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), LAYERS)
    for name, weight in weights.items():
        stored_name = name if name == "rope_freqs.weight" else tensor_names.get_name(name, (".weight", ".bias"))
        assert stored_name is not None, name
        stored = weight
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            stored = interleaved(weight, HEADS if "q_proj" in name else KV_HEADS)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            stored = weight + 1
        own = kind(name) if callable(kind) else kind
        if stored.ndim >= 2 and own != Kind.F32 and not name.endswith(".gate.weight"):
            writer.add_tensor(stored_name, gguf.quants.quantize(stored, own), raw_dtype=own)
        else:
            writer.add_tensor(stored_name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
