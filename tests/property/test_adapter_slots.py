"""Whatever is asked, a step's requests find their adapters in the slots, and everybody gets to the end."""

from __future__ import annotations

import collections
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.api.lora_request import LoRARequest
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.adapters import AdapterStore
from jaxllm.engine.request import Request, RequestStatus
from jaxllm.engine.scheduling.scheduler import Scheduler
from jaxllm.engine.step import SchedulerOutput, StepOutput

BROKEN = 6


class Files:
    """An adapter, whose "matrices" are its name."""

    def __init__(self, request: LoRARequest):
        self.request = request

    def have_changed(self) -> bool:
        return False

    def read(self) -> str:
        if self.request.lora_int_id == BROKEN:
            raise OSError("the file is cut off")
        return self.request.lora_name


def made(number: int, adapter: int, store: AdapterStore, outputs: int) -> Request:
    own = store.get(LoRARequest(f"adapter {adapter}", adapter, "/x")) if adapter else None
    params = SamplingParams(max_tokens=outputs, ignore_eos=True)
    keys = () if own is None else (own.key,)
    return Request(f"request {number}", [1] * (1 + number % 9), params, adapter=own, extra_keys=keys)


class Device:
    """What a runner has: the adapter of each slot, and the slot of each row."""

    def __init__(self, num_slots: int):
        self.slots: list[str | None] = [None] * num_slots
        self.rows: dict[int, int] = {}

    def run(self, step: SchedulerOutput) -> None:
        for slot, matrices in step.adapter_loads:
            self.slots[slot] = matrices
        self.rows.update({admitted.row: admitted.adapter_slot for admitted in step.admitted})
        used = False
        for row, request in zip(step.rows, step.requests, strict=True):
            slot = self.rows[row]
            assert (slot < 0) == (request.adapter is None)
            if request.adapter is not None:
                used = True
                assert self.slots[slot] == request.adapter.request.lora_name
        assert step.uses_adapters == used


def read(scheduler: Scheduler, step: SchedulerOutput) -> None:
    counts = [int(wanted > 0) for wanted in step.wanted]
    scheduler.update(step, StepOutput(token_ids=[3] * sum(counts), counts=counts))


def scheduler_of(slots: int, store: AdapterStore, blocks: int = 40, tokens: int = 16) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=tokens, max_model_len=60, max_loras=slots)
    groups = (KVCacheGroup(layers=(0,)),)
    cache = CacheConfig(block_size=4, num_blocks=blocks, groups=groups, enable_prefix_caching=True)
    return Scheduler(config, cache, store)


@pytest.mark.parametrize("ahead", [0, 2])
@settings(max_examples=40, deadline=None)
@given(
    adapters=st.lists(st.integers(0, BROKEN), min_size=1, max_size=14),
    slots=st.integers(1, 3),
    more=st.integers(0, 2),
    blocks=st.integers(16, 40),
    seed=st.integers(0, 99),
)
def test_requests_find_their_adapters(ahead, adapters, slots, more, blocks, seed):
    """With preemptions, aborts, adapters that cannot be read, and steps that are scheduled before others are read."""
    store = AdapterStore(Files, max_loras=slots, max_cpu_loras=slots + more)
    scheduler, device, draws = scheduler_of(slots, store, blocks), Device(slots), random.Random(seed)
    requests: list[Request] = []
    waiting, in_flight = collections.deque(enumerate(adapters)), collections.deque[SchedulerOutput]()
    slots_of = scheduler.adapters
    assert slots_of is not None
    for _ in range(3000):
        if waiting and draws.random() < 0.5:
            requests.append(made(*waiting.popleft(), store, draws.randint(1, 20)))
            scheduler.add_request(requests[-1])
        if draws.random() < 0.02 and scheduler.running:
            scheduler.abort([draws.choice(scheduler.running).request_id])
        step = scheduler.schedule()
        for request in slots_of.take_failed():
            scheduler.finish(request, RequestStatus.FINISHED_ERROR)
        device.run(step)
        assert len({r.adapter for r in scheduler.running if r.adapter is not None}) <= slots
        running = {r.adapter.request.lora_name for r in scheduler.running if r.adapter is not None}
        assert scheduler.adapter_names()[1] == running
        if step.rows:
            in_flight.append(step)
        elif not in_flight:
            slots_of.wait()
        while in_flight and (len(in_flight) > ahead or not step.rows):
            read(scheduler, in_flight.popleft())
        if not waiting and not scheduler.has_unfinished:
            break
        if not step.rows and not in_flight:
            time.sleep(0.001)
    store.shutdown()
    assert len(requests) == len(adapters) and all(request.is_finished for request in requests)
    for request, adapter in zip(requests, adapters, strict=True):
        broken = request.status is RequestStatus.FINISHED_ERROR
        assert not broken or (adapter == BROKEN and "the file is cut off" in str(request.error))
        assert broken or adapter != BROKEN or request.status is RequestStatus.FINISHED_ABORTED
    assert not any(slots_of._users)


def test_nobody_starves_while_others_keep_coming():
    store = AdapterStore(Files, max_loras=2, max_cpu_loras=3)
    scheduler, device = scheduler_of(2, store), Device(2)
    for adapter in (1, 2, 3):
        while not store.is_ready(store.get(LoRARequest(f"adapter {adapter}", adapter, "/x"))):
            time.sleep(0.001)
    requests = [made(number, 1 + number % 2, store, 8) for number in range(4)]
    rare = made(4, 3, store, 3)
    for request in (*requests, rare):
        scheduler.add_request(request)
    for number in range(5, 60):
        # as soon as one ends, another one of the same adapters is there
        scheduler.add_request(made(number, 1 + number % 2, store, 8))
        step = scheduler.schedule()
        device.run(step)
        # the rare one waits until it runs
        assert ("adapter 3" in scheduler.adapter_names()[rare.adapter_slot >= 0]) or rare.is_finished
        read(scheduler, step)
        if rare.is_finished:
            break
    store.shutdown()
    assert rare.status is RequestStatus.FINISHED_LENGTH and scheduler.has_unfinished
