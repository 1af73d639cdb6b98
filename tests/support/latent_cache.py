"""Engines of a small DeepSeek over 1, 2 and 4 virtual devices, in a process with its own JAX.

``python -m support.latent_cache FOLDER`` prints one JSON object: by the engine, what it answered.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from support.offloading import asked_again
from support.tensor_parallel import GREEDY, PROMPTS, exchanged, generate, tokens
from support.tiny_model import CONFIG, EOS, write_tiny_model
from support.ways import WAYS_ARGUMENTS, counted, every_way

from jaxllm import LLM
from jaxllm.api.metric import Counter
from jaxllm.layers.weight import is_spec
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs

#: by their name. The first makes as many devices as the others need, and saves what these load
ENGINES: dict[str, dict[str, Any]] = {
    "spread": {
        "tensor_parallel_size": 4,
        "enable_expert_parallel": True,
        "num_decode_steps": 3,
        "enforce_eager": False,
        "max_num_batched_tokens": 8,
        "kv_offloading_size": "1MB",
    },
    "stages": {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "scheduling_policy": "priority",
        "max_num_active_seqs": 3,
        "kv_offloading_size": "1MB",
    },
    "one": {},
}
#: latents in 8 bits
ROUNDED: dict[str, Any] = {"tensor_parallel_size": 2, "kv_cache_dtype": "int8", "kv_offloading_size": "1MB"}
#: latents of 24 numbers and 8 that are turned, where keys and values would be 4 heads of 24 and 16
DEEPSEEK: dict[str, Any] = {
    **CONFIG,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
}


def write_random(folder: Path, config: dict[str, Any]) -> Path:
    """The model with random weights, by which scores lie far apart, and the tiny model's tokenizer."""
    write_tiny_model(folder)
    random = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "norm" in name:
            return np.ones(shape, np.float32)
        gain = 4.0 if name.startswith("lm_head") else 2.0 if "q_" in name or "kv_" in name else 1.0
        return (gain * random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {
        name: draw(name, spec.tensor_shape(part))
        for spec in jax.tree.leaves(decoder_specs(model_config(config)), is_leaf=is_spec)
        for name, part in spec.tensors()
    }
    tensors["lm_head.weight"][EOS] = 0
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def answers(llm: LLM) -> dict[str, Any]:
    """What an engine makes of four prompts that do not fit at once, and of one whose prefix it has; it takes prompts in
    chunks.
    """
    first = generate(llm, PROMPTS, GREEDY)
    again = generate(llm, PROMPTS[2], dataclasses.replace(GREEDY, max_tokens=8, prompt_logprobs=0))
    last = generate(llm, PROMPTS[2], GREEDY)
    metrics = [metric for metric in llm.get_metrics() if isinstance(metric, Counter)]
    return {
        "greedy": tokens(first),
        "after prefix hits": tokens(last),
        "prompt logprobs": [next(iter(entry.values())).logprob for entry in again[0].prompt_logprobs[1:]],
        "preemptions": next(metric.value for metric in metrics if metric.name == "vllm:num_preemptions"),
        "prefix hits": last[0].num_cached_tokens,
    }


def main() -> None:
    folder, saved = (Path(sys.argv[1]) / name for name in ("model", "saved"))
    folder.mkdir()
    write_random(folder, DEEPSEEK)
    found: dict[str, Any] = {}
    for name, devices in ENGINES.items():
        with LLM(folder if name == "spread" else saved, **{**WAYS_ARGUMENTS, **devices}) as llm:
            found[name] = {
                "load": counted(llm),
                **answers(llm),
                "ways": every_way(llm, folder),
                "exchanged": None if name == "stages" else exchanged(llm)["count"],
                "bytes a token": llm.memory_plan.kv_bytes_per_token,
                "offloaded": asked_again(llm),
            }
            if name == "spread":
                llm.save(saved)
    with LLM(saved, **{**WAYS_ARGUMENTS, **ROUNDED}) as llm:
        found["rounded"] = {
            **answers(llm),
            "bytes a token": llm.memory_plan.kv_bytes_per_token,
            "offloaded": asked_again(llm),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
