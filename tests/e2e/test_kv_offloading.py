"""Blocks that leave the device's prefix cache lie in the host's memory and come back: by what engines answer, against
one that keeps nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.offloading import prompt
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput
from jaxllm.runner.memory.plan import host_memory
from jaxllm.runner.runner import Runner

#: a pool that holds little more than one of the longest requests
ARGUMENTS: dict[str, Any] = {**SMALL, "max_model_len": 128, "block_size": 8, "num_gpu_blocks_override": 24}
#: of a block: 2 layers, keys and values of 2 heads, 8 tokens, 16 float32 numbers
BLOCK_BYTES = 2 * 2 * 2 * 8 * 16 * 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **ARGUMENTS, enable_prefix_caching=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def offloading(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **ARGUMENTS, kv_offloading_size="4MiB") as llm:
        yield llm


def traffic(seed: int) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """Prompts that begin like others, of which several at once are more than the pool holds."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(256) for _ in range(60)] for _ in range(6)]
    prompts, params = [], []
    for _ in range(40):
        ids = rng.choice(beginnings)[: rng.randrange(8, 60)] + [rng.randrange(256) for _ in range(rng.randrange(1, 9))]
        salt = rng.choice(({}, {}, {"cache_salt": "mine"}))
        prompts.append({"prompt_token_ids": ids, **salt})
        more: dict[str, Any] = {"prompt_logprobs": 0} if rng.random() < 0.2 else {}
        params.append(SamplingParams(temperature=0.0, max_tokens=rng.randrange(3, 40), ignore_eos=True, **more))
    return prompts, params


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def metric(llm: LLM, name: str) -> float:
    return sum(getattr(one, "value", 0) for one in llm.get_metrics() if one.name == name)


def ask(llm: LLM, number: int) -> RequestOutput:
    [output] = llm.generate(prompt(number), GREEDY, use_tqdm=False)
    return output


def push_out(llm: LLM, *numbers: int) -> None:
    """Ask for so many other prompts that the device has nothing left of those before."""
    for number in numbers:
        ask(llm, number)


@pytest.mark.parametrize("size", ["4MiB", f"{3 * BLOCK_BYTES}"])
def test_tokens_are_the_same_under_traffic(plain: LLM, offloading: LLM, tiny_model: Path, size: str):
    llm = offloading
    if size != "4MiB":
        llm = LLM(tiny_model, **ARGUMENTS, kv_offloading_size=int(size) / 2**30)
    hits, skipped = (
        metric(llm, f"vllm:{name}") for name in ("external_prefix_cache_hits", "kv_offload_stores_skipped")
    )
    for seed in (0, 1):
        prompts, params = traffic(seed)
        expected = tokens(plain.generate(prompts, params, use_tqdm=False))
        assert tokens(llm.generate(prompts, params, use_tqdm=False)) == expected
    assert metric(llm, "vllm:external_prefix_cache_hits") > hits
    assert (metric(llm, "vllm:kv_offload_stores_skipped") > skipped) == (size != "4MiB")
    assert metric(llm, "vllm:num_preemptions") > 0
    manager = llm.engine.core.cores[0].scheduler.kv_cache_manager
    pool = manager.host_pool
    assert pool is not None and manager.pool.num_used == 0
    assert not pool._arriving and len(pool._free) + len(pool._ready) == pool.num_blocks
    if llm is not offloading:
        llm.shutdown()


def test_what_lies_on_the_host_is_what_the_device_had(offloading: LLM):
    """Byte for byte: a block that is computed anew has the contents that were copied out."""
    llm = offloading
    runner, manager = llm.engine.runner, llm.engine.core.cores[0].scheduler.kv_cache_manager
    assert isinstance(runner, Runner) and manager.host_pool is not None
    llm.reset_prefix_cache(reset_connector=True)
    ask(llm, 1)
    push_out(llm, 2, 3, 4)
    assert not any(manager.pool.cached_block(block_hash, 0) for block_hash in hashes(llm, 1))
    [kept] = runner._host_blocks[0]._arrays
    kept = np.stack([kept[manager.host_pool.find(block_hash, 0)] for block_hash in hashes(llm, 1)])
    llm.reset_prefix_cache(reset_connector=True)
    assert ask(llm, 1).num_cached_tokens == 0
    ids = [manager.pool.cached_block(block_hash, 0) for block_hash in hashes(llm, 1)]
    pages: Any = np.asarray(runner._live().cache).reshape(2, -1, *kept.shape[2:])
    np.testing.assert_array_equal(kept, pages[:, ids].swapaxes(0, 1))


