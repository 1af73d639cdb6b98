"""Log-probabilities of generated and prompt tokens are transformers', whatever the engine did to compute them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.tiny_model import SMALL, VOCAB_SIZE

from jaxllm import LLM, RequestOutputKind, SamplingParams
from jaxllm.api.logprobs import FlatLogprobs
from jaxllm.api.outputs import RequestOutput

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
RANDOM = random.Random(3)
PROMPTS = [[RANDOM.randrange(256) for _ in range(length)] for length in (1, 2, 16, 33, 61, 90)]
BOTH = SamplingParams(**GREEDY, max_tokens=20, logprobs=4, prompt_logprobs=3)


@pytest.fixture(scope="module")
def tight(tiny_model: Path) -> Iterator[LLM]:
    """Chunks of 8 tokens, and memory for about two of the prompts; reports may be as wide as the vocabulary."""
    arguments = {
        **SMALL,
        "max_num_batched_tokens": 8,
        "max_model_len": 144,
        "block_size": 16,
        "num_gpu_blocks_override": 12,
    }
    with LLM(tiny_model, **arguments, max_logprobs=-1) as llm:
        yield llm


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def reference(model: Any, tokens: list[int]) -> np.ndarray:
    """float64 [T, V]: row i is of the token behind ``tokens[i]``."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1).numpy()


def check_position(entries: dict, token: int, expected: np.ndarray, count: int, tolerance: float = 1e-4) -> None:
    """One position's dictionary against the log-probabilities of the whole vocabulary."""
    assert next(iter(entries)) == token
    likeliest = np.argsort(-expected, kind="stable")[:count].tolist()
    assert set(entries) == {token, *likeliest}
    for other, entry in entries.items():
        assert entry.logprob == pytest.approx(expected[other], abs=tolerance)
        assert entry.rank == 1 + (expected > expected[other]).sum()


def check(output: RequestOutput, prompt: list[int], model: Any, params: SamplingParams = BOTH) -> None:
    completion = output.outputs[0]
    expected = reference(model, prompt + completion.token_ids)
    assert output.prompt_logprobs is not None and completion.logprobs is not None
    assert len(output.prompt_logprobs) == len(prompt) and output.prompt_logprobs[0] is None
    for i, token in enumerate(prompt[1:], start=1):
        check_position(output.prompt_logprobs[i] or {}, token, expected[i - 1], params.prompt_logprobs or 0)
    assert len(completion.logprobs) == len(completion.token_ids)
    for i, token in enumerate(completion.token_ids):
        check_position(completion.logprobs[i], token, expected[len(prompt) + i - 1], params.logprobs or 0)
    total = sum(completion.logprobs[i][token].logprob for i, token in enumerate(completion.token_ids))
    assert completion.cumulative_logprob == pytest.approx(total)


def run(llm: LLM, prompts: list[list[int]], params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def preemptions(llm: LLM) -> int:
    return next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")  # pyright: ignore


def numbers(output: RequestOutput) -> list[float]:
    """Every log-probability of an output."""
    positions = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    return [entry.logprob for position in positions for entry in (position or {}).values()]


def test_together_and_alone(engine: LLM, model: Any):
    together = run(engine, PROMPTS, BOTH)
    for prompt, output in zip(PROMPTS, together, strict=True):
        check(output, prompt, model)
    for prompt, output in zip(PROMPTS, together, strict=True):
        (alone,) = run(engine, [prompt], BOTH)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert numbers(alone) == pytest.approx(numbers(output), abs=1e-4)


def test_chunked_and_preempted(tight: LLM, model: Any):
    before = preemptions(tight)
    outputs = run(tight, PROMPTS, BOTH)
    assert preemptions(tight) > before
    assert any(output.metrics.num_preemptions for output in outputs)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        check(output, prompt, model)


def test_beside_requests_that_want_none(engine: LLM, model: Any):
    params = [SamplingParams(**GREEDY, max_tokens=9), BOTH, SamplingParams(temperature=1.0, seed=1, max_tokens=9)] * 2
    outputs = run(engine, PROMPTS, params)
    for i, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True)):
        if params[i] is BOTH:
            check(output, prompt, model)
        else:
            assert output.prompt_logprobs is None and output.outputs[0].logprobs is None


def test_the_prefix_cache_is_not_read_but_filled(engine: LLM, model: Any):
    prompt = PROMPTS[-1]
    engine.reset_prefix_cache()
    run(engine, [prompt], SamplingParams(**GREEDY, max_tokens=1))
    (scored,) = run(engine, [prompt], BOTH)
    assert scored.num_cached_tokens == 0
    check(scored, prompt, model)
    engine.reset_prefix_cache()
    run(engine, [prompt], BOTH)
    (plain,) = run(engine, [prompt], SamplingParams(**GREEDY, max_tokens=1))
    assert plain.num_cached_tokens == 64


def test_of_several_completions_one_computes_the_prompt(engine: LLM, model: Any):
    def hits() -> int:
        return next(m.value for m in engine.get_metrics() if m.name == "vllm:prefix_cache_hits")  # pyright: ignore

    prompt, params = PROMPTS[-1], BOTH.clone()
    params.n, params.temperature = 3, 1.0
    run(engine, [prompt], BOTH)
    before = hits()
    (output,) = run(engine, [prompt], params)
    assert hits() - before == 2 * 64
    for completion in output.outputs:
        check(dataclasses.replace(output, outputs=[completion]), prompt, model)


