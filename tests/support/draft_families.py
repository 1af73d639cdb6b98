"""Tiny models of several families, who drafts for them, and 200 requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from support.drafts import repeating
from support.eagle_head import write_eagle, write_eagle3
from support.mtp_layer import write_mtp
from support.tiny_model import CONFIG

from jaxllm import SamplingParams
from jaxllm.layers.weight import is_spec
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    # windows in every other layer, and soft caps
    "Gemma2": {
        "sliding_window": 24,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 30.0,
    },
    # experts, and windows in every layer
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": 24},
    # experts, sinks, and windows in every other layer
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": 24},
    # latents, experts, and a layer that drafts
    "DeepseekV3": {},
}
DRAFTERS = ("ngram", "suffix", "draft_model", "eagle", "eagle3")


def write_family(folder: Path, family: str) -> Path:
    """A model with random weights whose scores lie far apart."""
    if family == "DeepseekV3":
        return write_mtp(folder)
    config = {**CONFIG, **FAMILIES[family], "architectures": [f"{family}ForCausalLM"]}
    del config["model_type"]
    random, specs = np.random.default_rng(0), decoder_specs(model_config(config))
    tensors = {
        name: (random.standard_normal(spec.tensor_shape(part)) / part.shape[-1] ** 0.5).astype(np.float32)
        for spec in jax.tree.leaves(specs, is_leaf=is_spec)
        for name, part in spec.tensors()
    }
    tensors["lm_head.weight"] *= 4
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def drafts_of(drafter: str, folder: Path, model: Path | None, hidden: int, vocab: int) -> dict[str, Any]:
    """``speculative_config``, of one draft a step.

    Args:
        model: another one, which can draft; None: the model itself does, in fewer bits.
        hidden, vocab: of the model that is drafted for.
    """
    config: dict[str, Any] = {"method": drafter, "num_speculative_tokens": 1}
    if drafter == "ngram":
        config["prompt_lookup_min"] = 1
    elif drafter == "draft_model" and model is not None:
        config["model"] = str(model)
    elif drafter == "eagle":
        config["model"] = str(write_eagle(folder, size=hidden))
    elif drafter == "eagle3":
        config["model"] = str(write_eagle3(folder, hidden=hidden, vocab=vocab))
    return config


def mixed_requests(longest: int, most: int, *, same: bool = False) -> tuple[list[list[int]], list[SamplingParams]]:
    """200 greedy requests. Of every other one few tokens are likely, so that drafts are right now and then.

    Args:
        longest, most: tokens of prompts and outputs; of four, outputs are far longer.
        same: the likely tokens are the same of all requests. Random weights may make one of them all the time, and a
            head another one.
    """
    lengths = np.random.default_rng(3)
    prompts = [repeating(seed, int(lengths.integers(1, longest + 1))) for seed in range(200)]
    outputs = [84, 84, 84, 84, *(int(lengths.integers(1, most + 1)) for _ in range(196))]

    def likely(index: int) -> dict[int, float]:
        first = 60 if same else index
        return dict.fromkeys(range(first, first + 3), 60.0)

    return prompts, [
        SamplingParams(
            temperature=0.0, logit_bias=likely(index) if index % 2 else None, max_tokens=n, ignore_eos=index < 100
        )
        for index, n in enumerate(outputs)
    ]
