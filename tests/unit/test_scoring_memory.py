"""What the log-probabilities of a prompt need, by the compiler's account: a block of logits, whatever its length."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config.cache import kv_cache_groups
from jaxllm.config.engine_args import engine_args
from jaxllm.config.resolve import SCORED_BYTES, scheduler_config
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.rules import shapes
from jaxllm.runner.buckets import make_buckets
from jaxllm.runner.capacities import SAMPLE_ROWS_CPU
from jaxllm.runner.compile.compiler_options import CPU_OPTIONS
from jaxllm.runner.heads.sampling_programs import SamplingPrograms
from jaxllm.runner.heads.sampling_step import State, StepConfig

VOCAB = 151_936
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}


def scoring_bytes(max_model_len: int, max_num_batched_tokens: int, num_logprobs: int = 20) -> tuple[int, int]:
    """(temporaries, outputs) of the scoring program of an engine with these limits."""
    args = engine_args("m", max_num_seqs=64, max_num_batched_tokens=max_num_batched_tokens)
    limits = scheduler_config(args, max_model_len=max_model_len, platform="cpu", num_logprobs=num_logprobs)
    model = model_config(CONFIG)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    state = State(
        cache=jax.ShapeDtypeStruct((9000, 2 * 2, 16, 32), jnp.float32, sharding=sharding),  # pyright: ignore
        tokens=jax.ShapeDtypeStruct((65, max_model_len), jnp.int32, sharding=sharding),  # pyright: ignore
    )
    programs = SamplingPrograms(
        StepConfig(
            model=model,
            groups=kv_cache_groups(model.kv_specs),
            num_logprobs=num_logprobs,
            logprobs_mode="raw_logprobs",
            max_scored_tokens=limits.max_scored_tokens,
        ),
        make_buckets(limits.max_num_batched_tokens, 64, eager=True),
        -(-max_model_len // 16),
        shapes(decoder_specs(model), jnp.dtype(jnp.float32), sharding),
        state,
        platform="cpu",
        eager=True,
        cache_dir=None,
    )
    memory = programs.lower_scorer().compile(compiler_options=CPU_OPTIONS).memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes, memory.output_size_in_bytes


def test_100k_tokens_need_no_more_than_a_thousand():
    block = SAMPLE_ROWS_CPU[-1] * VOCAB * 4
    short, long = scoring_bytes(1_000, 512), scoring_bytes(100_000, 100_000)
    assert short == long
    assert block <= long[0] < 6 * block, "a few arrays of one block of logits"
    assert long[1] < 2**20
    assert 100 * long[0] < 100_000 * VOCAB * 4, "the logits of the whole prompt"


def test_whole_vocabularies_leave_in_bounded_pieces():
    temporaries, outputs = scoring_bytes(1_000, 512, num_logprobs=VOCAB)
    assert outputs <= SCORED_BYTES + 2**20
    assert temporaries < 12 * SAMPLE_ROWS_CPU[-1] * VOCAB * 4


@pytest.mark.parametrize(
    ("platform", "num_tokens", "num_logprobs", "expected"),
    [
        ("cpu", 512, 20, 256),
        ("cpu", 64, 20, 256),
        ("cuda", 8192, 20, 1024),
        ("cuda", 8192, VOCAB, 55),
        ("cpu", 64, 0, 256),
    ],
)
def test_positions_scored_in_a_step(platform: str, num_tokens: int, num_logprobs: int, expected: int):
    args = dataclasses.replace(engine_args("m"), max_num_batched_tokens=num_tokens)
    limits = scheduler_config(args, max_model_len=8192, platform=platform, num_logprobs=num_logprobs)
    assert limits.max_scored_tokens == expected