def test_the_whole_vocabulary(tight: LLM, model: Any):
    params = SamplingParams(**GREEDY, max_tokens=2, logprobs=-1, prompt_logprobs=-1)
    prompt = PROMPTS[2]
    (output,) = run(tight, [prompt], params)
    expected = reference(model, prompt + output.outputs[0].token_ids)
    assert output.prompt_logprobs is not None
    for i in range(1, len(prompt)):
        check_position(output.prompt_logprobs[i] or {}, prompt[i], expected[i - 1], VOCAB_SIZE)


def test_only_the_prompts_own_tokens(engine: LLM, model: Any):
    params = SamplingParams(**GREEDY, max_tokens=1, logprobs=0, prompt_logprobs=0)
    (output,) = run(engine, [PROMPTS[3]], params)
    check(output, PROMPTS[3], model, params)
    assert all(len(position or {}) == 1 for position in (output.prompt_logprobs or [])[1:])


def test_chosen_tokens(engine: LLM, model: Any):
    ids = [[5], list(range(100, 228)), [7, 7, 9], [256, 0]]
    params = [SamplingParams(temperature=1.0, seed=4, max_tokens=6, logprob_token_ids=chosen) for chosen in ids]
    params[1].prompt_logprobs = 2  # which are about the prompt's likeliest tokens all the same
    params[3].logprobs = 2
    for prompt, output, chosen in zip(PROMPTS[2:], run(engine, PROMPTS[2:], params), ids, strict=True):
        completion = output.outputs[0]
        expected = reference(model, prompt + completion.token_ids)
        for i, (token, entries) in enumerate(zip(completion.token_ids, completion.logprobs or [], strict=True)):
            row = expected[len(prompt) + i - 1]
            assert set(entries) == {token, *chosen} and next(iter(entries)) == token
            assert entries[token].rank == 1 + (row > row[token]).sum()
            for other, entry in entries.items():
                assert entry.logprob == pytest.approx(row[other], abs=1e-4)
                assert other == token or entry.rank is None
        assert completion.cumulative_logprob is not None
        if output.prompt_logprobs is not None:
            assert all(len(position or {}) in (2, 3) for position in output.prompt_logprobs[1:])


def test_flat_ones_say_the_same(engine: LLM):
    nested = run(engine, PROMPTS[:4], BOTH)
    params = BOTH.clone()
    params.flat_logprobs = True
    for plain, flat in zip(nested, run(engine, PROMPTS[:4], params), strict=True):
        logprobs, prompt_logprobs = flat.outputs[0].logprobs, flat.prompt_logprobs
        assert isinstance(logprobs, FlatLogprobs) and isinstance(prompt_logprobs, FlatLogprobs)
        assert logprobs == plain.outputs[0].logprobs and prompt_logprobs == plain.prompt_logprobs
        table = np.asarray(logprobs.logprobs).reshape(len(logprobs), -1)
        assert table.shape == (20, 1 + 4)
        assert table[:, 0].sum() == pytest.approx(flat.outputs[0].cumulative_logprob)


def test_texts_of_split_characters_come_whole(engine: LLM):
    text = "xé😀 aß漢y"
    (output,) = engine.generate(text, SamplingParams(**GREEDY, max_tokens=1, prompt_logprobs=1), use_tqdm=False)
    tokens = output.prompt_token_ids
    assert len(tokens) > len(text)
    pairs = list(zip(tokens, output.prompt_logprobs or [], strict=True))[1:]
    found = [(position or {})[token].decoded_token or "" for token, position in pairs]
    assert "".join(found) == text[1:]
    params = SamplingParams(**GREEDY, max_tokens=1, logprobs=1, prompt_logprobs=1, detokenize=False)
    (silent,) = engine.generate(text, params, use_tqdm=False)
    assert all(e.decoded_token is None for e in (silent.outputs[0].logprobs or [{}])[0].values())


def test_a_stream_has_the_prompts_once(engine: LLM):
    core, prompt = engine.engine.core, PROMPTS[4]
    params = BOTH.clone()
    params.output_kind = RequestOutputKind.DELTA
    core.add_request(*engine.engine.inputs.request("stream", prompt, params))
    outputs = []
    while core.has_unfinished:
        outputs += core.step()
    outputs += core.drain()
    assert len(outputs) == 20
    assert [len(output.prompt_logprobs or []) for output in outputs] == [len(prompt)] + [0] * 19
    assert [len(output.outputs[0].logprobs or []) for output in outputs] == [1] * 20


def test_aborted_at_any_step(tight: LLM, model: Any):
    core = tight.engine.core
    for steps in range(1, 16):
        core.add_request(*tight.engine.inputs.request(f"abort-{steps}", PROMPTS[-1], BOTH))
        for _ in range(steps):
            core.step()
        core.abort([f"abort-{steps}"])
    (output,) = run(tight, [PROMPTS[3]], BOTH)
    check(output, PROMPTS[3], model)