def hashes(llm: LLM, number: int) -> list[bytes]:
    """Of the full blocks of a prompt that a request for it could use."""
    found = llm.engine.inputs.request("x", prompt(number), GREEDY)[0].block_hashes
    return list(found)[: (80 - 1) // 8]


def test_a_hit_is_counted_as_cached_and_shown(offloading: LLM, caplog: pytest.LogCaptureFixture):
    llm = offloading
    llm.reset_prefix_cache(reset_connector=True)
    first = ask(llm, 1)
    push_out(llm, 2, 3, 4)
    names = "prefix_cache_queries", "prefix_cache_hits", "external_prefix_cache_queries", "external_prefix_cache_hits"
    before = [metric(llm, f"vllm:{name}") for name in names]
    with llm.trace() as trace:
        again = ask(llm, 1)
    assert [metric(llm, f"vllm:{name}") - was for name, was in zip(names, before, strict=True)] == [80, 0, 80, 72]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 72)
    assert tokens([first]) == tokens([again])
    assert (trace.steps[0].num_prefill_tokens, trace.steps[0].num_blocks_in) == (8, 9)
    assert sum(step.num_blocks_out for step in trace.steps) > 0
    assert ask(llm, 1).num_cached_tokens == 72 and metric(llm, "vllm:external_prefix_cache_hits") - before[3] == 72
    by_source = {m.labels["source"] for m in llm.get_metrics() if m.name == "vllm:prompt_tokens_by_source"}
    assert by_source == {"local_compute", "local_cache_hit", "external_kv_transfer"}


def test_what_forgets_the_hosts_blocks(offloading: LLM):
    llm = offloading

    def cached_after(change: Any) -> int:
        llm.reset_prefix_cache(reset_connector=True)
        ask(llm, 1)
        push_out(llm, 2, 3, 4)
        change()
        return ask(llm, 1).num_cached_tokens

    def sleep(level: int) -> None:
        llm.sleep(level)
        llm.wake_up()

    def update() -> None:
        llm.update_weights(jax.tree.map(np.asarray, llm.apply_model(lambda params: params)[0]))

    kept = 72
    assert cached_after(lambda: None) == kept
    assert cached_after(llm.reset_prefix_cache) == kept
    assert cached_after(lambda: sleep(1)) == kept
    assert cached_after(lambda: llm.reset_prefix_cache(reset_connector=True)) == 0
    assert cached_after(lambda: sleep(2)) == 0
    assert cached_after(update) == 0
    assert cached_after(lambda: llm.collective_rpc("reload_weights")) == 0


def test_a_failed_step_leaves_what_had_arrived(offloading: LLM, monkeypatch: pytest.MonkeyPatch):
    llm = offloading
    llm.reset_prefix_cache(reset_connector=True)
    first = ask(llm, 1)
    push_out(llm, 2, 3, 4)
    runner: Any = llm.engine.runner
    with monkeypatch.context() as patch:
        patch.setattr(runner.head, "sample", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(llm, 5)
    again = ask(llm, 1)
    assert again.num_cached_tokens == 72 and tokens([again]) == tokens([first])
    host_pool = llm.engine.core.cores[0].scheduler.kv_cache_manager.host_pool
    assert host_pool is not None and not host_pool._arriving


def test_the_plan_shows_the_pool(offloading: LLM):
    plan = offloading.memory_plan
    assert (plan.host_cache_bytes, plan.num_host_blocks) == (4 * 2**20, 4 * 2**20 // BLOCK_BYTES)
    assert "\n  host KV pool    0.004 GiB  (1024 blocks, in the machine's memory)\n" in str(plan)
    assert "host KV pool" in plan._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kv_offloading_size": 0.5, "enable_prefix_caching": False}, "Set enable_prefix_caching=True, or leave"),
        ({"kv_offloading_size": "1B"}, f"Set it to at least '{BLOCK_BYTES}B'"),
        ({"kv_offloading_size": "-1"}, "kv_offloading_size must be at least 0 GiB, got -1.0"),
        ({"kv_offloading_size": "much"}, "kv_offloading_size must be a number of GiB such as"),
        ({"kv_offloading_size": 1, "kv_offloading_backend": "lmcache"}, "must be one of native; got 'lmcache'"),
        (
            {"kv_offloading_size": 1, "enable_expert_parallel": True, "data_parallel_size": 2},
            "Leave kv_offloading_size out, or enable_expert_parallel",
        ),
        # as it was given, though that is no whole number of blocks
        (
            {"kv_offloading_size": 1e6, "load_format": "dummy", "hf_overrides": {"head_dim": 3 * 2**15}},
            "kv_offloading_size=1000000.000 GiB does not fit",
        ),
    ],
)
def test_what_cannot_be_is_refused(tiny_model: Path, arguments: dict[str, Any], text: str):
    with pytest.raises(ValidationError, match=re.escape(text)):
        LLM(tiny_model, **{**ARGUMENTS, **arguments})


def test_what_is_too_much_names_what_there_is(tiny_model: Path):
    with pytest.raises(ValidationError) as error:
        LLM(tiny_model, **ARGUMENTS, kv_offloading_size=2**20)
    said = re.search(r"the machine has ([\d.]+) GiB of memory available", str(error.value))
    assert said and float(said[1]) * 2**30 == pytest.approx(host_memory(), rel=0.2)
