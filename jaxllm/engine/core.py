"""The host loop: schedule, launch, read, update; one step launched before the last one is read.

Between a step's ids being known and the next launch lies only what that launch needs. Texts and outputs are made when
it is done, while the device works.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.engine.io.output_processor import OutputProcessor
from jaxllm.engine.io.pooling_processor import PoolingProcessor
from jaxllm.engine.request import Request, RequestStatus
from jaxllm.engine.scheduling.request_update import StepUpdates
from jaxllm.engine.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.api.outputs import RequestOutput
    from jaxllm.config.cache import CacheConfig
    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.engine.io.token_constraints import TokenConstraints
    from jaxllm.engine.observe.engine_stats import EngineStats
    from jaxllm.engine.observe.metrics import EngineMetrics, Metric
    from jaxllm.engine.observe.step_observer import StepObserver
    from jaxllm.engine.step import ModelRunner, SchedulerOutput, StepFuture, StepOutput


class EngineCore:
    """Requests in, outputs out, one `step` at a time. Not thread-safe: one thread drives it.

    Args:
        runner: launches the steps; the engine owns and shuts it down.
        constraints: follows the requests whose tokens are restricted; None: there are none.
        pools: the requests are to be pooled, not continued.
    """

    def __init__(
        self,
        scheduler_config: SchedulerConfig,
        cache_config: CacheConfig,
        runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase | None,
        metrics: EngineMetrics,
        constraints: TokenConstraints | None = None,
        *,
        pools: bool = False,
    ):
        self.scheduler = Scheduler(scheduler_config, cache_config)
        self._runner = runner
        self._pools = pools
        self._outputs = PoolingProcessor() if pools else OutputProcessor(tokenizer, scheduler_config.stream_interval)
        self._metrics = metrics
        self._constraints = constraints
        #: steps launched and not read
        self._in_flight: collections.deque[tuple[SchedulerOutput, StepFuture]] = collections.deque()
        #: what `sleep` has put away
        self._asleep: set[str] = set()
        self._depth = 2 if scheduler_config.async_scheduling else 1
        #: the step that was read last, while its outputs have not been made
        self._unprocessed: tuple[SchedulerOutput, StepOutput, StepUpdates] | None = None
        #: outputs that had to be made outside of a turn; the next one returns them
        self._undelivered: list[RequestOutput] = []
        #: who is told of each step; replaced as a whole, since any thread may do so
        self._observers: tuple[StepObserver, ...] = ()
        self._observers_lock = threading.Lock()

    def add_request(self, request: Request, text: str | None) -> None:
        """Queue a request. Raises ValidationError when it can never run, RuntimeError while the engine sleeps."""
        self.check_awake()
        if request.request_id in self._outputs:
            # it may have ended, but nobody has been told so
            raise ValidationError(f"Request id {request.request_id!r} is in use; wait for its end or choose another.")
        if request.pools != self._pools:
            kind, runner = ("generative", "generate") if self._pools else ("pooling", "pooling")
            raise ValidationError(
                f"This engine takes {'pooling' if self._pools else 'generation'} requests only: what was asked for is "
                f"only supported for {kind} models. Try passing `--runner {runner}`."
            )
        if request.priority and self.scheduler.config.policy != "priority":
            raise ValidationError(
                f"Got priority {request.priority} but priority scheduling is not enabled. "
                'Set scheduling_policy="priority" when making the LLM.'
            )
        self.scheduler.add_request(request)
        self._outputs.add(request, text)
        if self._constraints is not None:
            self._constraints.add(request)

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """End requests and return what there is of them; what they hold is free for the next step. Unknown ids are
        passed over.
        """
        self._undelivered += self._process()
        outputs = []
        for request in self.scheduler.abort(request_ids):
            self._metrics.record_finished(request)
            output = self._outputs.end(request)
            if output is not None:
                outputs.append(output)
        return outputs

    @property
    def has_unfinished(self) -> bool:
        """Whether a request runs or waits, or an output is still to be delivered."""
        if self.scheduler.has_unfinished or self._undelivered:
            return True
        self.scheduler.settle()
        return self._unprocessed is not None and len(self._unprocessed[2]) > 0

    def step(self) -> list[RequestOutput]:
        """Launch a step and make the outputs of the last one read; or, when enough are launched or there is nothing to
        launch, read the oldest.

        So whoever calls may add requests after every read, before the next step is decided.

        An error of the device or of a model ends every request, since the cache's contents are lost with the failed
        step, and leaves the engine usable; it is raised to the caller.
        """
        self.check_awake()
        try:
            for observer in self._observers:
                observer.turn_begins()
            outputs, self._undelivered = self._undelivered, []
            if self._constraints is not None:
                outputs += self._fail(self._constraints.failed())
            launched = len(self._in_flight) < self._depth and self._schedule(outputs)
            self.scheduler.cache_filled_blocks()
            outputs += self._process()
            # the next turn reads
            if launched and len(self._in_flight) == self._depth > 1 and self.scheduler.schedule_ahead():
                for observer in self._observers:
                    observer.scheduled_ahead()
            if not launched and not outputs:
                if self._in_flight:
                    outputs += self._read()
                elif self._constraints is not None:
                    self._constraints.wait()
            for observer in self._observers:
                observer.turn_ends()
            return outputs
        except BaseException:
            self._recover()
            raise

    def _schedule(self, outputs: list[RequestOutput]) -> bool:
        """Schedule and launch a step; returns whether there was anything to launch."""
        scheduled = self.scheduler.schedule()
        for observer in self._observers:
            observer.scheduled(scheduled)
        if scheduled.rows:
            outputs += self._launch(scheduled)
        return bool(scheduled.rows)

    def _launch(self, scheduled: SchedulerOutput) -> list[RequestOutput]:
        """Launch a step; returns what had to be read for it."""
        constraints = self._constraints
        if constraints is not None:
            scheduled.masked_rows = constraints.masked_rows(scheduled)
        if constraints is None or not scheduled.masked_rows:
            self._in_flight.append((scheduled, self._runner.execute(scheduled)))
            self._tell_launched(scheduled)
            return []
        launched = self._runner.forward(scheduled)
        self._tell_launched(scheduled)
        outputs = []
        while self._in_flight:
            outputs += self._read()
        masks, lost = constraints.masks(scheduled)
        outputs += self._fail(lost)
        self._in_flight.append((scheduled, self._runner.sample(launched, masks)))
        return outputs

    def _tell_launched(self, scheduled: SchedulerOutput) -> None:
        for num_tokens in scheduled.step_sizes():
            self._metrics.record_step(num_tokens)
        for observer in self._observers:
            observer.launched(scheduled)

    def _read(self) -> list[RequestOutput]:
        """Take in the oldest step that is launched; returns the outputs that cannot wait for the next launch."""
        outputs = self._process()
        scheduled, future = self._in_flight.popleft()
        for observer in self._observers:
            observer.read_begins(scheduled)
        output = future.result()
        for observer in self._observers:
            observer.read(scheduled)
        updates = self.scheduler.end_requests(scheduled, output)
        if scheduled.steps:
            self.scheduler.settle()
            for index in range(1, scheduled.num_steps):
                updates.join(self.scheduler.update_from_output(scheduled, output, index))
        if self._constraints is not None and self._constraints.used:
            self.scheduler.settle()
            lost, complete = self._constraints.advance(updates)
            for request in lost:
                self.scheduler.finish(request, RequestStatus.FINISHED_ERROR)
            for request in complete:
                self.scheduler.finish(request, RequestStatus.FINISHED_STOPPED)
        self._unprocessed = scheduled, output, updates
        for observer in self._observers:
            observer.updated(scheduled, updates)
        if self._outputs.may_stop:
            # a request that ends now needs no further step
            outputs += self._process()
        return outputs

    def _process(self) -> list[RequestOutput]:
        """The outputs of the step that was read last."""
        if self._unprocessed is None:
            return []
        (scheduled, output, updates), self._unprocessed = self._unprocessed, None
        self.scheduler.settle()
        updates.record_times()
        self._outputs.take(scheduled, output)
        outputs: list[Any] = self._outputs.process(updates, output.logprobs, self.scheduler)
        self._metrics.record_updates(updates)
        for observer in self._observers:
            observer.processed(scheduled, updates)
        return outputs

    def _fail(self, requests: list[Request]) -> list[RequestOutput]:
        """End requests whose `error` says why, outside of any step."""
        if not requests:
            return []
        before = self._process()
        for request in requests:
            self.scheduler.finish(request, RequestStatus.FINISHED_ERROR)
            self._metrics.record_finished(request)
        outputs: list[Any] = self._outputs.process(StepUpdates.ended(requests), None, self.scheduler)
        return before + outputs

    def _recover(self) -> None:
        self._in_flight.clear()
        self._unprocessed, self._undelivered = None, []
        for request in self.scheduler.finish_all(RequestStatus.FINISHED_ERROR):
            self._metrics.record_finished(request)
        self._outputs.clear()
        for observer in self._observers:
            observer.failed()
        self.scheduler.reset_prefix_cache()
        self._runner.reset()

    def drain(self) -> list[RequestOutput]:
        """Read what is in flight and return its outputs, of requests that still live. Fails as `step` does."""
        outputs, self._undelivered = self._undelivered, []
        try:
            while self._in_flight:
                outputs += self._read()
            outputs += self._process()
        except BaseException:
            self._recover()
            raise
        return outputs

    # Sleep. Requests are at rest: ended, or back in the queue.

    @property
    def is_sleeping(self) -> bool:
        return bool(self._asleep)

    def check_awake(self) -> None:
        """Raise RuntimeError while anything sleeps."""
        if self._asleep:
            raise RuntimeError(f"the engine sleeps ({', '.join(sorted(self._asleep))}): call wake_up() first")

    def sleep(self, level: int, *, kv_cache: bool = False) -> None:
        """Free the device's memory. Level 0: nothing, 1: weights to the host, 2: weights dropped; `kv_cache` (always
        from level 1 on): the cache.
        """
        if kv_cache or level:
            self.scheduler.reset_prefix_cache()
            self._runner.free_cache()
            self._asleep.add("kv_cache")
        if level and "weights" not in self._asleep:
            self._runner.free_weights(keep_on_host=level == 1)
            self._asleep.add("weights")
        self._asleep.add("scheduling")

    def wake_up(self, tags: set[str]) -> bool:
        """Bring back what `tags` name of what sleeps; returns whether nothing sleeps any more."""
        if "weights" in tags & self._asleep:
            self._runner.restore_weights()
        if "kv_cache" in tags & self._asleep:
            self._runner.reset()
        woken = tags & self._asleep
        self._asleep -= tags
        if woken and self._asleep == {"scheduling"}:
            # what could run has come back in parts
            self._asleep.clear()
        return not self._asleep

    # What others count and watch.

    def record_rejection(self, reason: str) -> None:
        """Count a prompt that was refused; any thread may do so."""
        self._metrics.record_rejection(reason)

    def record_completed_prompt(self, n: int, longest_output: int) -> None:
        """Count a prompt all of whose `n` > 1 completions have ended."""
        self._metrics.record_completed_prompt(n, longest_output)

    def observe(self, observer: StepObserver) -> None:
        """Tell `observer` of every step from now on; any thread may ask for it."""
        with self._observers_lock:
            self._observers += (observer,)

    def stop_observing(self, observer: StepObserver) -> None:
        """Tell it no more. Does nothing when it is not there; any thread may ask for it."""
        with self._observers_lock:
            self._observers = tuple(other for other in self._observers if other is not observer)

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.reset_prefix_cache()

    def metrics(self) -> list[Metric]:
        """Everything that is counted and measured; any thread may ask."""
        stats = self.scheduler.kv_cache_manager.prefix_cache_stats
        return self._metrics.snapshot(self.scheduler.stats(), stats)

    def stats(self) -> EngineStats:
        """The few numbers of it that are shown while the engine runs; any thread may ask."""
        return self._metrics.stats(self.scheduler.stats(), self.scheduler.kv_cache_manager.prefix_cache_stats)

    def shutdown(self) -> None:
        """End every request and free the device; idempotent."""
        self._in_flight.clear()
        self._unprocessed, self._undelivered = None, []
        self.scheduler.finish_all(RequestStatus.FINISHED_ABORTED)
        self._outputs.clear()
        if self._constraints is not None:
            self._constraints.shutdown()
        self._runner.shutdown()
        observers, self._observers = self._observers, ()
        for observer in observers:
            observer.engine_ends()
