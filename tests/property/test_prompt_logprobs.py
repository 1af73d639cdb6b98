"""Prompt log-probabilities through the whole host: every position once and in its place, whatever happens to requests.

The device is `fake_device`'s hash, so that a value belongs to one prefix and one token alone.
"""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_device import VOCAB_SIZE, FakeDevice, generate, prefix_hashes, score

from jaxllm.api.outputs import RequestOutput
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.core import EngineCore
from jaxllm.engine.observe.metrics import EngineMetrics
from jaxllm.engine.request import Request

MAX_MODEL_LEN = 48


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    max_scored_tokens=st.integers(1, 12),
    threshold=st.sampled_from((0, 0, 3)),
    depth=st.booleans(),
    num_blocks=st.sampled_from((13, 20, 200)),
    policy=st.sampled_from(("fcfs", "priority")),
)
def test_every_position_is_scored(
    seed: int, max_scored_tokens: int, threshold: int, depth: bool, num_blocks: int, policy: str
):
    rng = random.Random(seed)
    cache = CacheConfig(block_size=4, num_blocks=num_blocks, groups=(KVCacheGroup(layers=(0,), sliding_window=None),))
    limits = SchedulerConfig(
        max_num_seqs=5,
        max_num_batched_tokens=16,
        max_model_len=MAX_MODEL_LEN,
        long_prefill_token_threshold=threshold,
        max_scored_tokens=max_scored_tokens,
        async_scheduling=depth,
        policy=policy,
    )
    device = FakeDevice(cache, limits)
    metrics = EngineMetrics("m", max_model_len=MAX_MODEL_LEN, cache_info={})
    core = EngineCore(limits, cache, device, None, metrics)
    common = [rng.randrange(VOCAB_SIZE) for _ in range(20)]
    requests: dict[str, Request] = {}
    done: dict[str, RequestOutput] = {}
    for i in range(14):
        prompt = common[: rng.randrange(20)] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]
        params = SamplingParams(
            max_tokens=rng.randint(1, 12), ignore_eos=True, prompt_logprobs=rng.choice((None, 0)),
            flat_logprobs=rng.random() < 0.3,
        )  # fmt: skip
        request = requests[str(i)] = Request(str(i), prompt, params, priority=rng.randrange(3) * (policy == "priority"))
        device.salts[str(i)] = None
        core.add_request(request, None)
        for _ in range(rng.randrange(4)):
            done.update((output.request_id, output) for output in core.step() if output.finished)
        if rng.random() < 0.2:
            core.abort([str(rng.randrange(i + 1))])
    for _ in range(5000):
        if not core.has_unfinished:
            break
        done.update((output.request_id, output) for output in core.step() if output.finished)
    done.update((output.request_id, output) for output in core.drain() if output.finished)
    assert not core.has_unfinished, "the requests never end"
    for name, request in requests.items():
        if name not in done:
            assert request.finish_reason == "abort"
            continue
        prompt, output = request.prompt_token_ids, done[name]
        expected, *_ = generate(prompt, None, request.max_total_tokens, frozenset(), frozenset())
        assert output.outputs[0].token_ids == expected
        if request.params.prompt_logprobs is None:
            assert output.prompt_logprobs is None
            continue
        hashes = prefix_hashes(prompt, None)
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
        assert not output.prompt_logprobs[0]
        for i in range(1, len(prompt)):
            ((token, entry),) = (output.prompt_logprobs[i] or {}).items()
            assert token == prompt[i] and entry.logprob == score(hashes[i - 1], token)
