"""Adapters, pictures, drafts, scored prompts, priorities, preemptions, aborts and failures, all at once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from support.fake_device import VOCAB_SIZE, Done, FakeDevice
from test_adapter_slots import BROKEN, Files
from test_adapter_slots import Device as AdapterDevice
from test_media_scheduling import ITEMS, LARGEST, Encoded
from test_scheduler_machine import EOS, SchedulerMachine, engines, shared_prompt
from test_scheduler_traffic import groups_of

from jaxllm.api.lora_request import LoRARequest
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.cache import CacheConfig
from jaxllm.config.capacity import blocks_per_request
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.adapters import AdapterStore
from jaxllm.engine.cache.block_hash import ExtraKey
from jaxllm.engine.request import Request, RequestStatus
from jaxllm.engine.scheduling.scheduler import Scheduler
from jaxllm.engine.step import SchedulerOutput
from jaxllm.multimodal.items import PlacedItem, PromptMedia

#: the token that stands for a part of a picture
PICTURE = 1


class Later(concurrent.futures.Executor):
    """Does what it was asked for when it is told to, so that whatever happens meanwhile happens again."""

    def __init__(self) -> None:
        self.asked: list[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        self.asked.append((concurrent.futures.Future(), lambda: fn(*args, **kwargs)))
        return self.asked[-1][0]

    def work(self) -> None:
        for future, call in self.asked:
            try:
                future.set_result(call())
            except OSError as error:
                future.set_exception(error)
        self.asked.clear()


class SeeingDevice(FakeDevice):
    """Its model reads pictures where their tokens stand, by the adapter that a row's slot has."""

    def __init__(self, cache: CacheConfig, scheduler: SchedulerConfig) -> None:
        super().__init__(cache, scheduler)
        self.encoded = Encoded(scheduler.encoder_cache_tokens, whole=scheduler.keeps_media_whole)
        self.adapters = AdapterDevice(scheduler.max_loras)
        self.num_encoded = self.num_loaded = 0
        #: request id -> what its prompt is to the model
        self.prompts: dict[str, list[int]] = {}

    def execute(self, scheduled: SchedulerOutput) -> Done:
        self.encoded.run(scheduled)
        self.adapters.run(scheduled)
        self.num_encoded += len(scheduled.encoder_inputs)
        self.num_loaded += len(scheduled.adapter_loads)
        return super().execute(scheduled)

    def _admit(self, scheduled: SchedulerOutput) -> None:
        super()._admit(scheduled)
        for new in scheduled.admitted:
            prompt = self.prompts[new.request_id]
            self.rows[new.row].token_ids[: len(prompt)] = prompt

    def lose_all(self) -> None:
        self.encoded.rows = [None] * len(self.encoded.rows)
        self.adapters.slots = [None] * len(self.adapters.slots)


