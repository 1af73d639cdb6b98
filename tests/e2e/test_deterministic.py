"""deterministic=True: a request's tokens and log-probabilities are the same bits, whatever else the engine does."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import quantized_checkpoints
from support.quick_compile import QUICK

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput
from jaxllm.config.cross_checks import check_deterministic
from jaxllm.layers.context import Context
from jaxllm.layers.linear import linear_f32
from jaxllm.runner.compile.compiler_options import CPU_OPTIONS
from pallas_kernels.backend import Backend
from pallas_kernels.quant_matmul import cpu_ffi as int8
from pallas_kernels.quant_matmul.cpu_ffi import quant_matmul_cpu

BASE: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 16,
    "block_size": 16,
    "num_gpu_blocks_override": 257,
    "deterministic": True,
}
#: the same bits are expected of all of these
ENGINES: dict[str, dict[str, Any]] = {
    "every bucket": {"max_num_batched_tokens": 16, "long_prefill_token_threshold": 7},
    "whole prompts in a small pool": {
        "max_num_batched_tokens": 256,
        "block_size": 64,
        "num_gpu_blocks_override": 7,
        "scheduler_reserve_full_isl": False,
        "enforce_eager": True,
    },
    "one row": {"max_num_batched_tokens": 13, "max_num_seqs": 1, "block_size": 32, "enforce_eager": True},
}

#: (tokens of a common beginning, tokens of its own, the seed of both, tokens to generate, temperature)
REQUEST = st.tuples(
    st.integers(0, 70),
    st.integers(1, 150),
    st.integers(0, 1000),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.0, 0.9]),
)


def prompt(request: tuple[int, int, int, int, float]) -> list[int]:
    common, own, seed, _, _ = request
    shared = np.random.default_rng(0).integers(0, 256, 70)
    return [*shared[:common].tolist(), *np.random.default_rng(1 + seed).integers(0, 256, own).tolist()]


def params(request: tuple[int, int, int, int, float]) -> SamplingParams:
    _, _, seed, count, temperature = request
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=count, logprobs=3, ignore_eos=True)


def generate(llm: LLM, requests: list[Any]) -> list[RequestOutput]:
    return llm.generate([prompt(r) for r in requests], [params(r) for r in requests], use_tqdm=False)


def bits(output: RequestOutput) -> list[tuple[int, dict[int, int]]]:
    """Each token, and the bits of the log-probabilities at its place."""
    (completion,) = output.outputs
    assert completion.logprobs is not None
    return [
        (token, {i: int(np.float32(found.logprob).view(np.uint32)) for i, found in place.items()})
        for token, place in zip(completion.token_ids, completion.logprobs, strict=True)
    ]


class Engines:
    """One model, with all the options."""

    def __init__(self, engines: dict[str, LLM]):
        self.engines = engines
        self.preemptions = self.hits = 0

    def alone(self, request: Any) -> list[tuple[int, dict[int, int]]]:
        llm = self.engines["every bucket"]
        llm.reset_prefix_cache()
        return bits(generate(llm, [request])[0])

    def check(self, requests: list[Any]) -> None:
        expected = [self.alone(request) for request in requests]
        for name, llm in self.engines.items():
            llm.reset_prefix_cache()
            for attempt in ("at first", "with what the prefix cache has"):
                outputs = generate(llm, requests)
                for request, wanted, output in zip(requests, expected, outputs, strict=True):
                    assert bits(output) == wanted, f"{request} differs in {name!r}, {attempt}"
                    assert output.metrics is not None
                    self.preemptions += output.metrics.num_preemptions
                    self.hits += (output.num_cached_tokens or 0) > 0


@pytest.fixture(scope="module", params=[pytest.param("float32", marks=pytest.mark.thorough), "bfloat16"])
def engines(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Engines]:
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if request.param == "bfloat16":  # `test_real_weights` has it as users do; quick, so that `make test` has it
            for name, value in QUICK.items():
                patch.setitem(CPU_OPTIONS, name, value)
        made = {
            name: stack.enter_context(LLM(tiny_model, **{**BASE, **options}, dtype=request.param))
            for name, options in ENGINES.items()
        }
        yield Engines(made)


def test_the_same_bits_alone_and_in_any_batch(engines: Engines):
    @settings(max_examples=8, derandomize=True)
    @given(st.lists(REQUEST, min_size=1, max_size=14))
    def run(requests: list[Any]) -> None:
        engines.check(requests)

    run()
    assert engines.preemptions > 0 and engines.hits > 0, "the property was not tested on what it is about"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_of_a_product_is_the_same_bits_beside_any_number_of_rows(dtype: str):
    numbers = np.random.default_rng(0)
    x, weight = (jnp.asarray(numbers.standard_normal((rows, 576)), dtype) for rows in (64, 960))
    product = jax.jit(functools.partial(linear_f32, Context(backend=Backend(deterministic=True))))
    whole = np.asarray(product(x, weight)).view(np.uint32)
    for rows in (1, 2, 3, 4, 7, 8, 15, 16, 17, 33):
        np.testing.assert_array_equal(np.asarray(product(x[:rows], weight)).view(np.uint32), whole[:rows])


def test_the_switch_changes_what_it_must(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Without it, XLA multiplies a single row by other kernels: were it not so, the switch would be of no use there."""
    monkeypatch.setattr("jaxllm.runner.compile.cpu_kernels.load_dense", lambda *_, **__: "")
    for name, value in QUICK.items():
        monkeypatch.setitem(CPU_OPTIONS, name, value)
    options = {**BASE, "max_num_batched_tokens": 8, "max_num_seqs": 2, "dtype": "float32", "deterministic": False}
    request, other = (0, 1, 1, 8, 0.0), (0, 1, 2, 8, 0.0)
    with LLM(tiny_model, **options) as llm:
        alone = bits(generate(llm, [request])[0])
        llm.reset_prefix_cache()
        assert bits(generate(llm, [request, other])[0]) != alone


