"""Sliding windows through the whole engine, against transformers: windows crossed, blocks freed and reused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from jaxllm import LLM, SamplingParams

WINDOW = 24
COMMON: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def gemma3() -> torch.nn.Module:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    config = Gemma3TextConfig(**COMMON, num_hidden_layers=7, layer_types=kinds, query_pre_attn_scalar=16)
    return Gemma3ForCausalLM(config)


def mistral() -> torch.nn.Module:
    return MistralForCausalLM(MistralConfig(**COMMON, num_hidden_layers=2))


@pytest.fixture(scope="module", params=[gemma3, mistral], ids=["gemma3", "mistral"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(transformers' model, ours) with the same random weights, drawn wide so that ties are improbable."""
    torch.manual_seed(0)
    reference = request.param().eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if "norm" in name else 1.5 / parameter.shape[-1] ** 0.5))
    folder: Path = tmp_path_factory.mktemp(request.param.__name__)
    reference.save_pretrained(folder)
    with LLM(
        folder,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=8,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        # six requests of 150 tokens need more than this unless windows give blocks back
        num_gpu_blocks_override=140,
        max_model_len=256,
        generation_config="vllm",
    ) as llm:
        yield reference, llm


def test_greedy_tokens_equal_transformers(pair):
    reference, llm = pair
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 211, length).tolist() for length in (1, 7, 23, 24, 25, 60, 110)]
    prompts.append(prompts[-1][:80] + [5, 6, 7])  # shares a prefix that is longer than the window
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    expected = [greedy(reference, prompt, 40) for prompt in prompts]
    for _ in range(2):  # the second time out of the prefix cache
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for prompt, output, ids in zip(prompts, outputs, expected, strict=True):
            assert output.outputs[0].token_ids == ids, f"prompt of {len(prompt)} tokens"
    assert outputs[-1].num_cached_tokens >= 64
    assert llm.engine.core.scheduler.kv_cache_manager.usage == 0.0


def greedy(reference: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
