"""The host loop: schedule, launch, read, update; one step is launched before the last one is read, so that the device
has work while the host updates, makes texts and schedules.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.engine.io.output_processor import OutputProcessor
from jaxllm.engine.io.pooling_processor import PoolingProcessor
from jaxllm.engine.observe.step_counts import StepCounts
from jaxllm.engine.request import Request, RequestStatus
from jaxllm.engine.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.api.outputs import RequestOutput
    from jaxllm.config.cache import CacheConfig
    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.engine.adapters import AdapterStore
    from jaxllm.engine.io.token_constraints import TokenConstraints
    from jaxllm.engine.observe.metrics import EngineMetrics, EngineStats, Metric
    from jaxllm.engine.observe.step_observer import StepObserver
    from jaxllm.engine.step import ModelRunner, SchedulerOutput, StageTimer, StepFuture


class EngineCore:
    """Requests in, outputs out, one `step` at a time. Not thread-safe: one thread drives it.

    Args:
        runner: launches the steps; the engine owns and shuts it down.
        constraints: follows the requests whose tokens are restricted; None: there are none.
        pools: the requests are to be pooled, not continued.
        bucket: (tokens, sequences) of a step -> those of the program that runs it; None: there are none.
        adapters: has those that requests may have; None: there are none.
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
        bucket: Callable[[int, int], tuple[int, ...]] | None = None,
        adapters: AdapterStore | None = None,
    ):
        self.scheduler = Scheduler(scheduler_config, cache_config, adapters)
        self._runner = runner
        self._pools = pools
        self._outputs = PoolingProcessor() if pools else OutputProcessor(tokenizer, scheduler_config.stream_interval)
        self._metrics = metrics
        self._constraints = constraints
        #: steps launched and not read
        self._in_flight: collections.deque[tuple[SchedulerOutput, StepFuture]] = collections.deque()
        #: what `sleep` has put away
        self._asleep: set[str] = set()
        #: whether no step is run
        self.is_paused = False
        #: whether no request is taken meanwhile
        self._refuses = False
        #: steps under way: one at each stage of a pipeline, and one that waits for the oldest one
        self._depth = scheduler_config.num_micro_batches + scheduler_config.async_scheduling
        self.counts = StepCounts(self.scheduler, bucket)
        #: who is told of each step; replaced as a whole, since any thread may do so
        self._observers: tuple[StepObserver, ...] = (self.counts,)
        self._observers_lock = threading.Lock()

    @property
    def config(self) -> SchedulerConfig:
        """The limits that hold."""
        return self.scheduler.config

    @property
    def max_num_seqs(self) -> int:
        """Requests that can run at once."""
        return self.config.max_num_seqs

    @property
    def cores(self) -> tuple[EngineCore, ...]:
        """Those whose steps can be watched one by one."""
        return (self,)

    def add_request(self, request: Request, text: str | None) -> None:
        """Queue a request.

        Raises:
            ValidationError: it can never run.
            RuntimeError: the engine sleeps, or takes no requests while it is paused.
        """
        self.check_request(request)
        self.scheduler.add_request(request)
        self._outputs.add(request, text)
        if self._constraints is not None:
            self._constraints.add(request)

    def check_request(self, request: Request) -> None:
        """Raise what `add_request` would raise; any thread may ask."""
        self.check_awake()
        if self._refuses:
            self.check_runs()
        if request.pools != self._pools:
            kind, runner = ("generative", "generate") if self._pools else ("pooling", "pooling")
            raise ValidationError(
                f"This engine takes {'pooling' if self._pools else 'generation'} requests only: what was asked for is "
                f"only supported for {kind} models. Try passing `--runner {runner}`."
            )
        if request.priority and self.scheduler.config.policy != "priority":
            raise ValidationError(
                f"Got priority {request.priority} but priority scheduling is not enabled. "
                'Set scheduling_policy="priority" when making the LLM (--scheduling-policy priority).'
            )
        self.scheduler.check_request(request)

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """End requests and return what there is of them; what they hold is free for the next step. Unknown ids are
        passed over.
        """
        return self._outputs_of_ended(self.scheduler.abort(request_ids))

    @property
    def has_unfinished(self) -> bool:
        """Whether a request runs or waits."""
        return self.scheduler.has_unfinished

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits, and no step is to be read."""
        return not (self.has_unfinished or self._in_flight)

    def step(self) -> list[RequestOutput]:
        """Launch a step, if there is anything to launch; and read the oldest one, when that makes enough steps that are
        launched, or nothing could be.

        So whoever calls may add requests after every launch, before the next step is decided.

        An error of the device or of a model ends every request, since the cache's contents are lost with the failed
        step, and leaves the engine usable; it is raised to the caller.
        """
        self.check_runs()
        try:
            outputs, launched = self.begin_step()
            waits = not (outputs or self._in_flight)
            outputs += self.end_step(launched=launched)
            if waits:
                self.wait()
            return outputs
        except BaseException:
            self.recover()
            raise

    def begin_step(self) -> tuple[list[RequestOutput], bool]:
        """The first half of a `step`: launch one, if there is anything to launch. What either half raises, the caller
        has to `recover` from.

        Returns:
            (outputs, whether one was launched).
        """
        for observer in self._observers:
            observer.turn_begins()
        outputs = [] if self._constraints is None else self._fail(self._constraints.failed())
        return outputs, self._launch(outputs)

    def end_step(self, *, launched: bool) -> list[RequestOutput]:
        """The second half: read the oldest step, if it is time.

        Args:
            launched: whether the first half has launched one.
        """
        outputs: list[RequestOutput] = []
        if self._in_flight and (not launched or len(self._in_flight) >= self._depth):
            outputs = self._read()
        for observer in self._observers:
            observer.turn_ends()
        return outputs

    def wait(self) -> None:
        """Wait a little for what requests wait for, where no step is to be read. It is no work of the host's, and of no
        turn.
        """
        if self._constraints is not None:
            self._constraints.wait()
        if self.scheduler.adapters is not None:
            self.scheduler.adapters.wait()

    @property
    def has_launched(self) -> bool:
        """Whether a step is to be read."""
        return bool(self._in_flight)

    def _launch(self, outputs: list[RequestOutput]) -> bool:
        """Schedule and launch a step; returns whether there was anything to launch.

        Args:
            outputs: gets those of the steps that have to be read for it.
        """
        scheduled = self.scheduler.schedule()
        if self.scheduler.adapters is not None:
            outputs += self._fail(self.scheduler.adapters.take_failed())
        for observer in self._observers:
            observer.scheduled(scheduled)
        if not scheduled.rows:
            return False
        if self._constraints is not None:
            scheduled.masked_rows = self._constraints.masked_rows(scheduled)
        if self._constraints is not None and scheduled.masked_rows and scheduled.num_drafts:
            # the scheduler makes such a launch when the requests' tokens are read
            scheduled.checked, lost = self._constraints.drafts(scheduled)
            outputs += self._fail(lost)
            future = self._runner.execute(scheduled)
            self._tell_launched(scheduled)
        elif self._constraints is None or not scheduled.masked_rows:
            future = self._runner.execute(scheduled)
            self._tell_launched(scheduled)
        else:
            launched = self._runner.forward(scheduled)
            self._tell_launched(scheduled)
            # the masks follow from the requests' earlier tokens; steps of others may stay under way
            masked = [
                r for r, row in zip(scheduled.requests, scheduled.rows, strict=True) if row in scheduled.masked_rows
            ]
            while self._in_flight and any(r.num_output_placeholders > 1 and not r.is_finished for r in masked):
                outputs += self._read()
            masks, lost = self._constraints.masks(scheduled)
            outputs += self._fail(lost)
            future = self._runner.sample(launched, masks)
        self._in_flight.append((scheduled, future))
        return True

    def _tell_launched(self, scheduled: SchedulerOutput) -> None:
        for num_tokens in scheduled.step_sizes():
            self._metrics.record_step(num_tokens)
        for observer in self._observers:
            observer.launched(scheduled)

    def _read(self) -> list[RequestOutput]:
        """Take in the oldest step that is launched; returns its outputs."""
        scheduled, future = self._in_flight.popleft()
        for observer in self._observers:
            observer.read_begins(scheduled)
        output = future.result()
        for observer in self._observers:
            observer.read(scheduled)
        if output.expert_load is not None:
            self._metrics.record_expert_load(output.expert_load)
            for observer in self._observers:
                observer.experts(scheduled, output.expert_load)
        if output.drafted is not None and output.accepted is not None:
            self._metrics.record_drafts(output.drafted, output.accepted)
            for observer in self._observers:
                observer.drafts(scheduled, output.drafted, output.accepted)
        outputs: list[Any] = []
        if output.errors:
            failed = {entry: r for entry, r in enumerate(scheduled.requests) if entry in output.errors}
            for entry, request in failed.items():
                if not request.is_finished:
                    request.error = output.errors[entry]
            outputs += self._fail(list(failed.values()))
        updates = self.scheduler.update(scheduled, output)
        if self._constraints is not None and self._constraints.used:
            lost, complete = self._constraints.advance(updates)
            for requests, status in ((lost, RequestStatus.FINISHED_ERROR), (complete, RequestStatus.FINISHED_STOPPED)):
                updates.ended += [request for request in requests if self.scheduler.finish(request, status)]
        for observer in self._observers:
            observer.updated(scheduled, updates)
        outputs += self._outputs.process(scheduled, output, updates, self.scheduler)
        self._metrics.record_updates(updates)
        for observer in self._observers:
            observer.processed(scheduled, updates)
        return outputs

    def _fail(self, requests: list[Request]) -> list[RequestOutput]:
        """End requests whose `error` says why, outside of any step."""
        return self._outputs_of_ended([r for r in requests if self.scheduler.finish(r, RequestStatus.FINISHED_ERROR)])

    def _outputs_of_ended(self, requests: Iterable[Request]) -> list[Any]:
        """The last outputs of requests that have ended outside of any step."""
        outputs = []
        for request in requests:
            self._metrics.record_finished(request)
            output = self._outputs.end(request)
            if output is not None:
                outputs.append(output)
        return outputs

    def recover(self) -> None:
        """End every request after a failed step, and make the device's state anew."""
        self._in_flight.clear()
        for request in self.scheduler.finish_all(RequestStatus.FINISHED_ERROR):
            self._metrics.record_finished(request)
        self._outputs.clear()
        for observer in self._observers:
            observer.failed()
        self.scheduler.reset_prefix_cache()
        self.forget_adapters()
        self._runner.reset()

    def forget_adapters(self) -> None:
        """They come to the device anew. No request runs."""
        if self.scheduler.adapters is not None:
            self.scheduler.adapters.forget()

    def drain(self) -> list[RequestOutput]:
        """Read what is in flight and return its outputs, of requests that still live. Fails as `step` does."""
        outputs = []
        try:
            while self._in_flight:
                outputs += self._read()
        except BaseException:
            self.recover()
            raise
        return outputs

    def rest(self) -> None:
        """Wait for what runs in other threads: nothing does."""

    def preempt_all(self) -> None:
        """Put every running request back into the queue, after all steps have been read."""
        self.scheduler.preempt_all()

    # Pauses, which keep what is in memory.

    def pause(self, *, refuse: bool) -> None:
        """Run no step until `resume`.

        Args:
            refuse: take no requests, either.
        """
        self.is_paused, self._refuses = True, refuse

    def resume(self) -> None:
        """Go on; does nothing when it is not paused."""
        self.is_paused = self._refuses = False

    def check_runs(self) -> None:
        """Raise RuntimeError while the engine sleeps or is paused."""
        self.check_awake()
        if self.is_paused:
            raise RuntimeError("generation is paused: call resume_generation() first")

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
        from level 1 on): the cache. Blocks in the host's pool stay below level 2.
        """
        if kv_cache or level:
            # weights that are read anew may be others
            self.scheduler.reset_prefix_cache(host_pool=level == 2)
            self._runner.free_cache()
            self._asleep.add("kv_cache")
        if level and "weights" not in self._asleep:
            self._runner.free_weights(keep_on_host=level == 1)
            self.forget_adapters()
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

    def waited_for_prompts(self, seconds: float) -> None:
        """Count a time in which nothing ran, since no prompt was tokenized yet."""
        self.counts.tokenizer_seconds += seconds

    def prompts_are_missing(self) -> None:
        """As `StepCounts.prompts_are_missing`."""
        self.counts.prompts_are_missing()

    def observe(self, observer: StepObserver) -> None:
        """Tell `observer` of every step from now on; any thread may ask for it."""
        with self._observers_lock:
            self._observers += (observer,)

    def time_stages(self) -> StageTimer | None:
        """As `ModelRunner.time_stages`; any thread may ask for it."""
        return self._runner.time_stages()

    def stop_observing(self, observer: StepObserver) -> None:
        """Tell it no more. Does nothing when it is not there; any thread may ask for it."""
        with self._observers_lock:
            self._observers = tuple(other for other in self._observers if other is not observer)

    def reset_prefix_cache(self, *, host_pool: bool = False) -> bool:
        """As `Scheduler.reset_prefix_cache`."""
        return self.scheduler.reset_prefix_cache(host_pool=host_pool)

    def metrics(self) -> list[Metric]:
        """Everything that is counted and measured; any thread may ask."""
        manager = self.scheduler.kv_cache_manager
        found = self._metrics.snapshot(self.scheduler.stats(), manager.prefix_cache_stats, manager.external_stats)
        if self.scheduler.adapters is not None:
            found.append(self._metrics.adapters(self.scheduler.config.max_loras, *self.scheduler.adapter_names()))
        return found + self.counts.metrics(self._metrics.labels)

    def stats(self) -> EngineStats:
        """The few numbers of it that are shown while the engine runs; any thread may ask."""
        manager = self.scheduler.kv_cache_manager
        return self._metrics.stats(self.scheduler.stats(), manager.prefix_cache_stats, manager.external_stats)

    def shutdown(self) -> None:
        """End every request and free the device; idempotent."""
        self._in_flight.clear()
        self.scheduler.finish_all(RequestStatus.FINISHED_ABORTED)
        self._outputs.clear()
        if self._constraints is not None:
            self._constraints.shutdown()
        self._runner.shutdown()
        observers, self._observers = self._observers, ()
        for observer in observers:
            observer.engine_ends()
