"""Fills a `Trace` from the engine's steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxllm.engine.observe.step_observer import StepObserver
from jaxllm.engine.observe.step_shape import StepShape
from jaxllm.engine.observe.trace import RequestRecord, StepRecord, Trace
from jaxllm.engine.request import Request, RequestStatus

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.engine.scheduling.scheduler import Scheduler
    from jaxllm.engine.scheduling.step_updates import StepUpdates
    from jaxllm.engine.step import SchedulerOutput


class _Seen:
    """A request of the trace that has not ended."""

    __slots__ = ("preempted", "preempted_at", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.preempted: list[tuple[float, float]] = []
        self.preempted_at: float | None = None


class TraceRecorder(StepObserver):
    """Watches the steps of one scheduler.

    Args:
        bucket: (tokens, sequences) of a step -> those of the compiled program that runs it, first.
        clock: seconds; the one of the requests' times, so that both lie on one axis.
        engine: number of the replica.
        zero: the clock's time at the trace's start; None: now.
    """

    def __init__(
        self,
        trace: Trace,
        scheduler: Scheduler,
        bucket: Callable[[int, int], tuple[int, ...]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        engine: int = 0,
        zero: float | None = None,
    ) -> None:
        self.trace, self._engine = trace, engine
        self._scheduler, self._bucket, self._clock = scheduler, bucket, clock
        self._zero = clock() if zero is None else zero
        self._num_preemptions = scheduler.stats().num_preemptions
        #: when the turn began; None outside of one, or when the trace was not yet on
        self._turn: float | None = None
        self._decided = self._device_free = self._read_start = self._read_end = 0.0
        #: the last moment that is known of the current turn, or of the last one
        self._last = 0.0
        #: what is known so far of the steps that are launched
        self._launched: dict[int, dict[str, Any]] = {}
        self._requests: dict[str, _Seen] = {}

    def _now(self) -> float:
        return self._clock() - self._zero

    def turn_begins(self) -> None:
        self._turn = self._now()

    def scheduled(self, step: SchedulerOutput) -> None:
        if self._turn is None:
            return
        now = self._decided = self._now()
        stats = self._scheduler.stats()
        preemptions = stats.num_preemptions - self._num_preemptions
        self._follow(step, now, preemptions)
        if not step.rows:
            return
        self._num_preemptions = stats.num_preemptions
        prefill = sum(
            count
            for request, start, count in zip(step.requests, step.starts, step.counts, strict=True)
            if (count > 1 and not step.goes_on_alone) or start < request.num_prompt_tokens
        )
        num_seqs = len(step.rows)
        bucket_tokens, bucket_seqs = self._bucket(step.step_sizes()[0], num_seqs)[:2] if self._bucket else (0, 0)
        shape = StepShape.of(step, bucket_tokens)
        self._launched[step.step] = {
            "engine": self._engine,
            "step": step.step,
            "start": self._turn,
            "num_prefill_tokens": prefill,
            "num_decode_tokens": step.num_tokens - prefill,
            "num_seqs": num_seqs,
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "kv_cache_usage": stats.kv_cache_usage,
            "num_preemptions": preemptions,
            "num_blocks_out": len(step.copies_out),
            "num_blocks_in": len(step.copies_in),
            "bucket_tokens": bucket_tokens,
            "bucket_seqs": bucket_seqs,
            "schedule_time": now - self._turn,
            "launch_time": 0.0,
            "num_steps": shape.num_steps,
            "num_logits": shape.num_logits,
            "decode_context": shape.decode_context,
            "chunk_pairs": shape.chunk_pairs,
        }

    def launched(self, step: SchedulerOutput) -> None:
        self._last = self._now()
        if entry := self._launched.get(step.step):
            entry["launch_time"] = self._last - self._decided

    def read_begins(self, step: SchedulerOutput) -> None:
        self._read_start = self._now()

    def read(self, step: SchedulerOutput) -> None:
        self._read_end = self._now()

    def experts(self, step: SchedulerOutput, load: np.ndarray) -> None:
        self.trace.expert_loads[self._engine] = self.trace.expert_loads.get(self._engine, 0) + load.astype("int64")

    def drafts(self, step: SchedulerOutput, drafted: np.ndarray, accepted: np.ndarray) -> None:
        if entry := self._launched.get(step.step):
            entry |= {"num_drafted_tokens": int(drafted.sum()), "num_accepted_tokens": int(accepted.sum())}

    def updated(self, step: SchedulerOutput, updates: StepUpdates) -> None:
        self._last = self._now()
        if entry := self._launched.get(step.step):
            if step.num_drafts:
                entry["num_decode_tokens"] = sum(updates.counts)
            device_start = max(entry["start"] + entry["schedule_time"], self._device_free)
            entry |= {
                "read_start": self._read_start,
                "wait_time": self._read_end - self._read_start,
                "update_time": self._last - self._read_end,
                "device_start": device_start,
                "device_time": self._read_end - device_start,
            }
        self._device_free = self._read_end

    def processed(self, step: SchedulerOutput, updates: StepUpdates) -> None:
        now = self._now()
        if entry := self._launched.pop(step.step, None):
            self.trace.steps.append(StepRecord(**entry, output_start=self._last, output_time=now - self._last))
        self._last = now
        for request in updates.ended:
            self._end(request.request_id)

    def turn_ends(self) -> None:
        self._turn = None

    def failed(self) -> None:
        self._turn = None
        self._launched.clear()
        self._end_all()

    def engine_ends(self) -> None:
        self.trace.stop()

    def close(self) -> None:
        """Record what is known of the requests that have not ended."""
        self._end_all()

    def _follow(self, step: SchedulerOutput, now: float, preemptions: int) -> None:
        """Keep track of who is in the step, who had to leave, and who is back."""
        requests = self._requests
        for request in step.requests:
            if request.request_id not in requests:
                requests[request.request_id] = _Seen(request)
        for admitted in step.admitted:
            seen = requests.get(admitted.request_id)
            if seen is not None and seen.preempted_at is not None:
                seen.preempted.append((seen.preempted_at, now))
                seen.preempted_at = None
        if preemptions:
            # a copy: the trace may be stopped by another thread
            for seen in list(requests.values()):
                if seen.request.status is RequestStatus.PREEMPTED and seen.preempted_at is None:
                    seen.preempted_at = now

    def _end_all(self) -> None:
        for request_id in list(self._requests):
            self._end(request_id)

    def _end(self, request_id: str) -> None:
        seen = self._requests.pop(request_id, None)
        if seen is None:
            return
        request = seen.request
        if seen.preempted_at is not None:
            seen.preempted.append((seen.preempted_at, self._now()))
        num_full = request.num_prompt_tokens // self._scheduler.kv_cache_manager.block_size
        self.trace.requests.append(
            RequestRecord(
                request_id=request.request_id,
                num_prompt_tokens=request.num_prompt_tokens,
                num_cached_tokens=max(request.num_cached_tokens, 0),
                num_output_tokens=request.num_output_tokens,
                finish_reason=request.finish_reason,
                queued=request.queued_ts - self._zero,
                scheduled=self._time(request.scheduled_ts),
                first_token=self._time(request.first_token_ts),
                last_token=self._time(request.last_token_ts),
                preempted=tuple(seen.preempted),
                engine=self._engine,
                num_drafted_tokens=request.num_drafted_tokens,
                num_accepted_tokens=request.num_accepted_tokens,
                block_hashes=tuple(block_hash.hex() for block_hash in request.block_hashes[:num_full]),
            )
        )

    def _time(self, moment: float) -> float | None:
        return moment - self._zero if moment else None
