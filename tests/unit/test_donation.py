"""The KV cache is never copied: every step writes into the buffer that it was given. By the compiler's own account."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.config.cache import kv_cache_groups
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.rules import shapes
from jaxllm.runner.buckets import Bucket, make_buckets
from jaxllm.runner.compile.programs import CPU_OPTIONS
from jaxllm.runner.heads.sampling_programs import SamplingPrograms
from jaxllm.runner.heads.sampling_step import State, StepConfig
from jaxllm.runner.runner import Runner
from pallas_kernels.storage import STORAGE

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
BLOCK_SIZE, MAX_NUM_SEQS, MAX_MODEL_LEN = 16, 6, 128


def make_programs(dtype: str, num_blocks: int) -> tuple[SamplingPrograms, State]:
    """Programs of a model with two groups of layers, not compiled yet."""
    model = dataclasses.replace(model_config(LLAMA), layer_window=(32, None, 32))
    groups = kv_cache_groups(model.kv_specs)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    pages = num_blocks * max(len(group.layers) for group in groups)
    page = (2 * model.num_kv_heads, BLOCK_SIZE, model.head_dim)
    stored = STORAGE.get(jnp.dtype(dtype), jnp.dtype(dtype))
    state = State(
        cache=jax.ShapeDtypeStruct((pages, *page), stored, sharding=sharding),  # pyright: ignore[reportArgumentType]
        tokens=jax.ShapeDtypeStruct((MAX_NUM_SEQS + 1, MAX_MODEL_LEN), jnp.int32, sharding=sharding),  # pyright: ignore
    )
    programs = SamplingPrograms(
        StepConfig(model=model, groups=groups, num_logprobs=5, logprobs_mode="raw_logprobs", max_scored_tokens=16),
        make_buckets(64, MAX_NUM_SEQS, eager=True),
        MAX_MODEL_LEN // BLOCK_SIZE,
        shapes(decoder_specs(model), jnp.dtype(dtype), sharding),
        state,
        platform="cpu",
        eager=True,
        cache_dir=None,
        num_decode_steps=4,
        decode_buckets=(Bucket(MAX_NUM_SEQS, MAX_NUM_SEQS, decode_only=True),),
    )
    return programs, state


def size(shape: Any) -> int:
    return math.prod(shape.shape) * shape.dtype.itemsize


def test_every_program_writes_in_place():
    programs, state = make_programs("bfloat16", 40)
    programs.compile_all(progress=False)
    kinds = set()
    for (kind, *_), program in programs._compiled.items():
        whole = size(state.cache) + size(state.tokens)
        expected = {"forward": whole, "decode steps": whole, "score": 0}.get(kind, size(state.tokens))
        memory = program.memory_analysis()
        assert memory is not None and memory.alias_size_in_bytes == expected
        kinds.add(kind)
    assert kinds == {"forward", "decode steps", "sample", "score", "write tokens"}


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "forward"), ("bfloat16", "forward"), ("bfloat16", "several")])
def test_a_step_needs_no_more_memory_for_a_larger_cache(dtype: str, kind: str):
    temporaries = []
    for num_blocks in (40, 2000):
        programs, state = make_programs(dtype, num_blocks)
        if kind == "forward":
            lowered = programs.lower_forward(programs.largest)
        else:
            lowered = programs.lower_decode_steps(next(iter(programs.decode_packings)), full=False)
        memory = lowered.compile(compiler_options=CPU_OPTIONS).memory_analysis()
        assert memory is not None and memory.alias_size_in_bytes == size(state.cache) + size(state.tokens)
        temporaries.append(memory.temp_size_in_bytes)
    few, many = temporaries
    assert few == many
    assert many < size(state.cache) / 4, "the cache is large enough for a copy of it to show"


def test_the_buffer_stays_where_it_is(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with LLM(
        tmp_path,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=64,
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
    ) as llm:
        places, count = set(), 0
        core, runner = llm.engine.core, llm.engine.runner
        assert isinstance(runner, Runner)
        params = SamplingParams(temperature=0.7, seed=3, presence_penalty=0.5, max_tokens=9, logprobs=2)
        for i, length in enumerate((1, 70, 12, 100, 33)):
            core.add_request(*llm.engine.inputs.request(str(i), list(range(length)), params))
        while core.has_unfinished:
            core.step()
            count += 1
            state = runner._live()
            assert isinstance(state, State)
            places.add((state.cache.unsafe_buffer_pointer(), state.tokens.unsafe_buffer_pointer()))
        assert count > 10
        assert len(places) == 1