class TogetherMachine(SchedulerMachine):
    """A `SchedulerMachine` of requests with adapters and pictures, whose device notices when either is not there."""

    device: SeeingDevice

    @initialize(
        engine=engines(),
        slots=st.integers(1, 3),
        room=st.integers(LARGEST, 3 * LARGEST),
        budget=st.integers(1, 2 * LARGEST),
        whole=st.booleans(),
        patience=st.integers(1, 6),
    )
    def build(  # pyright: ignore
        self,
        engine: tuple[SchedulerConfig, CacheConfig, int],
        slots: int,
        room: int,
        budget: int,
        whole: bool,
        patience: int,
    ) -> None:
        config, cache, depth = engine
        config = dataclasses.replace(
            config,
            max_loras=slots,
            encoder_cache_tokens=room,
            max_encoder_tokens=budget,
            keeps_media_whole=whole and config.max_num_batched_tokens >= LARGEST,
            max_scored_tokens=2 * LARGEST,
        )
        self.start(config, cache, depth, patience)

    def start(self, config: SchedulerConfig, cache: CacheConfig, depth: int, patience: int) -> None:
        """Args: patience: steps that it takes to read an adapter."""
        self.setup(config, cache, depth)
        self.num_steps, self.patience = 0, patience
        self.later, self.prompts = Later(), {}
        self.store = AdapterStore(Files, max_loras=config.max_loras, max_cpu_loras=config.max_loras + 1)
        self.store._pool.shutdown()
        self.store._pool = self.later  # pyright: ignore[reportAttributeAccessIssue]
        self.scheduler = Scheduler(config, cache, self.store)
        self.device = SeeingDevice(cache, config)
        self.device.prompts = self.prompts

    def made(self, request_id: str, prompt: list[int], params: SamplingParams, **others: Any) -> Request:
        number, prompt = len(self.requests), list(prompt)
        items, content = self._pictures(prompt, number // 6)
        keys = tuple(ExtraKey(kind="mm", value=item.key, start=item.start, stop=item.stop) for item in items)
        # every second request has none
        which = 0 if number % 2 else 1 + number // 2 % BROKEN
        adapter = self.store.get(LoRARequest(f"adapter {which}", which, "/x")) if which else None
        if number % 5 == 4:
            params = dataclasses.replace(params, prompt_logprobs=0)
        self.prompts[request_id] = content
        media = PromptMedia(items, np.zeros((3, len(prompt)), np.int32), 0) if items else None
        others["extra_keys"] = keys if adapter is None else (*keys, adapter.key)
        return Request(request_id, prompt, params, eos_token_ids=EOS, media=media, adapter=adapter, **others)

    def _pictures(self, prompt: list[int], album: int) -> tuple[tuple[PlacedItem, ...], list[int]]:
        """Put pictures of an album into a prompt, the same into those that begin alike; returns what the model sees."""
        draws, place, items = random.Random(f"{prompt[:3]} {album}"), 0, []
        content = list(prompt)
        while draws.random() < 0.7:
            item = draws.choice(ITEMS)
            start = place + draws.randrange(4)
            place = start + item.num_tokens
            if place >= len(prompt):
                break
            prompt[start:place] = [PICTURE] * item.num_tokens
            content[start:place] = [100 * ITEMS.index(item) + 1000 + offset for offset in range(item.num_tokens)]
            items.append(PlacedItem(item, start, place, item.content_hash))
        return tuple(items), content

    def content(self, request: Request) -> list[int]:
        return self.prompts[request.request_id] + request.output_token_ids

    def salt(self, request: Request) -> str | None:
        own = "" if request.adapter is None else str(request.adapter.key.value)
        return f"{request.cache_salt} {own}"

    def may_be_overtaken(self, request: Request) -> bool:
        return request.adapter is not None

    def waits_for_others(self) -> bool:
        return bool(self.later.asked)

    def schedule(self) -> SchedulerOutput:
        self.num_steps += 1
        if self.num_steps % self.patience == 0:
            self.later.work()
        scheduled, slots = super().schedule(), self.scheduler.adapters
        assert slots is not None
        for request in slots.take_failed():
            assert "the file is cut off" in str(request.error)
            self.scheduler.finish(request, RequestStatus.FINISHED_ERROR)
        return scheduled

    def fail(self) -> None:
        super().fail()
        assert self.scheduler.adapters is not None
        self.scheduler.adapters.forget()
        self.device.lose_all()

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "scheduler") and (media := self.scheduler.media) is not None:
            assert not media.cache.num_used and not media._holders
            assert self.scheduler.adapters is not None and not any(self.scheduler.adapters._users)


TestAllTogether = TogetherMachine.TestCase
TestAllTogether.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_there_is_something_of_everything(policy: str) -> None:
    """Without which the machine could pass by doing nothing; in a pool that holds one of the longest requests."""
    draws, groups = random.Random(policy), groups_of((None, 8))
    limits: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": 24, "max_model_len": 48, "policy": policy}
    drafts: dict[str, Any] = {"num_drafts": 3, "max_draft_seqs": 3, "num_draft_steps": 2}
    room: dict[str, Any] = {"max_loras": 2, "encoder_cache_tokens": 2 * LARGEST, "max_encoder_tokens": LARGEST}
    config = SchedulerConfig(**limits, **drafts, **room, max_scored_tokens=2 * LARGEST, keeps_media_whole=True)
    num_blocks = 1 + blocks_per_request(groups, 4, 48, max_chunk=24)
    machine = TogetherMachine()
    machine.start(config, CacheConfig(block_size=4, num_blocks=num_blocks, groups=groups, num_host_blocks=8), 1, 3)
    for _ in range(120):
        prompt = shared_prompt(draws.randrange(3), draws.randrange(6, 30)) + [draws.randrange(1, VOCAB_SIZE)]
        params = SamplingParams(max_tokens=draws.randrange(4, 20), ignore_eos=draws.random() < 0.8)
        machine.add_one(prompt, params, priority=draws.randrange(4), salt=draws.choice((None, None, "a")))
        if draws.random() < 0.05:
            machine.abort(draws.choice(machine.requests))
        for _ in range(draws.randrange(6)):
            machine.check_step()
    machine.teardown()
    reasons = [request.finish_reason for request in machine.requests]
    both = [
        r for r in machine.requests if r.adapter is not None and r.media is not None and r.finish_reason == "length"
    ]
    assert reasons.count("error") > 5 and reasons.count("abort") > 0 and len(both) > 10
    assert sum(request.num_scored_tokens > 0 for request in machine.requests) > 20
    assert machine.device.num_encoded > 15 and machine.device.num_loaded > 20 and machine.num_drafted > 5
    stats = machine.scheduler.stats()
    assert stats.num_preemptions > 10 and stats.encoder_cache_hits > 10
    assert machine.scheduler.kv_cache_manager.prefix_cache_stats.hits > 10
