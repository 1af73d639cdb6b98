"""Suffix decoding: drafts out of a request and of what earlier ones got change nothing of outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.drafts import checks_that_cost, compare, counted, repeating

from jaxllm import LLM, SamplingParams

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "block_size": 8,
}
SUFFIX = {"method": "suffix", "num_speculative_tokens": 3, "suffix_decoding_max_cached_requests": 3}


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **ARGUMENTS, num_gpu_blocks_override=129, enforce_eager=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def drafting(tiny_model: Path) -> Iterator[LLM]:
    """With a pool that does not hold two long requests."""
    with LLM(tiny_model, **ARGUMENTS, num_gpu_blocks_override=24, speculative_config=SUFFIX) as llm:
        # whatever is drafted is checked
        with checks_that_cost(llm, 0.0):
            yield llm


SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.6, "seed": 5, "ignore_eos": True}
ANYTHING: dict[str, Any] = {"temperature": 2.0, "ignore_eos": True}


@pytest.mark.parametrize("sampling", [{"temperature": 0.0, "ignore_eos": True}, SAMPLED], ids=["greedy", "sampled"])
def test_outputs_are_those_without_drafts(plain: LLM, drafting: LLM, sampling: dict[str, Any]):
    """More requests than rows, some of which are preempted."""
    before = counted(drafting, "num_accepted_tokens")
    prompts = [repeating(seed, length) for seed, length in enumerate((5, 30, 50, 64, 9))]
    params = [
        SamplingParams(**sampling, max_tokens=n, logit_bias=dict.fromkeys(range(60, 64), 40.0))
        for n in (1, 70, 57, 60, 30)
    ]
    compare(plain, drafting, prompts, params)
    assert counted(drafting, "num_accepted_tokens") > before


def test_what_earlier_requests_got_is_drafted(plain: LLM, drafting: LLM):
    """As long as it is kept: of the latest three requests, and until the engine sleeps."""

    def accepted(seed: int) -> int:
        params = SamplingParams(**ANYTHING, seed=seed, max_tokens=60)
        (output,) = compare(plain, drafting, [repeating(1, 20)], params)
        assert output.metrics is not None
        return output.metrics.num_accepted_tokens

    # tokens of which none is likely: nothing that went before tells them
    assert accepted(1) < 10
    assert accepted(1) > 35
    for seed in (2, 3):
        assert accepted(seed) < 10
    assert accepted(1) > 35
    for seed in (4, 5, 6):
        assert accepted(seed) < 10
    assert accepted(1) < 10
    assert accepted(1) > 35
    # the last output is written with the next step
    accepted(7)
    drafting.sleep(1)
    drafting.wake_up()
    assert accepted(1) < 10
