"""The sampler's slices of rows: a loop of as many as a step has on a CPU, a fixed number on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quick_compile import THOROUGH

from jaxllm.config.cache import kv_cache_groups
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.rules import shapes
from jaxllm.runner.buckets import make_buckets
from jaxllm.runner.heads.sampling_programs import SAMPLE_ROWS_GPU, SamplingPrograms
from jaxllm.runner.heads.sampling_step import State, StepConfig, sample_step
from jaxllm.weights.loader import dummy

VOCAB, HIDDEN = 300, 32
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def programs(max_num_seqs: int, platform: str, *, eager: bool = False) -> SamplingPrograms:
    model = model_config(LLAMA)
    groups = kv_cache_groups(model.kv_specs)
    state = State(
        cache=jax.ShapeDtypeStruct((8, 2, 16, 16), jnp.float32, sharding=SHARDING),  # pyright: ignore
        tokens=jax.ShapeDtypeStruct((max_num_seqs + 1, 32), jnp.int32, sharding=SHARDING),  # pyright: ignore
    )
    return SamplingPrograms(
        StepConfig(model=model, groups=groups, num_logprobs=2, logprobs_mode="raw_logprobs", max_scored_tokens=4),
        make_buckets(max(max_num_seqs, 64), max_num_seqs, eager=eager),
        2,
        shapes(decoder_specs(model), jnp.dtype(jnp.float32), SHARDING),
        state,
        platform=platform,
        eager=eager,
        cache_dir=None,
    )


@pytest.mark.parametrize(("max_num_seqs", "eager"), [(1, False), (5, False), (256, False), (700, False), (700, True)])
def test_a_gpu_has_a_sampler_for_every_number_of_rows(max_num_seqs: int, eager: bool):
    made = programs(max_num_seqs, "cuda", eager=eager)
    assert made._sample_rows[-1] == max_num_seqs
    assert made.config.fixed_sample_rows == SAMPLE_ROWS_GPU[-1]
    assert programs(max_num_seqs, "cpu", eager=eager).config.fixed_sample_rows is None


def test_a_gpus_greedy_sampler_has_nothing_to_wait_for():
    """No loop and no branch, whose conditions the host would have to read before it can go on launching."""
    made = programs(70, "cuda")
    for rows in made._sample_rows:
        text = made.lower_sampler(rows, False).compile(compiler_options=THOROUGH).as_text()  # pyright: ignore
        assert text is not None and " while(" not in text and " conditional(" not in text
    looping = programs(70, "cpu").lower_sampler(8, False).compile().as_text()
    assert looping is not None and " while(" in looping


@pytest.mark.parametrize("num_samples", [1, 4, 5, 11])
@pytest.mark.parametrize(("rows", "fixed"), [(11, 4), (11, 16), (8, 4)])
def test_the_same_tokens_either_way(num_samples: int, rows: int, fixed: int):
    if num_samples > rows:
        return
    capacity = 11
    made = programs(capacity, "cpu")
    packing = made.sample_packing
    buffer = np.zeros(packing.size, np.int32)
    fields = packing.views(buffer)
    fields["num_samples"][...] = num_samples
    fields["rows"][:] = np.random.default_rng(1).permutation(capacity)
    fields["positions"][:] = np.arange(capacity) + 3
    params = made.head_params(dummy(decoder_specs(made.config.model), jnp.dtype(jnp.float32), SHARDING))
    hidden = np.zeros((capacity, HIDDEN), np.float32)
    hidden[:num_samples] = np.random.default_rng(0).standard_normal((num_samples, HIDDEN))
    expected = np.argmax(hidden.astype(np.float64) @ np.asarray(params.head, np.float64).T, axis=1)[:num_samples]
    for config in (made.config, dataclasses.replace(made.config, fixed_sample_rows=fixed)):
        before = jnp.zeros((capacity + 1, 32), jnp.int32)
        tokens, sampled = sample_step(
            config, rows, packing, params, before, jnp.asarray(hidden), jnp.asarray(buffer), None
        )
        np.testing.assert_array_equal(np.asarray(sampled.token_ids)[:num_samples], expected)
        at = fields["rows"][:num_samples], fields["positions"][:num_samples]
        np.testing.assert_array_equal(np.asarray(tokens)[at], expected)
        # everything else is as it was, but for the last row, which is trash
        kept = np.asarray(tokens)[:-1].copy()
        kept[at] = 0
        assert not kept.any()
