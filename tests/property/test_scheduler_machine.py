"""Scheduler, pool and prefix cache under random traffic, against a device that checks every slot it reads."""

from __future__ import annotations

import collections
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from scheduler_invariants import SchedulerInvariants
from support.fake_device import VOCAB_SIZE, Done, FakeDevice, generate

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.capacity import blocks_per_request
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.request import Request, RequestStatus
from jaxllm.engine.scheduling.queue import priority_key
from jaxllm.engine.scheduling.scheduler import Scheduler
from jaxllm.engine.step import SchedulerOutput

EOS = frozenset({0})
GROUPS = (
    (None,),
    (None,),
    (1,),
    (3,),
    (6,),
    (None, 4),
    (7, None),
    (2, 5),
    (None, 3, 8),
    (None, None),
)


@st.composite
def engines(draw: st.DrawFn) -> tuple[SchedulerConfig, CacheConfig, int]:
    """A scheduler's and a cache's configuration, mostly too small, and the number of steps in flight."""
    groups = tuple(
        KVCacheGroup(layers=(index,), sliding_window=window)
        for index, window in enumerate(draw(st.sampled_from(GROUPS)))
    )
    block_size = draw(st.integers(1, 4))
    max_model_len = draw(st.integers(2, 40))
    chunked = draw(st.sampled_from((True, True, True, False)))
    max_num_seqs = draw(st.integers(1, 6))
    max_num_batched_tokens = draw(st.integers(max_num_seqs, 24)) if chunked else max_model_len + draw(st.integers(0, 9))
    longest = draw(st.integers(max(1, max_model_len // 2), max_model_len))
    smallest = blocks_per_request(groups, block_size, longest, max_chunk=max_num_batched_tokens)
    drafts = draw(st.sampled_from((0, 0, 1, 3)))
    drafts = drafts if 2 * (1 + drafts) <= max_num_batched_tokens else 0
    scheduler = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        long_prefill_token_threshold=draw(st.sampled_from((0, 0, 1, 3))),
        long_prefill_token_threshold_adaptive=draw(st.booleans()),
        max_num_active_seqs=draw(st.one_of(st.none(), st.integers(1, max_num_seqs))),
        policy=draw(st.sampled_from(("fcfs", "priority"))),
        enable_chunked_prefill=chunked,
        reserve_full_prompt=draw(st.booleans()),
        num_decode_steps=draw(st.sampled_from((1, 2, 3, 8))),
        max_decode_steps_seqs=draw(st.sampled_from((2, 6))),
        num_drafts=drafts,
        max_draft_seqs=min(draw(st.sampled_from((2, 6))), max_num_batched_tokens // (1 + drafts)),
        drafts_by_num_seqs=draw(st.sampled_from(((), (drafts, min(drafts, 1), 0, min(drafts, 2), drafts, 0)))),
        num_draft_steps=min(draw(st.sampled_from((1, 2))), max(max_num_batched_tokens // (2 + 2 * drafts), 1)),
    )
    cache = CacheConfig(
        block_size=block_size,
        num_blocks=1 + smallest + draw(st.integers(0, 6)),
        groups=groups,
        enable_prefix_caching=(caching := draw(st.sampled_from((True, True, True, False)))),
        num_host_blocks=draw(st.sampled_from((0, 1, 3, 8, 40))) if caching else 0,
    )
    # with drafts, blocks are promised for two launches
    return scheduler, cache, draw(st.integers(0, 1 if drafts else 3))


def shared_prompt(family: int, length: int) -> list[int]:
    """The first tokens of one of three texts."""
    return [1 + (family + index * index) % (VOCAB_SIZE - 1) for index in range(length)]


class SchedulerMachine(SchedulerInvariants):
    @initialize(engine=engines())
    def build(self, engine: tuple[SchedulerConfig, CacheConfig, int]) -> None:
        self.setup(*engine)

    def setup(self, config: SchedulerConfig, cache: CacheConfig, depth: int) -> None:
        self.config, self.cache, self.depth = config, cache, depth
        self.scheduler = Scheduler(self.config, self.cache)
        self.device = FakeDevice(self.cache, self.config)
        self.in_flight: collections.deque[tuple[SchedulerOutput, Done]] = collections.deque()
        self.requests: list[Request] = []
        self.outputs: dict[str, list[int]] = {}
        #: block hash -> index of the block in its request, and the device's hashes of its tokens
        self.contents: dict[bytes, tuple[int, list[int]]] = {}
        self.last_first_admission = -1
        self.num_victims = self.num_drafted = self.num_apart = 0
        self.num_copied_in = 0

    # What can happen.

    @rule(
        burst=st.lists(
            st.fixed_dictionaries(
                {
                    "family": st.integers(0, 2),
                    "shared": st.integers(0, 24),
                    "own": st.lists(st.integers(1, VOCAB_SIZE - 1), max_size=6),
                    "max_tokens": st.one_of(st.none(), st.integers(1, 24)),
                    "ignore_eos": st.booleans(),
                    "stop_token_ids": st.sampled_from(([], [], [3])),
                    "skip": st.sampled_from((None, None, None, True)),
                    "priority": st.integers(0, 3),
                    "salt": st.sampled_from((None, None, None, "a")),
                    "streamed": st.sampled_from((False, False, False, True)),
                }
            ),
            min_size=1,
            max_size=6,
        )
    )
    def add(self, burst: list[dict[str, Any]]) -> None:
        for new in burst:
            params = SamplingParams(
                max_tokens=new["max_tokens"],
                ignore_eos=new["ignore_eos"],
                stop_token_ids=new["stop_token_ids"],
                skip_reading_prefix_cache=new["skip"],
                output_kind=RequestOutputKind.DELTA if new["streamed"] else RequestOutputKind.FINAL_ONLY,
            )
            self.add_one(shared_prompt(new["family"], new["shared"]) + new["own"], params, new["priority"], new["salt"])

    @precondition(lambda self: any(request.is_finished for request in self.requests))
    @rule(data=st.data(), own=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3))
    def follow_up(self, data: st.DataObject, own: list[int]) -> None:
        """The next turn of a conversation: its prompt ends in tokens that the engine generated."""
        before = data.draw(st.sampled_from([request for request in self.requests if request.is_finished]))
        self.add_one(before.all_token_ids + own, SamplingParams(max_tokens=4), 0, before.cache_salt)

    def add_one(self, prompt: list[int], params: SamplingParams, priority: int, salt: str | None) -> None:
        request = self.made(f"r{len(self.requests)}", prompt, params, priority=priority, cache_salt=salt)
        fits = 0 < len(prompt) < self.config.max_model_len and len(prompt) <= self.scheduler.max_tokens_per_request
        try:
            self.scheduler.add_request(request)
        except ValidationError:
            assert not fits
            return
        assert fits
        self.device.salts[request.request_id] = self.salt(request)
        self.requests.append(request)
        self.outputs[request.request_id] = []

    def made(self, request_id: str, prompt: list[int], params: SamplingParams, **others: Any) -> Request:
        return Request(request_id, prompt, params, eos_token_ids=EOS, **others)

    def may_be_overtaken(self, request: Request) -> bool:
        """Whether others may go first while it waits for something that they do not need."""
        return False

    def schedule(self) -> SchedulerOutput:
        return self.scheduler.schedule()

    def waits_for_others(self) -> bool:
        """Whether something will happen that no step brings."""
        return False

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.check_step()

    def check_step(self) -> None:
        self.step()
        self.every_request_is_in_one_place()
        self.every_block_is_in_one_place()
        self.the_prefix_cache_tells_the_truth()
        self.windows_hold_no_more_than_promised()
        self.the_host_pool_tells_the_truth()

    def step(self) -> None:
        """Schedule and launch a step, then read the oldest ones until no more than `depth` are in flight."""
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        preempted_before = self.scheduler.stats().num_preemptions
        before = list(self.scheduler.running)
        scheduled = self.schedule()
        victims = [request for request in before if request.status is RequestStatus.PREEMPTED]
        assert victims == before[len(before) - len(victims) :], "a request gave way to one behind it"
        assert not any(request in scheduled.requests for request in victims)
        if self.config.policy == "priority":
            assert self.scheduler.running == sorted(self.scheduler.running, key=priority_key)
        self.num_victims += len(victims)
        if self.config.policy == "fcfs" and oldest is not None:
            assert oldest.status is RequestStatus.RUNNING, "the oldest request is never the victim"
        if self.scheduler.stats().num_preemptions > preempted_before:
            assert not scheduled.admitted
        self._check_admissions(scheduled)
        if scheduled.goes_on_alone:
            self._check_several_steps(scheduled, self.scheduler.stats().num_preemptions - preempted_before)
        assert scheduled.rows or not (scheduled.copies_out or scheduled.copies_in)
        self.num_copied_in += len(scheduled.copies_in)
        if scheduled.rows:
            assert [request.row for request in scheduled.requests] == scheduled.rows
            self.in_flight.append((scheduled, self.device.execute(scheduled)))
        else:
            goes_on = self.in_flight or self.waits_for_others() or not self.scheduler.has_unfinished
            assert goes_on, "requests wait, and nothing will happen"
            self.read()
        while len(self.in_flight) > self.depth:
            self.read()

    def _check_several_steps(self, scheduled: SchedulerOutput, num_preempted: int) -> None:
        assert not num_preempted
        if scheduled.num_drafts:
            by_size = self.config.drafts_by_num_seqs
            most = by_size[len(self.scheduler.running) - 1] if by_size else self.config.num_drafts
            assert scheduled.num_drafts == most
            assert scheduled.num_steps <= self.config.num_draft_steps
            assert len(scheduled.rows) <= self.config.max_draft_seqs
            assert all(a >= r.num_prompt_tokens for r, a in zip(scheduled.requests, scheduled.starts, strict=True))
            self.num_drafted += 1
            self.num_apart += scheduled.is_apart
            assert not (scheduled.is_apart and scheduled.admitted)
            return
        assert not self.scheduler.waiting
        assert 1 < scheduled.num_steps <= self.config.num_decode_steps
        assert len(scheduled.rows) <= self.config.max_decode_steps_seqs
        for request, start in zip(scheduled.requests, scheduled.starts, strict=True):
            assert start >= request.num_prompt_tokens
            assert request.params.output_kind is RequestOutputKind.FINAL_ONLY

    def _check_admissions(self, scheduled: SchedulerOutput) -> None:
        by_id = {request.request_id: request for request in scheduled.requests}
        for new in scheduled.admitted:
            request = by_id[new.request_id]
            expected = request.prompt_token_ids + self._expected(request)[0]
            assert new.token_ids == expected[: len(new.token_ids)]
            assert len(new.token_ids) == request.num_prompt_tokens + len(self.outputs[new.request_id])
            if request.num_preemptions == 0 and self.config.policy == "fcfs":
                if not self.may_be_overtaken(request):
                    assert request.arrival_order > self.last_first_admission, "first come, first served"
                    self.last_first_admission = request.arrival_order
                preempted = [other for other in self._in_order() if other.status is RequestStatus.PREEMPTED]
                assert not preempted, "a new request overtook one that had to give up its blocks"
        if self.config.policy == "priority" and scheduled.admitted:
            last = max((by_id[new.request_id] for new in scheduled.admitted), key=lambda request: request.priority)
            left = [request.priority for request in self._in_order() if self._waits(request)]
            assert all(last.priority <= priority for priority in left), "a more urgent request was passed over"

    def _in_order(self) -> list[Request]:
        return [request for request in self.requests if not self.may_be_overtaken(request)]

    def read(self) -> None:
        if not self.in_flight:
            return
        scheduled, future = self.in_flight.popleft()
        assert not self.in_flight or scheduled.step < self.in_flight[0][0].step
        output = future.result()
        live = [request for request in scheduled.requests if not request.is_finished]
        updates = self.scheduler.update(scheduled, output)
        got = {request: count for request, count in zip(scheduled.requests, output.counts, strict=True) if count}
        assert updates.requests == [request for request in live if request in got], "and in the step's order"
        assert updates.ended == [request for request in updates.requests if request.is_finished]
        for request, count, first in zip(updates.requests, updates.counts, updates.firsts, strict=True):
            outputs = self.outputs[request.request_id]
            outputs += output.token_ids[first : first + count]
            assert count == got[request]
            assert outputs == request.output_token_ids
            tokens, reason, stop_reason = self._expected(request)
            assert outputs == tokens[: len(outputs)]
            assert request.is_finished == (len(outputs) == len(tokens))
            if request.is_finished:
                assert (request.finish_reason, request.stop_reason) == (reason, stop_reason)

    def _expected(self, request: Request) -> tuple[list[int], str, int | None]:
        params = request.params
        longest = min(self.config.max_model_len, self.scheduler.max_tokens_per_request + 1)
        if params.max_tokens is not None:
            longest = min(longest, request.num_prompt_tokens + params.max_tokens)
        eos = frozenset() if params.ignore_eos else EOS
        stops = frozenset(params.stop_token_ids or ())
        prompt = self.content(request)[: request.num_prompt_tokens]
        return generate(prompt, self.salt(request), longest, eos, stops)

    @precondition(lambda self: any(not request.is_finished for request in self.requests))
    @rule(data=st.data(), stop_string=st.booleans())
    def end(self, data: st.DataObject, stop_string: bool) -> None:
        """The caller gives a request up, or the output processor finds a stop string in its text."""
        request = data.draw(st.sampled_from([request for request in self.requests if not request.is_finished]))
        if stop_string:
            assert self.scheduler.finish(request, RequestStatus.FINISHED_STOPPED, "stop here")
            assert not self.scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
            assert (request.finish_reason, request.stop_reason) == ("stop", "stop here")
        else:
            assert self.abort(request) == [request]
            assert request.finish_reason == "abort"

    def abort(self, request: Request) -> list[Request]:
        return self.scheduler.abort([request.request_id, "unknown"])

    @rule(chance=st.integers(0, 9))
    def disturb(self, chance: int) -> None:
        if chance == 0 and self.in_flight:
            self.fail()
        elif chance < 4:
            self.reset_prefix_cache()
        else:
            self.read()

    def reset_prefix_cache(self) -> None:
        idle = not self.scheduler.running
        host_pool = len(self.requests) % 2 == 0
        assert self.scheduler.reset_prefix_cache(host_pool=host_pool) == idle
        if idle and host_pool:
            self.device.host.clear()
        if idle:
            # Whoever reads one of these slots again reads what is not there.
            self.device.reset()

    def fail(self) -> None:
        """A step raises: everything ends, and the device's cache is lost."""
        ended = self.scheduler.finish_all(RequestStatus.FINISHED_ERROR)
        assert all(request.finish_reason == "error" for request in ended)
        assert self.scheduler.reset_prefix_cache()
        self.in_flight.clear()
        self.device.reset()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):
            if not self.scheduler.has_unfinished:
                break
            self.step()
        else:
            raise AssertionError("the requests never end")
        while self.in_flight:
            self.read()
        self.every_request_is_in_one_place()
        self.every_block_is_in_one_place()
        for request in self.requests:
            tokens, reason, stop_reason = self._expected(request)
            assert request.is_finished
            assert self.outputs[request.request_id] == request.output_token_ids
            if request.stop_reason != "stop here" and request.finish_reason in ("stop", "length"):
                assert (request.output_token_ids, request.finish_reason) == (tokens, reason)
                assert request.stop_reason == stop_reason
            else:
                assert request.output_token_ids == tokens[: request.num_output_tokens]
        assert self.scheduler.kv_cache_manager.pool.num_used == 0
        assert self.scheduler.reset_prefix_cache()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
