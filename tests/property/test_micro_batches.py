"""The scheduler of a pipeline under random traffic: steps that are under way together are of different requests."""

from __future__ import annotations

import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from test_scheduler_machine import SchedulerMachine, engines

from jaxllm.config.cache import CacheConfig
from jaxllm.config.scheduler import SchedulerConfig


class MicroBatchMachine(SchedulerMachine):
    """A `SchedulerMachine`, whose device notices any token out of order, with as many steps under way as a pipeline has
    stages, and one more where the scheduler runs ahead of what is read.
    """

    @initialize(engine=engines(), stages=st.integers(2, 4), ahead=st.booleans())
    def build(self, engine: tuple[SchedulerConfig, CacheConfig, int], stages: int, ahead: bool) -> None:  # pyright: ignore
        config, cache, _ = engine
        # neither of several decode steps nor of drafts does a pipeline have any
        alone = {"num_decode_steps": 1, "max_decode_steps_seqs": 0, "num_drafts": 0, "max_draft_seqs": 0}
        config = dataclasses.replace(config, num_micro_batches=stages, async_scheduling=ahead, **alone)
        # `EngineCore` reads the oldest of so many steps before it launches another one
        self.setup(config, cache, stages + ahead - 1)

    def step(self) -> None:
        before, running = list(self.in_flight), len(self.scheduler.running)
        super().step()
        if not self.in_flight or (before and self.in_flight[-1][0].step == before[-1][0].step):
            return  # nothing could be launched
        scheduled, future = self.in_flight[-1]
        stages = self.config.num_micro_batches
        unread = sum((done.sampled for _, done in before), start=future.sampled.copy())
        assert all(count <= 1 + self.config.async_scheduling for count in unread.values())
        if running >= stages:
            for _, done in before[max(len(before) - stages + 1, 0) :]:
                both = {request.request_id for request in scheduled.requests} & set(+done.sampled)
                assert not both, "a request is in two steps under way, and its second one holds up the stages"
        decodes = [count for request, start, count in self._entries() if start >= request.num_prompt_tokens]
        if not scheduled.admitted and not any(request.num_preemptions for request in scheduled.requests):
            assert decodes.count(1) <= -(-running // stages), "a step takes more than its share of the requests"

    def _entries(self):
        scheduled = self.in_flight[-1][0]
        return zip(scheduled.requests, scheduled.starts, scheduled.counts, strict=True)


TestMicroBatches = MicroBatchMachine.TestCase
TestMicroBatches.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
