"""Which tokens of which requests the next step computes.

There are no phases. A request has tokens (prompt and outputs) and computed tokens; each step gives it some until the
second number has caught up with the first, and the step that catches up samples one more. Prefill, decode, prefix
hits and resumed requests are all this one case.

Steps may be scheduled before the outputs of earlier ones are read, any number of them: computed tokens advance when a
step is scheduled, and ``num_output_placeholders`` stands for the tokens that are sampled but not read. Every
`SchedulerOutput` with entries has to be executed, in order; if that fails, what the prefix cache was told about it is
false, and `finish_all` followed by `reset_prefix_cache` is the way out.

A request that is alone always gets on: `add_request` refuses a prompt that the whole pool cannot hold, and a request
that grows to what the whole pool can hold ends there with ``FINISHED_LENGTH``, as if ``max_model_len`` were that small.
So the one request that has nobody but itself to preempt never lacks a block.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError
from jaxllm.engine.cache.manager import KVCacheManager
from jaxllm.engine.request import Request, RequestStatus
from jaxllm.engine.scheduling.adapters import AdapterSlots
from jaxllm.engine.scheduling.budget import StepBudget
from jaxllm.engine.scheduling.decode_steps import DecodeSteps, computes_prompt
from jaxllm.engine.scheduling.limits import LengthLimits
from jaxllm.engine.scheduling.media import MediaScheduling
from jaxllm.engine.scheduling.micro_batches import MicroBatches
from jaxllm.engine.scheduling.preemption import PreemptionLog, Shortage
from jaxllm.engine.scheduling.queue import FCFSQueue, PriorityQueue, WaitingQueue, priority_key
from jaxllm.engine.scheduling.stats import SchedulerStats
from jaxllm.engine.scheduling.step_updates import StepUpdates
from jaxllm.engine.step import AdmittedRequest, SchedulerOutput

if TYPE_CHECKING:
    from jaxllm.config.cache import CacheConfig
    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.engine.adapters import AdapterStore
    from jaxllm.engine.step import StepOutput

#: a comparison of enums costs more than the rest of what is done for a token
_PREEMPTED = int(RequestStatus.PREEMPTED)
NOTHING_ALLOWED = (
    "what the request allows (structured_outputs, thinking_token_budget, allowed_token_ids, bad_words, min_tokens) "
    "leaves no token to generate"
)


class Scheduler:
    """Continuous batching over the rows and blocks of one runner.

    Args:
        warns: whether it says when requests are preempted.

    Raises:
        ValueError: the limits contradict each other, or the pool does not hold two tokens.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache_config: CacheConfig,
        adapters: AdapterStore | None = None,
        *,
        warns: bool = True,
    ) -> None:
        if config.policy not in ("fcfs", "priority"):
            raise ValueError(f'policy must be "fcfs" or "priority", got {config.policy!r}')
        self.config = config
        self.kv_cache_manager = KVCacheManager(cache_config, max_chunk=config.max_num_batched_tokens)
        self._limits = LengthLimits(config, self.kv_cache_manager)
        self._by_priority = config.policy == "priority"
        self.waiting: WaitingQueue = PriorityQueue() if self._by_priority else FCFSQueue()
        #: whoever gives up its blocks first comes last: the latest admission, or the least urgent request
        self.running: list[Request] = []
        self._requests: dict[str, Request] = {}
        # A stack with row 0 on top: few requests stay in the low rows.
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._preemptions = PreemptionLog(self.kv_cache_manager, warns=warns)
        self._decode_steps = DecodeSteps(config, self.kv_cache_manager)
        self._micro_batches: MicroBatches | None = None
        if config.num_micro_batches > 1:
            self._micro_batches = MicroBatches(config.num_micro_batches, ahead=config.async_scheduling)
        #: None: there are no pictures
        self.media: MediaScheduling | None = None
        if config.encoder_cache_tokens:
            self.media = MediaScheduling(
                config.encoder_cache_tokens, config.max_encoder_tokens, keeps_whole=config.keeps_media_whole
            )
        #: None: there are no adapters
        self.adapters: AdapterSlots | None = None
        if adapters is not None:
            self.adapters = AdapterSlots(config.max_loras, adapters)
        self._max_running = config.max_num_active_seqs or config.max_num_seqs
        #: what ended requests got, for the next step, where drafts are made of it
        self._ended_outputs: list[list[int]] = []
        self._num_arrived = 0
        self._num_scheduled = 0

    # Requests come and go.

    def add_request(self, request: Request) -> None:
        """Put a request into the waiting queue.

        Raises:
            ValidationError: its prompt can never run, or its id is taken.
        """
        self.check_request(request)
        request.max_total_tokens = self._limits.end_of(request)
        request.routine_until = request.max_total_tokens - 1 if request.repetition is None else 0
        request.queued_ts = time.monotonic()
        request.arrival_order = self._num_arrived
        self._num_arrived += 1
        self._requests[request.request_id] = request
        self._decode_steps.add(request)
        self.waiting.push(request)

    def check_request(self, request: Request) -> None:
        """Raise what `add_request` would raise; any thread may ask."""
        self._limits.check_prompt(request.num_prompt_tokens, pools=request.pools)
        if request.request_id in self._requests:
            raise ValidationError(f"Request id {request.request_id!r} is in use; wait for its end or choose another.")

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
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        self._end(request, status, stop_reason)
        return True

    def finish_all(self, status: RequestStatus) -> list[Request]:
        """End every request, as after a failed step, and return them in order of arrival."""
        requests = sorted(self._requests.values(), key=lambda request: request.arrival_order)
        if self.kv_cache_manager.host_pool is not None:
            self.kv_cache_manager.host_pool.lose_arriving()
        self.running.clear()
        for request in requests:
            self._end(request, status, None)
        return requests

    def _end(self, request: Request, status: RequestStatus, stop_reason: int | str | None) -> None:
        """End a request that the caller takes out of `running`."""
        was_running = request.status is RequestStatus.RUNNING
        request.status = status
        request.stop_reason = stop_reason
        del self._requests[request.request_id]
        if self.config.keeps_outputs and request.num_output_tokens:
            self._ended_outputs.append(request.all_token_ids[request.num_prompt_tokens :])
        if was_running:
            self._release(request)
        else:
            self.waiting.discard_finished(request)

    def _release(self, request: Request) -> None:
        self.kv_cache_manager.cache_full_blocks(request)
        self.kv_cache_manager.free(request)
        if self.media is not None:
            self.media.release(request)
        if self.adapters is not None:
            self.adapters.release(request)
        self._free_rows.append(request.row)
        request.row = -1

    # One step.

    def schedule(self) -> SchedulerOutput:
        """Decide the next step. It may be empty: then there is nothing to do before outputs are read or requests come.

        Running requests come first, in the order of `running`; others are admitted only when nothing had to be
        preempted for the running ones.
        """
        step = SchedulerOutput.empty(self._num_scheduled)
        self._num_scheduled += 1
        budget = StepBudget.of(self.config, num_requests=len(self.running) + len(self.waiting))
        num_preemptions = self._preemptions.count
        if self.media is not None:
            self.media.begin()
        self._schedule_running(step, budget)
        if self._preemptions.count == num_preemptions and not step.is_apart:
            self._schedule_waiting(step, budget)
        if self._micro_batches is not None:
            self._micro_batches.end(step)
        if self.media is not None:
            self.media.end(step)
        if self.adapters is not None:
            step.uses_adapters = any(request.adapter_slot >= 0 for request in step.requests)
        if step.rows and self._ended_outputs:
            step.ended_outputs, self._ended_outputs = self._ended_outputs, []
        if self.kv_cache_manager.host_pool is not None:
            step.copies_out, step.copies_in = self.kv_cache_manager.host_pool.take_copies()
        return step

    def _schedule_running(self, step: SchedulerOutput, budget: StepBudget) -> None:
        """Give the running requests their tokens, preempting the last ones where blocks lack."""
        manager = self.kv_cache_manager
        rows, starts, counts, wanted, requests = step.rows, step.starts, step.counts, step.wanted, step.requests
        launch = self._decode_steps.choose(self.running, len(self.waiting), self._max_running - len(self.running))
        if not launch.num_steps:
            return
        step.num_steps, step.num_drafts, step.is_apart = launch
        step.may_draft = self._decode_steps.may_draft(min(len(self.running) + len(self.waiting), self._max_running))
        most_decoded, with_drafts = launch.num_tokens, launch.num_drafts > 0
        micro_batches = self._micro_batches
        if micro_batches is not None:
            micro_batches.begin(len(self.running))
        shortage: Shortage | None = None
        # Whoever is preempted leaves the list at its end: nobody who has got tokens does.
        for request in self.running:
            if budget.tokens <= 0:
                break
            known = len(request.all_token_ids)
            num_tokens = known + request.num_output_placeholders
            if num_tokens >= request.max_total_tokens:
                # Its last token is sampled already and needs only to be read.
                continue
            if request.num_unsure_tokens and not with_drafts:
                # the device alone knows how far it has come, and only launches with drafts ask it
                continue
            if step.is_apart and computes_prompt(request):
                continue
            start = request.num_computed_tokens
            left = num_tokens - start
            count = num_wanted = 1
            if left > 1 or start < request.media_stop:
                count, num_wanted = self._chunk(step, budget, request, start, left)
                if count == 0:
                    continue
            elif micro_batches is not None and not micro_batches.takes(request):
                continue
            elif most_decoded > 1:
                count = num_wanted = min(most_decoded, request.max_total_tokens - num_tokens)
            end = start + count
            if end > request.num_slots:
                first = request.num_slots // manager.block_size
                added = manager.allocate_slots(request, count)
                while added is None:
                    shortage = shortage or Shortage.measure(manager, self.running, request)
                    victim = self.running[-1]
                    self._preempt(victim, shortage)
                    if victim is request:
                        return
                    added = manager.allocate_slots(request, count)
                for group, ids in enumerate(added):
                    step.new_blocks.append((request.row, group, first, ids))
            request.num_computed_tokens = end
            if end >= num_tokens:
                request.num_output_placeholders += end + 1 - num_tokens
            if known >= request.register_at <= end:
                manager.cache_full_blocks(request)
            if start < request.media_stop and self.media is not None:
                self.media.place(step, request)
            rows.append(request.row)
            starts.append(start)
            counts.append(count)
            wanted.append(num_wanted)
            requests.append(request)
            if with_drafts:
                step.resumes.append(request.num_unsure_tokens > 0)
                request.num_unsure_tokens += count - 1
            if left > 1:
                budget.take(request, start, count)
            else:
                # decode steps behind the first one cost others nothing: nobody waits
                budget.tokens -= 1

    def _schedule_waiting(self, step: SchedulerOutput, budget: StepBudget) -> None:
        """Admit requests in the queue's order until one does not fit."""
        manager = self.kv_cache_manager
        skipped: list[Request] = []
        if self.adapters is not None:
            self.adapters.begin()
        while budget.tokens > 0 and len(self.running) < self._max_running and self.waiting:
            request = self.waiting.peek()
            if request.grammar is not None:
                # not compiled yet: others go first, and it keeps its place
                skipped.append(self.waiting.pop())
                continue
            if self.adapters is not None and not self.adapters.find(request):
                # its adapter is not there: so it is with this one
                skipped.append(self.waiting.pop())
                continue
            if request.num_output_placeholders:
                # Preempted while steps that sample its tokens run: they are part of what it has to recompute.
                break
            hit = manager.get_computed_blocks(request)
            start, num_tokens = hit.num_tokens, len(request.all_token_ids)
            if not self.config.enable_chunked_prefill and num_tokens - start > budget.tokens:
                break
            count, wanted = self._chunk(step, budget, request, start, num_tokens - start)
            if count == 0:
                break
            has_room = not self.config.reserve_full_prompt or manager.can_fit(request, hit)
            if not has_room or manager.allocate_slots(request, count, hit) is None:
                if self.media is not None:
                    self.media.release(request)
                break
            self.waiting.pop()
            self._admit(request, start, manager.num_external_tokens(hit))
            if self.adapters is not None:
                self.adapters.take(request, step)
            request.num_computed_tokens = start + count
            request.num_output_placeholders = int(start + count == num_tokens)
            manager.cache_full_blocks(request)
            budget.take(request, start, count)
            if self.media is not None:
                self.media.place(step, request)
            step.admitted.append(AdmittedRequest.of(request, start))
            step.rows.append(request.row)
            step.starts.append(start)
            step.counts.append(count)
            step.wanted.append(wanted)
            step.requests.append(request)
        for request in reversed(skipped):
            self.waiting.push_front(request)

    def _chunk(
        self, step: SchedulerOutput, budget: StepBudget, request: Request, start: int, left: int
    ) -> tuple[int, int]:
        """`StepBudget.chunk`, as far as the pictures of the chunk are there."""
        if start >= request.media_stop or self.media is None:
            return budget.chunk(request, start, left)
        least = self.media.least(request, start)
        count, _ = budget.chunk(request, start, left, least=least)
        if not count:
            return 0, 0
        return budget.chunk(request, start, left, self.media.chunk(step, request, start, count), least=least)

    def _admit(self, request: Request, num_cached_tokens: int, num_external_tokens: int) -> None:
        """Give a request a row and its place among the running ones; it has its blocks.

        Args:
            num_external_tokens: those of the cached ones that come from the host.
        """
        if not request.skip_reading_prefix_cache:
            manager, resumed = self.kv_cache_manager, request.num_preemptions > 0
            num_tokens, num_local = len(request.all_token_ids), num_cached_tokens - num_external_tokens
            manager.prefix_cache_stats.record(num_tokens, num_local, resumed=resumed)
            if manager.lost_hits is not None and not resumed:
                manager.lost_hits.count(request, num_cached_tokens)
            if manager.host_pool is not None:
                manager.external_stats.record(num_tokens - num_local, num_external_tokens, resumed=resumed)
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = num_cached_tokens
            request.num_external_tokens = num_external_tokens
            request.scheduled_ts = time.monotonic()
        request.status = RequestStatus.RUNNING
        request.row = self._free_rows.pop()
        if self._by_priority:
            bisect.insort(self.running, request, key=priority_key)
        else:
            self.running.append(request)

    def _preempt(self, victim: Request, shortage: Shortage) -> None:
        """Take row and blocks from the last running request, for which the others lack them."""
        usage, num_lost = self.kv_cache_manager.usage, victim.num_computed_tokens
        self._put_back_last()
        self._preemptions.warn(victim, num_lost, shortage, usage)

    def preempt_all(self) -> None:
        """Take rows and blocks from every running request, after all steps have been read."""
        while self.running:
            self._put_back_last()

    def _put_back_last(self) -> None:
        """Preempt ``running[-1]``; its tokens are computed again when it comes back."""
        victim = self.running.pop()
        self._release(victim)
        self._preemptions.count_one(victim)
        victim.status = RequestStatus.PREEMPTED
        victim.num_preemptions += 1
        victim.num_computed_tokens = 0
        self.waiting.push_front(victim)

    def update(self, scheduled: SchedulerOutput, output: StepOutput) -> StepUpdates:
        """Give the requests of a step what it sampled, and end those that end with it.

        Steps are read in the order of their scheduling. Tokens of requests that have finished meanwhile are dropped; a
        preempted request keeps its tokens.

        Returns:
            The requests that got tokens, or ended where one should have come, in the step's order.

        Raises:
            ValueError: the output has another number of entries than the step.
        """
        if len(output.counts) != len(scheduled.requests):
            raise ValueError(f"{len(output.counts)} results for the {len(scheduled.requests)} entries of a step")
        if scheduled.copies_out and self.kv_cache_manager.host_pool is not None:
            self.kv_cache_manager.host_pool.arrived(scheduled.copies_out)
        firsts = [0, *itertools.accumulate(output.counts)]
        updates = StepUpdates(list(scheduled.requests), list(output.counts), firsts[:-1])
        now, token_ids, passed_over = time.monotonic(), output.token_ids, []
        drafts = scheduled.num_drafts > 0
        if drafts:
            self._decode_steps.learn(scheduled, output)
        for entry, (request, first, count) in enumerate(zip(updates.requests, firsts, output.counts, strict=False)):
            if request.status > _PREEMPTED:
                passed_over.append(entry)
                continue
            is_routine = count == 1 and not drafts and request.first_token_ts
            if is_routine and len(request.all_token_ids) < request.routine_until:
                token_id = token_ids[first]
                if token_id not in request.end_token_ids:
                    request.all_token_ids.append(token_id)
                    request.num_output_placeholders -= 1
                    request.last_token_ts = now
                    continue
            end = scheduled.starts[entry] + scheduled.counts[entry] if scheduled.wanted[entry] else 0
            if drafts:
                end = len(request.all_token_ids)
                self._take_back(request, scheduled.counts[entry], count)
                if output.drafted is not None and output.accepted is not None:
                    request.num_drafted_tokens += int(output.drafted[entry].sum())
                    request.num_accepted_tokens += int(output.accepted[entry].sum())
            updates.counts[entry] = count = self._take(request, token_ids[first : first + count], end)
            if request.is_finished:
                updates.ended.append(request)
            elif not count:
                passed_over.append(entry)
                continue
            request.last_token_ts = now
            request.first_token_ts = request.first_token_ts or now
        if updates.ended:
            self.running = [request for request in self.running if request.status <= _PREEMPTED]
        for entry in reversed(passed_over):
            del updates.requests[entry], updates.counts[entry], updates.firsts[entry]
        return updates

    def _take_back(self, request: Request, scheduled: int, count: int) -> None:
        """Count, of the tokens that a launch with drafts was scheduled for, those that it brought."""
        request.num_unsure_tokens -= scheduled - 1
        request.num_output_placeholders -= scheduled - count
        if request.status is RequestStatus.RUNNING:
            request.num_computed_tokens -= scheduled - count

    def _take(self, request: Request, token_ids: list[int], end: int) -> int:
        """Give a request its tokens up to one that ends it, and end it then; the caller takes it out of `running`.

        Args:
            end: the position of the token that should be there afterwards.

        Returns:
            The number of tokens that it got.
        """
        tokens = request.all_token_ids
        for count, token_id in enumerate(token_ids, 1):
            tokens.append(token_id)
            request.num_output_placeholders -= 1
            status, stop_reason = request.check_stop()
            if status is not None:
                # what was scheduled behind an end may not be computed
                request.num_computed_tokens = min(request.num_computed_tokens, len(tokens) - 1)
                self._end(request, status, stop_reason)
                return count
        if len(tokens) <= end:
            if not request.pools:
                request.error = NOTHING_ALLOWED
            # a request that pools has no tokens
            status = RequestStatus.FINISHED_STOPPED if request.pools else RequestStatus.FINISHED_ERROR
            self._end(request, status, None)
        return len(token_ids)

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
        host_pool = self.kv_cache_manager.host_pool
        encoded = None if self.media is None else self.media.cache
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_preemptions=self._preemptions.count,
            num_preempted_tokens=self._preemptions.tokens_lost,
            kv_cache_usage=self.kv_cache_manager.usage,
            host_cache_usage=None if host_pool is None else host_pool.usage,
            num_stores_skipped=0 if host_pool is None else host_pool.num_skipped,
            encoder_cache_usage=None if encoded is None else encoded.num_used / encoded.num_rows,
            encoder_cache_hits=0 if encoded is None else encoded.num_hits,
            encoder_cache_queries=0 if encoded is None else encoded.num_queries,
        )

    def adapter_names(self) -> tuple[set[str], set[str]]:
        """Of the adapters that requests wait with, and of those that they run with; any thread may ask."""
        waiting, running = set(), set()
        for request in list(self._requests.values()):
            if request.adapter is not None:
                (waiting if request.adapter_slot < 0 else running).add(request.adapter.request.lora_name)
        return waiting, running

    def reset_prefix_cache(self, *, host_pool: bool = False) -> bool:
        """As `KVCacheManager.reset_prefix_cache`; what nobody uses of encoded pictures is forgotten, too."""
        if self.media is not None:
            self.media.cache.forget_unused()
        return self.kv_cache_manager.reset_prefix_cache(host_pool=host_pool)
