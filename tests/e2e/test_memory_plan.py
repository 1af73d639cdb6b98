"""The memory plan is exact, and when nothing fits its error names values that do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxllm import LLM
from jaxllm.api.errors import ValidationError
from jaxllm.models.registry import model_config
from jaxllm.weights.checkpoint import Checkpoint

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": 16,
}


def refused(model: Path, **kwargs) -> str:
    with pytest.raises(ValidationError) as error:
        LLM(model, **ARGUMENTS, **kwargs)
    return str(error.value)


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found[1])


def test_the_plan_counts_what_is_allocated(tiny_model: Path):
    before = {id(array) for array in jax.live_arrays()}
    with LLM(tiny_model, **ARGUMENTS, max_model_len=256, num_gpu_blocks_override=40) as llm:
        plan = llm.memory_plan
        cache = llm.engine.runner._live().cache  # pyright: ignore
        held = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
        assert held - cache.nbytes == plan.weight_bytes + plan.state_bytes
        # more only where they take no memory
        assert cache.nbytes >= plan.kv_cache_bytes
        assert cache.nbytes == plan.kv_cache_bytes or llm.engine.runner.head.programs.cache_grows  # pyright: ignore
        config = model_config(Checkpoint(tiny_model).config)
        per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4
        assert plan.kv_cache_bytes == 40 * 16 * per_token
        assert plan.num_tokens == 39 * 16
        assert plan.max_concurrency == pytest.approx(39 * 16 / 256)
        assert "\nKV cache size: 624 tokens, Maximum concurrency for 256 tokens per request: 2.44x" in str(plan)


def test_too_few_blocks_name_the_longest_length_and_the_number_of_blocks_that_fit(tiny_model: Path):
    text = refused(tiny_model, max_model_len=512, num_gpu_blocks_override=11)
    longest = number(r"estimated maximum model length is (\d+)", text)
    blocks = number(r"increasing num_gpu_blocks_override to (\d+)", text)
    assert longest == 160
    LLM(tiny_model, **ARGUMENTS, max_model_len=longest, num_gpu_blocks_override=11).shutdown()
    refused(tiny_model, max_model_len=longest + 1, num_gpu_blocks_override=11)
    LLM(tiny_model, **ARGUMENTS, max_model_len=512, num_gpu_blocks_override=blocks).shutdown()
    refused(tiny_model, max_model_len=512, num_gpu_blocks_override=blocks - 1)


def test_too_few_bytes_name_the_bytes_that_fit(tiny_model: Path):
    text = refused(tiny_model, max_model_len=512, kv_cache_memory_bytes=100_000)
    enough = number(r"increasing kv_cache_memory_bytes to (\d+)", text)
    LLM(tiny_model, **ARGUMENTS, max_model_len=512, kv_cache_memory_bytes=enough).shutdown()


def test_no_block_at_all_says_so(tiny_model: Path):
    text = refused(tiny_model, max_model_len=512, kv_cache_memory_bytes=100)
    assert text.startswith("No available memory for the cache blocks.")


def test_a_length_of_minus_one_is_fitted(tiny_model: Path):
    with LLM(tiny_model, **ARGUMENTS, max_model_len=-1, num_gpu_blocks_override=11) as llm:
        assert llm.memory_plan.max_model_len == 160


def test_longer_than_the_model_can_is_refused(tiny_model: Path):
    assert "max_position_embeddings=512" in refused(tiny_model, max_model_len=513)


@pytest.mark.parametrize("cache", [{"kv_cache_memory_bytes": 10**15}, {"num_gpu_blocks_override": 10**9}])
def test_more_cache_than_the_device_has_names_what_it_has(tiny_model: Path, cache: dict[str, int]):
    text = refused(tiny_model, max_model_len=256, **cache)
    assert number(r"kv_cache_memory_bytes <= (\d+)", text) == number(r"num_gpu_blocks_override <= (\d+)", text) * 8192


def test_too_small_a_share_of_the_memory_names_one_that_is_enough(tiny_model: Path):
    text = refused(tiny_model, max_model_len=256, gpu_memory_utilization=1e-9)
    found = re.search(r"increasing gpu_memory_utilization to ([0-9.]+)", text)
    assert found, text
    LLM(tiny_model, **ARGUMENTS, max_model_len=256, gpu_memory_utilization=float(found[1])).shutdown()
