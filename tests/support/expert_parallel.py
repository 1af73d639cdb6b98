"""Engines of a small model with experts, whole, split and spread over virtual devices, in a process that has JAX to
itself.

``python -m support.expert_parallel FOLDER`` prints one JSON object: by name, what each engine answered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from support.tensor_parallel import GREEDY, PROMPTS, SEEDED, exchanged, generate, tokens
from support.tiny_model import CONFIG, EOS, byte_tokenizer
from support.ways import WAYS_ARGUMENTS, counted, every_way

from jaxllm import LLM
from jaxllm.api.metric import Counter
from jaxllm.layers.weight import is_spec
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs

#: a dense layer behind a sparse one; a width of experts that four devices divide, and a shared MLP's
EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "mlp_only_layers": [1],
}
#: name -> engine arguments; the first makes as many devices as the others need, and saves what these load
ENGINES: dict[str, dict[str, Any]] = {
    "spread over 4": {"tensor_parallel_size": 4, "enable_expert_parallel": True},
    "split over 2": {"tensor_parallel_size": 2},
    "two replicas": {
        "data_parallel_size": 2,
        "num_decode_steps": 4,
        "enforce_eager": False,
        "max_num_batched_tokens": 8,
    },
}
#: each replica is one device that has the whole model; what transformers answers, too, shows that they are right
REFERENCE = "two replicas"


def write_model(folder: Path) -> None:
    """Weights as `tiny_model` draws them, so that scores lie far apart."""
    config, random = {**CONFIG, **EXPERTS}, np.random.default_rng(5)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    gains = {"q_proj.weight": 2.0, "k_proj.weight": 2.0, "lm_head.weight": 4.0, "mlp.gate.weight": 4.0}
    tensors = {}
    for spec in jax.tree.leaves(decoder_specs(model_config(config)), is_leaf=is_spec):
        for name, part in spec.tensors():
            gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
            drawn = random.standard_normal(spec.tensor_shape(part)) * gain / np.sqrt(part.shape[-1])
            tensors[name] = np.ones(part.shape, np.float32) if "norm" in name else drawn.astype(np.float32)
    tensors["lm_head.weight"][EOS] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"})
    )


def answers(llm: LLM) -> dict[str, Any]:
    found: dict[str, Any] = {"greedy": tokens(generate(llm, PROMPTS, GREEDY))}
    found["preemptions"] = sum(
        metric.value
        for metric in llm.get_metrics()
        if isinstance(metric, Counter) and metric.name == "vllm:num_preemptions"
    )
    again = generate(llm, PROMPTS[2], GREEDY)
    found["prefix hits"], found["after prefix hits"] = again[0].num_cached_tokens, tokens(again)
    found["seeded"] = tokens(generate(llm, PROMPTS, SEEDED))
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    write_model(folder / "model")
    found: dict[str, Any] = {}
    for name, arguments in ENGINES.items():
        model = "model" if name.startswith("spread") else "saved"
        with LLM(folder / model, **{**WAYS_ARGUMENTS, **arguments}) as llm:
            found[name] = {"load": counted(llm), **answers(llm), "exchanged": exchanged(llm)["count"]}
            found[name]["ways"] = every_way(llm, folder / "model")
            params, *_ = llm.apply_model(lambda params: params)
            experts = params.layers[0].sparse.experts.gate_up
            found[name]["experts"] = sorted({shard.data.shape for shard in experts.addressable_shards})
            if name.startswith("spread"):
                llm.save(folder / "saved")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