def test_prompt_logprobs_have_the_same_bits(engines: Engines):
    wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    prompts = [prompt((0, own, own, 1, 0.0)) for own in (3, 40, 90)]
    found = []
    for llm in engines.engines.values():
        for asked in (prompts, prompts[:1], prompts[1:]):
            for output in llm.generate(asked, wanted, use_tqdm=False):
                assert output.prompt_logprobs is not None
                values = [[found.logprob for found in place.values()] for place in output.prompt_logprobs if place]
                found.append((len(output.prompt_token_ids or ()), np.concatenate(values).astype(np.float32).tobytes()))
    assert len(set(found)) == len(prompts)


@pytest.mark.skipif(not int8.forms(), reason="the processor has no products of bytes")
def test_inputs_that_are_rounded_to_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the kernel, whose sums are integers: in chunks beside others, and alone, one row at a time."""
    for name, value in QUICK.items():
        monkeypatch.setitem(CPU_OPTIONS, name, value)
    used: list[int] = []
    real = quant_matmul_cpu
    monkeypatch.setattr(
        "pallas_kernels.quant_matmul.api.quant_matmul_cpu", lambda *args: used.append(len(args[1])) or real(*args)
    )
    options = {**BASE, "max_num_seqs": 4, "max_num_batched_tokens": 16, "enforce_eager": True, "dtype": "bfloat16"}
    requests: list[Any] = [(0, own, own, 6, 0.0) for own in (1, 9, 40)]
    with LLM(quantized_checkpoints.write(tmp_path, "int8")[0], **options) as llm:
        alone = []
        for request in requests:
            llm.reset_prefix_cache()
            alone += map(bits, generate(llm, [request]))
        llm.reset_prefix_cache()
        assert [bits(output) for output in generate(llm, requests)] == alone
    assert len(set(used)) > 1


@pytest.mark.thorough
def test_real_weights(smollm2_gguf: Path):
    """SmolLM2 in bfloat16: a prompt alone, in chunks beside others, and its answer computed again as a prompt."""
    options = {**BASE, "max_num_seqs": 4, "max_num_batched_tokens": 32, "enforce_eager": True, "dtype": "bfloat16"}
    request = (10, 70, 1, 4, 0.0)
    with LLM(smollm2_gguf, **options) as llm:
        alone = bits(generate(llm, [request])[0])
        llm.reset_prefix_cache()
        assert bits(generate(llm, [(0, 9, 2, 12, 0.0), (0, 50, 3, 9, 0.9), request])[-1]) == alone
        llm.reset_prefix_cache()
        answer = [token for token, _ in alone]
        wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        (again,) = llm.generate([prompt(request) + answer], wanted, use_tqdm=False)
    assert again.prompt_logprobs is not None
    for (token, place), found in zip(alone, again.prompt_logprobs[-len(answer) :], strict=True):
        assert found is not None and int(np.float32(found[token].logprob).view(np.uint32)) == place[token]


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_gpus_are_refused(platform: str):
    with pytest.raises(ValidationError, match="only available on a CPU so far"):
        check_deterministic(platform, pools=False)


def test_pooling_models_are_refused(tiny_model: Path):
    with pytest.raises(ValidationError, match="only available for models that generate"):
        LLM(tiny_model, runner="pooling", deterministic=True)
