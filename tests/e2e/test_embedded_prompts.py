"""Prompts that are vectors, end to end: equal to token ids where the vectors are theirs, and to transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny_model import CONFIG, SMALL

from jaxllm import LLM, AsyncLLM, BeamSearchParams, EmbedsPrompt, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.metric import Counter
from jaxllm.api.outputs import RequestOutput

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 160,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": 16,
    # fewer than four requests of 96 tokens fill
    "num_gpu_blocks_override": 20,
    "enforce_eager": True,
    "enable_prompt_embeds": True,
}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **ARGUMENTS) as engine:
        yield engine


@pytest.fixture(scope="module")
def table(tiny_model: Path) -> np.ndarray:
    return load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"]


@pytest.fixture(scope="module")
def theirs(tiny_model: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def ids(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(256, size=count).tolist()


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


def counter(llm: LLM, name: str) -> int:
    return next(m.value for m in llm.get_metrics() if isinstance(m, Counter) and m.name == name)


def test_vectors_of_tokens_are_the_tokens(llm: LLM, table: np.ndarray):
    """In one batch with prompts of ids and texts, over several chunks, and with everything that a request may want."""
    prompts = [ids(seed, count) for seed, count in enumerate((1, 2, 16, 31, 32, 33, 100))]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
    embedded = [EmbedsPrompt(prompt_embeds=table[prompt]) for prompt in prompts]
    outputs = llm.generate([*embedded, *prompts, "a text"], params, use_tqdm=False)
    ours, expected = outputs[: len(prompts)], outputs[len(prompts) : -1]
    assert tokens(ours) == tokens(expected)
    assert [o.outputs[0].text for o in ours] == [o.outputs[0].text for o in expected]
    for a, b in zip(ours, expected, strict=True):
        assert (a.prompt, a.prompt_token_ids) == (None, [0] * len(b.prompt_token_ids))
        for x, y in zip(a.outputs[0].logprobs or [], b.outputs[0].logprobs or [], strict=True):
            assert x.keys() == y.keys()
            assert [v.logprob for v in x.values()] == pytest.approx([v.logprob for v in y.values()], abs=1e-5)
    assert len(outputs[-1].outputs[0].token_ids) == 12

    several = SamplingParams(temperature=1.2, n=3, seed=3, max_tokens=20, ignore_eos=True)
    for params in (GREEDY, several):
        assert tokens(llm.generate(embedded, params, use_tqdm=False)) == tokens(
            llm.generate(prompts, params, use_tqdm=False)
        )


@pytest.mark.parametrize("penalty", [1.0, 1.7])
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")  # it means what we test
def test_any_vectors_are_what_transformers_makes_of_them(llm: LLM, theirs: Any, penalty: float):
    """A repetition penalty counts outputs only: vectors are no tokens."""
    rng = np.random.default_rng(8)
    prompts = [rng.standard_normal((count, CONFIG["hidden_size"])).astype(np.float32) for count in (1, 20, 70)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, repetition_penalty=penalty)
    given = [prompts[0], jnp.asarray(prompts[1]), torch.tensor(prompts[2], requires_grad=True)]
    found = tokens(llm.generate([{"prompt_embeds": array} for array in given], params, use_tqdm=False))
    for prompt, ours in zip(prompts, found, strict=True):
        embeds = torch.tensor(prompt[None])
        with torch.no_grad():
            expected = theirs.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                do_sample=False,
                max_new_tokens=16,
                min_new_tokens=16,
                repetition_penalty=penalty,
                pad_token_id=0,
            )
        assert ours == expected[0].tolist()


def test_prefixes_are_found_by_their_vectors(llm: LLM, table: np.ndarray):
    vectors = table[ids(20, 70)]
    first, again = (llm.generate({"prompt_embeds": vectors}, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 64)
    assert tokens([first]) == tokens([again])
    other = vectors.copy()
    other[40] += 1.0
    [changed] = llm.generate({"prompt_embeds": other}, GREEDY, use_tqdm=False)
    assert changed.num_cached_tokens == 32 and tokens([changed]) != tokens([first])
    # a penalty looks at the history, which a hit leaves out of the steps
    penalised = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, repetition_penalty=1.5)
    cold, warm = (
        llm.generate({"prompt_embeds": vectors, "cache_salt": salt}, penalised, use_tqdm=False)[0]
        for salt in ("p", "p")
    )
    assert warm.num_cached_tokens == 64 and tokens([cold]) == tokens([warm])
    [zeros] = llm.generate({"prompt_token_ids": [0] * 70}, GREEDY, use_tqdm=False)
    assert zeros.num_cached_tokens == 0


def test_a_preempted_prompt_is_computed_again(llm: LLM, table: np.ndarray):
    prompts = [ids(30 + i, 48) for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    alone = tokens([llm.generate(prompt, params, use_tqdm=False)[0] for prompt in prompts])
    llm.reset_prefix_cache()
    before = counter(llm, "vllm:num_preemptions")
    together = tokens(llm.generate([{"prompt_embeds": table[prompt]} for prompt in prompts], params, use_tqdm=False))
    assert counter(llm, "vllm:num_preemptions") > before
    assert together == alone


def test_nothing_is_compiled_after_the_start(llm: LLM, table: np.ndarray):
    counts: list[str] = []

    def count(event: str, *_: Any, **__: Any) -> None:
        if "compil" in event:
            counts.append(event)

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for length in (1, 3, 9, 17, 40):
            prompts = [{"prompt_embeds": table[ids(length + i, length)]} for i in range(4)]
            llm.generate([*prompts, *(ids(i, 5) for i in range(3))], GREEDY, use_tqdm=False)
    finally:
        jax.monitoring.unregister_event_listener(count)
        jax.monitoring.unregister_event_duration_listener(count)
    assert counts == []


def test_a_bad_prompt_fails_alone_and_what_cannot_be_is_named(llm: LLM, table: np.ndarray):
    good, bad = {"prompt_embeds": table[:5]}, {"prompt_embeds": table[:5, :7]}
    outputs = llm.generate([good, bad, good], GREEDY, use_tqdm=False, on_error="return")
    assert "hidden_size 7 does not match the model's hidden_size 64" in str(outputs[1].error)
    assert tokens([outputs[0]]) == tokens([outputs[2]]) and outputs[0].error is None
    with pytest.raises(ValidationError, match="prompt_logprobs is not compatible with prompt embeds"):
        llm.generate(good, SamplingParams(prompt_logprobs=1), use_tqdm=False)
    with pytest.raises(ValidationError, match="beam_search takes no prompt_embeds"):
        llm.beam_search([good], BeamSearchParams(beam_width=2, max_tokens=2))
    with pytest.raises(ValidationError, match="longer than the maximum model length|max_model_len"):
        llm.generate({"prompt_embeds": np.zeros((161, 64), np.float32)}, GREEDY, use_tqdm=False)


def test_a_pooling_engine_takes_them_too(tiny_model: Path, table: np.ndarray):
    prompts = [ids(40, 7), ids(41, 50)]
    with LLM(tiny_model, runner="pooling", enable_prompt_embeds=True, **SMALL) as llm:
        given = [*({"prompt_embeds": table[prompt]} for prompt in prompts), *prompts]
        found = np.array([output.outputs.embedding for output in llm.embed(given, use_tqdm=False)])
    np.testing.assert_allclose(found[:2], found[2:], atol=1e-6)


def test_async(tiny_model: Path, table: np.ndarray, llm: LLM):
    async def run() -> list[int]:
        engine = await AsyncLLM.start(tiny_model, **ARGUMENTS)
        try:
            last = None
            async for output in engine.generate({"prompt_embeds": table[ids(1, 9)]}, GREEDY):
                last = output
            assert last is not None
            return list(last.outputs[0].token_ids)
        finally:
            engine.shutdown()

    assert [asyncio.run(run())] == tokens(llm.generate(ids(1, 9), GREEDY, use_tqdm=False))
