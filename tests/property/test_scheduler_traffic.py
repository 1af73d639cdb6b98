"""The scheduler machine under long, heavy traffic in pools that are too small for it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.fake_device import VOCAB_SIZE, FakeDevice
from test_scheduler_machine import EOS, SchedulerMachine, shared_prompt

from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.capacity import blocks_per_request
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.request import Request
from jaxllm.engine.scheduling.scheduler import Scheduler

WINDOWS = {
    "full": (None,),
    "window": (11,),
    "hybrid": (None, 8),
    "three": (7, None, 12),
}


def groups_of(windows: tuple[int | None, ...]) -> tuple[KVCacheGroup, ...]:
    return tuple(KVCacheGroup(layers=(index,), sliding_window=window) for index, window in enumerate(windows))


def drive(
    windows: tuple[int | None, ...],
    policy: str,
    depth: int,
    reserve: bool,
    block_size: int = 3,
    seed: int = 0,
    num_host_blocks: int = 0,
    **limits: Any,
) -> SchedulerMachine:
    """Run 60 requests to their end in a pool that holds one of the longest, checking after every step."""
    rng = random.Random(f"{windows} {policy} {depth} {reserve} {block_size} {seed}")
    groups = groups_of(windows)
    config = SchedulerConfig(
        max_num_seqs=12,
        max_num_batched_tokens=16,
        max_model_len=48,
        policy=policy,
        reserve_full_prompt=reserve,
        # Prompts take several steps, so that victims are found in the middle of one, too.
        long_prefill_token_threshold=4,
        **limits,
    )
    num_blocks = 1 + blocks_per_request(groups, block_size, 48, max_chunk=16)
    machine = SchedulerMachine()
    cache = CacheConfig(block_size=block_size, num_blocks=num_blocks, groups=groups, num_host_blocks=num_host_blocks)
    machine.setup(config, cache, depth)
    for _ in range(60):
        prompt = shared_prompt(rng.randrange(3), rng.randrange(14))
        prompt += [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(1, 4))]
        params = SamplingParams(max_tokens=rng.randrange(4, 30), ignore_eos=rng.random() < 0.8)
        machine.add_one(prompt, params, priority=rng.randrange(4), salt=rng.choice((None, None, None, "a")))
        if rng.random() < 0.05:
            machine.abort(rng.choice(machine.requests))
        for _ in range(rng.randrange(6)):
            machine.check_step()
    machine.teardown()
    return machine


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_every_request_survives_a_pool_that_holds_one_of_the_longest(windows: tuple[int | None, ...]) -> None:
    machines = [
        drive(windows, policy, depth, reserve)
        for policy in ("fcfs", "priority")
        for depth in (0, 1, 3)
        for reserve in (True, False)
    ]
    # That the traffic was as heavy as it is meant to be: without these the test could pass by doing nothing.
    stats = [machine.scheduler.stats() for machine in machines]
    prefixes = [machine.scheduler.kv_cache_manager.prefix_cache_stats for machine in machines]
    assert sum(stat.num_preemptions for stat in stats) > 100
    assert sum(prefix.hits for prefix in prefixes) > 200
    assert sum(prefix.preempted_hits for prefix in prefixes) > 200
    # Preemptions between requests of unlike urgency, too.
    assert sum(machine.num_victims for machine in machines if machine.config.policy == "priority") > 50


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_what_leaves_the_pool_comes_back_from_the_host(windows: tuple[int | None, ...]) -> None:
    machines = {
        host_blocks: [
            drive(windows, policy, depth, True, num_host_blocks=host_blocks)
            for policy, depth in (("fcfs", 0), ("priority", 3))
        ]
        for host_blocks in (4, 400)
    }
    for some in machines.values():
        assert sum(machine.num_copied_in for machine in some) > 5
    for machine in machines[400]:
        stats = machine.scheduler.kv_cache_manager.external_stats
        assert stats.hits > 20 and stats.preempted_hits > 20
        assert machine.scheduler.stats().num_stores_skipped == 0


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_drafts_that_are_wrong_leave_nothing_behind(windows: tuple[int | None, ...]) -> None:
    machines = [
        drive(
            windows,
            policy,
            depth,
            True,
            num_drafts=drafts,
            max_draft_seqs=min(3, 16 // (1 + drafts)),
            max_num_active_seqs=3,
            num_draft_steps=steps,
        )
        for policy, depth, drafts, steps in (("fcfs", 1, 3, 2), ("priority", 1, 7, 1), ("fcfs", 0, 1, 1))
    ]
    assert sum(machine.num_drafted for machine in machines) > 15
    assert sum(machine.num_apart for machine in machines) > 2
    assert sum(machine.scheduler.stats().num_preemptions for machine in machines) > 20


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_a_victim_leaves_nothing_in_the_prefix_cache_that_its_step_did_not_compute(
    windows: tuple[int | None, ...],
) -> None:
    """With blocks of one token every victim would have filled some; the machine looks after every step."""
    machines = [drive(windows, "priority", 0, False, block_size=1, seed=seed) for seed in range(5)]
    assert sum(machine.num_victims for machine in machines) > 50


REQUESTS = 50


def outputs_under(order: list[int], cache: CacheConfig, config: SchedulerConfig, depth: int) -> dict[int, list[int]]:
    """The 50 requests' outputs, whatever the engine's configuration and their order of arrival."""
    rng = random.Random(7)
    prompts = [
        shared_prompt(rng.randrange(3), rng.randrange(30)) + [rng.randrange(1, VOCAB_SIZE)] for _ in range(REQUESTS)
    ]
    scheduler = Scheduler(config, cache)
    device = FakeDevice(cache, config)
    requests = {}
    for index in order:
        params = SamplingParams(max_tokens=5 + index % 20)
        requests[index] = Request(str(index), prompts[index], params, eos_token_ids=EOS)
        device.salts[str(index)] = None
        scheduler.add_request(requests[index])
    in_flight = []
    for _ in range(20_000):
        if not scheduler.has_unfinished:
            break
        scheduled = scheduler.schedule()
        assert scheduled.rows or in_flight, "requests wait, and nothing will happen"
        if scheduled.rows:
            in_flight.append((scheduled, device.execute(scheduled)))
        if len(in_flight) > depth or not scheduled.rows:
            scheduled, future = in_flight.pop(0)
            scheduler.update(scheduled, future.result())
    assert not scheduler.has_unfinished, "the requests never end"
    return {index: request.output_token_ids for index, request in requests.items()}


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_no_configuration_changes_a_token(windows: tuple[int | None, ...]) -> None:
    """Pool size, budget, prefix caching, steps in flight and order of arrival are nobody's business but the host's."""
    groups = groups_of(windows)

    def cache(num_blocks: int, caching: bool = True) -> CacheConfig:
        return CacheConfig(block_size=4, num_blocks=num_blocks, groups=groups, enable_prefix_caching=caching)

    def config(budget: int, threshold: int = 0) -> SchedulerConfig:
        return SchedulerConfig(
            max_num_seqs=16,
            max_num_batched_tokens=budget,
            max_model_len=64,
            long_prefill_token_threshold=threshold,
        )

    order = list(range(REQUESTS))
    ample, tiny = cache(2000), cache(1 + blocks_per_request(groups, 4, 64, max_chunk=16))
    expected = outputs_under(order, ample, config(4096), 0)
    assert sum(map(len, expected.values())) > 300
    for budget, depth in ((16, 0), (16, 1), (64, 1), (4096, 2)):
        assert outputs_under(order, ample, config(budget), depth) == expected
    assert outputs_under(order, tiny, config(16), 1) == expected
    assert outputs_under(order, cache(2000, caching=False), config(64), 1) == expected
    assert outputs_under(order, ample, config(64, threshold=5), 1) == expected
    for seed in range(3):
        shuffled = random.Random(seed).sample(order, REQUESTS)
        assert outputs_under(shuffled, tiny, config(16), 1) == expected
