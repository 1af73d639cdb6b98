"""A Llama small enough to run thousands of requests: random weights, a tokenizer of single bytes, a chat template.

The weights are drawn so that attention is sharp and every token depends on the whole context, and scores lie far
apart: a wrong cache block, position or row changes what is generated, and rounding does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

EOS = 256
#: bytes and the end of sequence
VOCAB_SIZE = 257
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}
#: engine arguments that compile little
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "enforce_eager": True,
}
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def write_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Write the model into `folder`, which exists, as a Hugging Face checkpoint."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(_weights(np.random.default_rng(seed)), folder / "model.safetensors", {"format": "pt"})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def _weights(random: np.random.Generator) -> dict[str, np.ndarray]:
    d, f = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    heads, kv_heads = (CONFIG[name] * CONFIG["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCAB_SIZE, d, 1.0), "lm_head.weight": matrix(VOCAB_SIZE, d, 4.0)}
    weights["lm_head.weight"][EOS] = 0  # requests end by their length, except where a test wants otherwise
    for layer in range(CONFIG["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": matrix(heads, d, 2.0),
            "self_attn.k_proj": matrix(kv_heads, d, 2.0),
            "self_attn.v_proj": matrix(kv_heads, d),
            "self_attn.o_proj": matrix(d, heads),
            "mlp.gate_proj": matrix(f, d),
            "mlp.up_proj": matrix(f, d),
            "mlp.down_proj": matrix(d, f),
            "input_layernorm": np.ones(d, np.float32),
            "post_attention_layernorm": np.ones(d, np.float32),
        }
        weights.update({f"model.layers.{layer}.{name}.weight": array for name, array in parts.items()})
    return weights | {"model.norm.weight": np.ones(d, np.float32)}


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer
