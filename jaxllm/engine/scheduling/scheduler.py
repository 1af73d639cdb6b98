"""Which tokens of which requests the next step computes.

There are no phases. A request has tokens (prompt and outputs) and computed tokens; each step gives it some until the
second number has caught up with the first, and the step that catches up samples one more. Prefill, decode, prefix
hits and resumed requests are all this one case.

Steps may be scheduled before the outputs of earlier ones are read, any number of them: computed tokens advance when a
step is scheduled, and ``num_output_placeholders`` stands for the tokens that are sampled but not read. So little has to
happen between a step's tokens being known and the next launch: `schedule_ahead` has scheduled the running requests
before, `end_requests` ends those that the tokens end, `schedule` admits others, and `settle` gives the tokens to their
requests when the launch is done.
Every `SchedulerOutput` with entries has to be executed, in order; if that fails, what the prefix cache was told about
it is false, and `finish_all` followed by `reset_prefix_cache` is the way out.

A request that is alone always gets on: `add_request` refuses a prompt that the whole pool cannot hold, and a request
that grows to what the whole pool can hold ends there with ``FINISHED_LENGTH``, as if ``max_model_len`` were that small.
So the one request that has nobody but itself to preempt never lacks a block.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError
from jaxllm.engine.cache.manager import KVCacheManager
from jaxllm.engine.request import Request, RequestStatus
from jaxllm.engine.scheduling.admission import admission
from jaxllm.engine.scheduling.decode_steps import DecodeSteps
from jaxllm.engine.scheduling.limits import LengthLimits
from jaxllm.engine.scheduling.partial_step import PartialStep, unschedule
from jaxllm.engine.scheduling.preemption import PreemptionLog, Shortage, choose_victim
from jaxllm.engine.scheduling.queue import FCFSQueue, PriorityQueue, WaitingQueue
from jaxllm.engine.scheduling.request_update import StepUpdates
from jaxllm.engine.scheduling.sampled_tokens import SampledTokens
from jaxllm.engine.scheduling.scheduler_stats import SchedulerStats
from jaxllm.engine.step import SchedulerOutput

if TYPE_CHECKING:
    from jaxllm.config.cache import CacheConfig
    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.engine.step import StepOutput

_PREEMPTED = int(RequestStatus.PREEMPTED)


class Scheduler:
    """Continuous batching over the rows and blocks of one runner.

    Raises:
        ValueError: the limits contradict each other, or the pool does not hold two tokens.
    """

    def __init__(self, config: SchedulerConfig, cache_config: CacheConfig) -> None:
        if config.policy not in ("fcfs", "priority"):
            raise ValueError(f'policy must be "fcfs" or "priority", got {config.policy!r}')
        self.config = config
        self.kv_cache_manager = KVCacheManager(cache_config, max_chunk=config.max_num_batched_tokens)
        self._limits = LengthLimits(config, self.kv_cache_manager)
        self.waiting: WaitingQueue = PriorityQueue() if config.policy == "priority" else FCFSQueue()
        self.running: list[Request] = []
        self._requests: dict[str, Request] = {}
        # A stack with row 0 on top: few requests stay in the low rows.
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._preemptions = PreemptionLog(self.kv_cache_manager)
        self._decode_steps = DecodeSteps(config, self.kv_cache_manager)
        #: what of the next step has been scheduled ahead of its turn
        self._ahead: PartialStep | None = None
        #: the step that was read last, while not all of its requests have their tokens
        self._sampled: SampledTokens | None = None
        #: every id that ever was to end a request, and what stands for no token
        self._end_token_ids = {-1}
        self._num_arrived = 0
        self._step = 0

    # Requests come and go.

    def add_request(self, request: Request) -> None:
        """Put a request into the waiting queue.

        Raises:
            ValidationError: its prompt can never run, or its id is taken.
        """
        self._limits.check_prompt(request.num_prompt_tokens, pools=request.pools)
        if request.request_id in self._requests:
            raise ValidationError(f"Request id {request.request_id!r} is in use; wait for its end or choose another.")
        request.max_total_tokens = self._limits.end_of(request)
        request.queued_ts = time.monotonic()
        request.arrival_order = self._num_arrived
        self._num_arrived += 1
        self._requests[request.request_id] = request
        self._end_token_ids |= request.end_token_ids
        self._decode_steps.add(request)
        self.waiting.push(request)

    def abort(self, request_ids: Iterable[str]) -> list[Request]:
        """End requests with ``FINISHED_ABORTED`` and return them; unknown and finished ids are passed over."""
        found = [self._requests[request_id] for request_id in request_ids if request_id in self._requests]
        return [request for request in found if self.finish(request, RequestStatus.FINISHED_ABORTED)]

    def finish(self, request: Request, status: RequestStatus, stop_reason: int | str | None = None) -> bool:
        """End a request now: its row and blocks are free for the next step, what it still samples is dropped.

        Returns False, and changes nothing, when it has finished already.
        """
        if request.is_finished:
            return False
        self.settle()
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        self._end(request, status, stop_reason)
        return True

    def finish_all(self, status: RequestStatus) -> list[Request]:
        """End every request, as after a failed step, and return them in order of arrival."""
        self.settle()
        requests = sorted(self._requests.values(), key=lambda request: request.arrival_order)
        self.running.clear()
        for request in requests:
            self._end(request, status, None)
        self._ahead = None
        return requests

    def _end(self, request: Request, status: RequestStatus, stop_reason: int | str | None) -> None:
        """End a request that is not in `running` any more."""
        was_waiting = request.status is not RequestStatus.RUNNING
        request.status = status
        request.stop_reason = stop_reason
        del self._requests[request.request_id]
        if was_waiting:
            self.waiting.discard_finished(request)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        if self._ahead is not None:
            self._ahead.take_back(request)
        self.kv_cache_manager.cache_full_blocks(request)
        self.kv_cache_manager.free(request)
        self._free_rows.append(request.row)
        request.row = -1

    # One step.

    def schedule_ahead(self) -> bool:
        """Schedule as much of the next step as is certain: the running requests, up to the first for which blocks lack.

        May be called when a step has been launched, and has no effect but that `schedule` has less to do. Blocks that
        the step fills are not in the prefix cache before. Returns whether anything has been decided.
        """
        # how many steps a launch does depends on who arrives until then
        if self._ahead is None and not self._decode_steps.adaptive:
            self.cache_filled_blocks()
            self._ahead = self._begin()
            self._schedule_running(self._ahead, may_preempt=False)
        return self._ahead is not None

    def schedule(self) -> SchedulerOutput:
        """Decide the next step. It may be empty: then there is nothing to do before outputs are read or requests come.

        Running requests come first, in the order of their admission; others are admitted only when nothing had to be
        preempted for the running ones.
        """
        self.cache_filled_blocks()
        step, self._ahead = self._ahead or self._begin(), None
        preempted_before = self._preemptions.count
        self._schedule_running(step)
        if self._preemptions.count == preempted_before:
            self._schedule_waiting(step)
        return step.output

    def cache_filled_blocks(self) -> None:
        """Tell the prefix cache of the blocks that the launched steps fill. The launch need not wait for it."""
        if self._ahead is None:
            self.kv_cache_manager.cache_filled_blocks()

    def _begin(self) -> PartialStep:
        budget = limit = self.config.max_num_batched_tokens
        threshold = self.config.long_prefill_token_threshold
        if threshold > 0 and self.config.enable_chunked_prefill and len(self.running) + len(self.waiting) > 1:
            limit = min(limit, threshold)
        output, left = SchedulerOutput.empty(self._step), iter(tuple(self.running))
        step = PartialStep(output, budget, limit, left, self.config.max_scored_tokens)
        self._step += 1
        return step

    def _schedule_running(self, step: PartialStep, *, may_preempt: bool = True) -> None:
        """Give the running requests that are left their tokens, preempting where blocks lack, or ending there."""
        running, manager = self.running, self.kv_cache_manager
        # not by `PartialStep.add`: this goes round for every request of every step
        output, budget, limit = step.output, step.budget, step.limit
        rows, starts, counts, samples = output.rows, output.starts, output.counts, output.samples
        requests, new_blocks, scored = output.requests, output.new_blocks, output.scored
        num_steps = self._decode_steps.choose(running, self.waiting)
        shortage: Shortage | None = None
        for request in step.left if budget > 0 else ():
            if request.row < 0:
                # Preempted for one before it, or ended.
                continue
            known = len(request.all_token_ids)
            num_tokens = known + request.num_output_placeholders
            if num_tokens >= request.max_total_tokens:
                # Its last token is sampled already and needs only to be read.
                continue
            start = request.num_computed_tokens
            count = num_tokens - start
            if count > 1:
                count = min(count, limit, budget)
            num_scored = 0
            if start < request.num_scored_tokens:
                count, num_scored = step.limit_scored(request, start, count)
                if count == 0:
                    continue
            end = start + count
            steps = 1
            if num_steps > 1:
                steps = min(num_steps, request.max_total_tokens - num_tokens)
                end += steps - 1
            if end > request.num_slots:
                first = request.num_slots // manager.block_size
                added = manager.allocate_slots(request, end - start)
                if added is None and not may_preempt:
                    step.left = itertools.chain((request,), step.left)
                    break
                while added is None:
                    if shortage is None:
                        shortage = Shortage.measure(manager, running, running.index(request))
                    victim = choose_victim(running, self.config.policy)
                    budget += unschedule(output, victim)
                    self._preempt(victim, shortage)
                    if victim is request:
                        break
                    added = manager.allocate_slots(request, end - start)
                if added is None:
                    continue
                for group, ids in enumerate(added):
                    new_blocks.append((request.row, group, first, ids))
            sample = start + count == num_tokens
            if num_steps > 1:
                output.steps.append(steps)
            rows.append(request.row)
            starts.append(start)
            counts.append(count)
            samples.append(sample)
            scored.append(num_scored)
            requests.append(request)
            request.num_computed_tokens = end
            if sample:
                request.num_output_placeholders += steps
            if num_tokens + 1 >= request.max_total_tokens or request.repetition is not None:
                output.ending.append(request)
            if end >= request.register_at and known >= request.register_at:
                # not cached at once: a victim that is scheduled and taken back has filled no blocks
                manager.filled(request, by_prompt=count > 1)
            budget -= count
            if budget <= 0:
                break
        step.budget = budget

    def _schedule_waiting(self, step: PartialStep) -> None:
        """Admit requests in the queue's order until one does not fit."""
        manager = self.kv_cache_manager
        output, limit = step.output, step.limit
        skipped: list[Request] = []
        while step.budget > 0 and self._free_rows and self.waiting:
            request = self.waiting.peek()
            if request.grammar is not None:
                # not compiled yet: others go first, and it keeps its place
                skipped.append(self.waiting.pop())
                continue
            if request.num_output_placeholders:
                self.settle()
            if request.num_output_placeholders:
                # Preempted while steps that sample its tokens run: they are part of what it has to recompute.
                break
            hit = manager.get_computed_blocks(request)
            start = hit.num_tokens
            num_tokens = len(request.all_token_ids)
            count = min(num_tokens - start, limit)
            if count > step.budget:
                if not self.config.enable_chunked_prefill:
                    break
                count = step.budget
            count, scored = step.limit_scored(request, start, count)
            if count == 0:
                break
            if self.config.reserve_full_prompt and not manager.can_fit(request, hit):
                break
            if manager.allocate_slots(request, count, hit) is None:
                break
            self.waiting.pop()
            if not request.skip_reading_prefix_cache:
                manager.prefix_cache_stats.record(num_tokens, start, resumed=request.num_preemptions > 0)
            if request.num_cached_tokens < 0:
                request.num_cached_tokens = start
                request.scheduled_ts = time.monotonic()
            request.status = RequestStatus.RUNNING
            request.row = self._free_rows.pop()
            request.num_computed_tokens = start + count
            sample = start + count == num_tokens
            if sample:
                request.num_output_placeholders = 1
            self.running.append(request)
            manager.filled(request, by_prompt=True)
            output.admitted.append(admission(request, start))
            step.add(request, start, count, sample, scored)
        for request in reversed(skipped):
            self.waiting.push_front(request)

    def _preempt(self, victim: Request, shortage: Shortage) -> None:
        """Take row and blocks from a running request for which the others lack them."""
        usage, num_lost = self.kv_cache_manager.usage, victim.num_computed_tokens
        self._put_back(self.running.index(victim))
        self._preemptions.warn(victim, num_lost, shortage, usage)

    def preempt_all(self) -> None:
        """Take rows and blocks from every running request, after all steps have been read."""
        self.settle()
        while self.running:
            self._put_back(-1)
        self._ahead = None

    def _put_back(self, index: int) -> None:
        """Preempt ``running[index]``; its tokens are computed again when it comes back."""
        victim = self.running.pop(index)
        self._release(victim)
        self._preemptions.count_one(victim)
        victim.status = RequestStatus.PREEMPTED
        victim.num_preemptions += 1
        victim.num_computed_tokens = 0
        self.waiting.push_front(victim)

    def update_from_output(self, scheduled: SchedulerOutput, output: StepOutput, index_of_step: int = 0) -> StepUpdates:
        """`end_requests` and `settle`."""
        updates = self.end_requests(scheduled, output, index_of_step)
        self.settle()
        return updates

    def end_requests(self, scheduled: SchedulerOutput, output: StepOutput, index_of_step: int = 0) -> StepUpdates:
        """Take in what a step sampled, as far as it ends requests; steps are read in the order of their scheduling.

        Tokens of requests that have finished meanwhile are dropped; a preempted request keeps its token.

        Args:
            index_of_step: which of the launch's steps, from 0 to ``scheduled.num_steps - 1``, one after the other.

        Returns:
            The requests that got a token, or ended where it should have come, in the step's order, once `settle` has
            been called.

        Raises:
            ValueError: the output has another number of entries than the step.
        """
        self.settle()
        self._sampled = sampled = SampledTokens(scheduled, output, index_of_step)
        finished_running = False
        for index in sampled.may_end(self._end_token_ids):
            request, ends = sampled.requests[index], sampled.take(index)
            if ends is not None:
                finished_running = finished_running or request.row >= 0
                self._end(request, *ends)
        if finished_running:
            self.running = [request for request in self.running if request.status <= _PREEMPTED]
        return sampled.updates

    def settle(self) -> None:
        """Give the rest of the tokens that were read last to their requests; does nothing when they have them."""
        sampled, self._sampled = self._sampled, None
        if sampled is not None:
            sampled.settle()

    # What others ask.

    @property
    def max_tokens_per_request(self) -> int:
        """Most tokens of one request that the whole pool can hold."""
        return self._limits.max_tokens_per_request

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_preemptions=self._preemptions.count,
            num_preempted_tokens=self._preemptions.tokens_lost,
            kv_cache_usage=self.kv_cache_manager.usage,
        )

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. Does nothing and returns False while requests run."""
        return self.kv_cache_manager.reset_prefix_cache()
