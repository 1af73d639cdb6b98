"""EAGLE heads draft: what comes out is the model's, and every draft is what the published architecture makes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.drafts import checks_that_cost, counted, results
from support.eagle_head import EagleOracle, write_eagle, write_eagle3

from jaxllm import LLM, SamplingParams

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
    "block_size": 8,
}
DRAFTS = 3
#: two tokens are likely, so that drafts are right now and then
BIAS = {20: 40.0, 40: 40.0}
LENGTHS = (1, 2, 5, 6, 70, 40, 57, 60)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **ARGUMENTS, num_gpu_blocks_override=129, enforce_eager=True) as llm:
        yield llm


@pytest.fixture(scope="module", params=["eagle3", "eagle"])
def case(request: Any, tiny_model: Path, tmp_path_factory: Any) -> Iterator[tuple[LLM, EagleOracle]]:
    """With a pool that does not hold two long requests. A launch waits for the one before, so that none has fewer
    drafts since that one may have brought more tokens than it did.
    """
    write = {"eagle3": write_eagle3, "eagle": write_eagle}[request.param]
    head = write(tmp_path_factory.mktemp(request.param))
    drafts = {"method": request.param, "model": str(head), "num_speculative_tokens": DRAFTS}
    with (
        LLM(
            tiny_model, **ARGUMENTS, num_gpu_blocks_override=18, async_scheduling=False, speculative_config=drafts
        ) as llm,
        # whatever is drafted is checked
        checks_that_cost(llm, 0.0),
    ):
        yield llm, EagleOracle(tiny_model, head)


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(length)] for length in (5, 7, 8, 30, 50, 3, 17, 64)]


def numbers(llm: LLM) -> tuple[int, int]:
    return counted(llm, "num_draft_tokens"), counted(llm, "num_accepted_tokens")


def replayed(oracle: EagleOracle, prompt: list[int], output: list[int]) -> tuple[int, int]:
    """(drafted, accepted) while `output` was made: steps begin with what the prompt's last step has sampled."""
    drafted = accepted = 0
    done = 1
    while done < len(output):
        count = min(DRAFTS, len(output) - done - 1)
        drafts = oracle.drafts([*prompt, *output[:done]], count, BIAS)
        right = next((i for i, draft in enumerate(drafts) if draft != output[done + i]), count)
        drafted, accepted, done = drafted + count, accepted + right, done + 1 + right
    return drafted, accepted


def test_every_draft_is_the_published_heads(plain: LLM, case: tuple[LLM, EagleOracle]):
    """The numbers of right drafts are those of a torch head that computes every sequence from nothing: behind chunks of
    prompts that end within blocks and at their ends, hits of the prefix cache that go on otherwise, wrong drafts, and
    lots of which all were right.
    """
    llm, oracle = case
    rng = random.Random(0)
    first = [rng.randrange(256) for _ in range(33)]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logit_bias=BIAS)
    right = 0
    for prompt in ([7], first[:16], first, [*first[:24], *first[:9]], [*first, 5, 9]):
        (wanted,) = plain.generate(prompt, params, use_tqdm=False)
        before = numbers(llm)
        (got,) = llm.generate(prompt, params, use_tqdm=False)
        output = list(got.outputs[0].token_ids)
        assert output == list(wanted.outputs[0].token_ids)
        drafted, accepted = (now - then for now, then in zip(numbers(llm), before, strict=True))
        assert (drafted, accepted) == replayed(oracle, prompt, output)
        right += accepted
    assert right > 20


def test_beside_others_outputs_are_the_models(plain: LLM, case: tuple[LLM, EagleOracle]):
    """Sampled, with preemptions, hits of the prefix cache and a request that has no drafts."""
    llm, _ = case
    sampled: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "logit_bias": BIAS, "ignore_eos": True}
    params = [SamplingParams(**sampled, max_tokens=length) for length in LENGTHS]
    params[3] = SamplingParams(temperature=0.0, max_tokens=30, structured_outputs={"regex": "(ab|cd){2,9}"})
    before = numbers(llm)
    for _ in range(2):
        wanted, got = (one.generate(prompts(), params, use_tqdm=False) for one in (plain, llm))
        assert results(got) == results(wanted)
        assert llm.engine.core.cores[0].scheduler.kv_cache_manager.pool.num_used == 0
    drafted, accepted = (now - then for now, then in zip(numbers(llm), before, strict=True))
    assert drafted > accepted > 50
    assert sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")  # pyright: ignore
