"""Small models under the names that the examples load, in a folder that is a Hugging Face cache: the scripts find them
there unchanged, and so does transformers where a script uses it.

They have random weights and do what the example's own model is for. The architecture may be another one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from support.mistral_files import NUM_SPECIAL, write_tekken

from jaxllm.tokenization.load import load_tokenizer
from jaxllm.weights.resolve import resolve

#: of a snapshot that nobody has made
REVISION = "0" * 40
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 16384,
}


def causal(folder: Path, kind: str, **config: Any) -> None:
    """A model that generates, with SmolLM2's tokenizer and chat template."""
    from transformers import AutoModelForCausalLM

    _decoder(folder, AutoModelForCausalLM, kind, config)


def classifier(folder: Path, kind: str, **config: Any) -> None:
    """A generating model's body with a classification head."""
    from transformers import AutoModelForSequenceClassification

    _decoder(folder, AutoModelForSequenceClassification, kind, config)


def _decoder(folder: Path, head: Any, kind: str, config: dict[str, Any]) -> None:
    from transformers import AutoConfig

    tokenizer = load_tokenizer(resolve("smollm2-135m-instruct"))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    shape = AutoConfig.for_model(kind, **{**SIZES, **ends, "vocab_size": len(tokenizer), **config})
    head.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def adapter(folder: Path) -> None:
    """A LoRA of the two above, in PEFT's format."""
    draw, size, rank, tensors = np.random.default_rng(0), SIZES["hidden_size"], 8, {}
    for layer in range(SIZES["num_hidden_layers"]):
        for module in ("q_proj", "v_proj"):
            for half, shape in (("A", (rank, size)), ("B", (size, rank))):
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{half}.weight"
                tensors[name] = 0.1 * draw.standard_normal(shape, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))


def calls_nothing(folder: Path) -> None:
    """A model in Mistral's own form that answers everything with ``[]``, no calls of tools. All layers are zeros: what
    comes next follows from the token before alone.
    """
    write_tekken(folder, "v3")
    size, heads, rows, ends = SIZES["hidden_size"], SIZES["num_attention_heads"], SIZES["intermediate_size"], 2
    opening, closing = (NUM_SPECIAL + ord(bracket) for bracket in "[]")
    vocabulary, direction = 384, np.eye(size, dtype=np.float32)
    embeddings = np.tile(direction[0], (vocabulary, 1))
    embeddings[opening], embeddings[closing] = direction[1], direction[2]
    scores = np.zeros((vocabulary, size), np.float32)
    scores[opening], scores[closing], scores[ends] = direction[:3]
    tensors = {"tok_embeddings.weight": embeddings, "output.weight": scores, "norm.weight": np.ones(size, np.float32)}
    shapes = {f"attention.w{name}": (size, size) for name in "qkvo"}
    shapes |= {"feed_forward.w1": (rows, size), "feed_forward.w2": (size, rows), "feed_forward.w3": (rows, size)}
    shapes |= {"attention_norm": (size,), "ffn_norm": (size,)}
    for layer in range(SIZES["num_hidden_layers"]):
        tensors |= {f"layers.{layer}.{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "consolidated.safetensors")
    params = {"dim": size, "n_layers": SIZES["num_hidden_layers"], "hidden_dim": rows, "n_heads": heads}
    params |= {"n_kv_heads": heads, "head_dim": SIZES["head_dim"], "norm_eps": 1e-5, "vocab_size": vocabulary}
    params |= {"rope_theta": 1e6, "max_position_embeddings": SIZES["max_position_embeddings"]}
    (folder / "params.json").write_text(json.dumps(params))


def embedder(folder: Path, **config: Any) -> None:
    """all-MiniLM-L6-v2 itself, which is small; `config` changes its config.json."""
    shutil.copytree(resolve("all-minilm-l6-v2"), folder, dirs_exist_ok=True)
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def cross_encoder(folder: Path, **config: Any) -> None:
    """A BERT that reads two texts, with all-MiniLM-L6-v2's tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification

    files = resolve("all-minilm-l6-v2")
    tokenizer = load_tokenizer(files)
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = {"vocab_size": len(tokenizer), "num_attention_heads": 4, "num_labels": 1, **config}
    shape = BertConfig(**sizes, **config)
    BertForSequenceClassification(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


#: hub id -> what writes its stand-in into a folder
STAND_INS: dict[str, Callable[[Path], None]] = {
    **dict.fromkeys(
        (
            "facebook/opt-125m",
            "lmsys/longchat-13b-16k",
            "meta-llama/Llama-2-13b-chat-hf",
            "meta-llama/Llama-3.1-8B-Instruct",
            "huggyllama/llama-7b",
            "meta-llama/Llama-3.2-1B-Instruct",
            "meta-llama/Llama-3.2-3B-Instruct",
        ),
        lambda folder: causal(folder, "llama"),
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": calls_nothing,
    "Qwen/Qwen2.5-3B-Instruct": lambda folder: causal(folder, "qwen2"),
    "Qwen/Qwen2.5-7B-Instruct-1M": lambda folder: causal(folder, "qwen2", max_position_embeddings=1048576),
    "Qwen/Qwen3-0.6B": lambda folder: causal(folder, "qwen3", max_position_embeddings=40960),
    "Qwen/Qwen3-Reranker-0.6B": lambda folder: causal(folder, "qwen3"),
    "jason9693/Qwen2.5-1.5B-apeach": lambda folder: classifier(folder, "qwen2", num_labels=2),
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": lambda folder: classifier(folder, "qwen3", num_labels=1),
    "internlm/internlm2-1_8b-reward": lambda folder: classifier(folder, "llama", num_labels=1),
    "nvidia/llama-nemotron-rerank-1b-v2": lambda folder: classifier(folder, "llama", num_labels=1),
    "boltuix/NeuroBERT-NER": lambda folder: classifier(folder, "qwen3", num_labels=5),
    **dict.fromkeys(
        (
            "AmirMohseni/skywork-qwen3-0.6b-reward-lora",
            "jeeejeee/llama32-3b-text2sql-spider",
            "timdettmers/qlora-flan-7b",
        ),
        adapter,
    ),
    "BAAI/bge-reranker-v2-m3": cross_encoder,
    **dict.fromkeys(
        ("intfloat/e5-small", "intfloat/multilingual-e5-small", "BAAI/bge-m3", "jinaai/jina-reranker-v3"), embedder
    ),
    "jinaai/jina-embeddings-v3": lambda folder: embedder(folder, matryoshka_dimensions=[32, 64, 384]),
}


def write(home: Path) -> None:
    """Write those that are not there yet into a folder that is to be HF_HOME."""
    for name, make in STAND_INS.items():
        model = home / "hub" / f"models--{name.replace('/', '--')}"
        reference = model / "refs" / "main"
        if reference.exists():
            continue
        snapshot = model / "snapshots" / REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        make(snapshot)
        # last: now it is whole
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(REVISION)
