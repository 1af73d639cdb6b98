"""A workload on an engine that computes nothing, on a clock of its own: scheduler, block pool and prefix cache are the
real ones, and step times stand for the device.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.config.cache import CacheConfig
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.observe.engine_settings import EngineSettings
from jaxllm.engine.observe.step_shape import StepShape
from jaxllm.engine.request import Request
from jaxllm.engine.scheduling.scheduler import Scheduler
from jaxllm.engine.step import SchedulerOutput, StepOutput
from jaxllm.runner.buckets import make_buckets, pick_bucket
from jaxllm.tuning.simulation.settings import configs
from jaxllm.tuning.simulation.simulated_run import SimulatedRun
from jaxllm.tuning.simulation.step_times import StepTimes
from jaxllm.tuning.simulation.workload import Workload


def simulate(workload: Workload, arguments: EngineSettings, step_times: StepTimes) -> SimulatedRun:
    """How a workload fares.

    Args:
        arguments: the engine's, and what follows from them (`settings.changed` has others).
        step_times: of the engine's programs on its device.

    Raises:
        ValidationError: the arguments lack what a scheduler needs, ask for what is not simulated, or a request of the
            workload can never run with them.
    """
    scheduler_config, cache_config = checked(workload, arguments)
    try:
        scheduler = Scheduler(scheduler_config, cache_config, warns=False)
    except ValueError as error:
        raise ValidationError(f"no engine has these settings: {error}") from None
    engine = _Engine(scheduler, arguments, step_times, workload)
    engine.run()
    return engine.result()


def checked(workload: Workload, arguments: EngineSettings) -> tuple[SchedulerConfig, CacheConfig]:
    """The configs of an engine that serves every request of the workload.

    Raises:
        ValidationError: the arguments lack what a scheduler needs, ask for what is not simulated, or cut requests off.
    """
    found = configs(arguments)
    if workload.longest > found[0].max_model_len:
        raise ValidationError(
            f"max_model_len={found[0].max_model_len} cuts off the longest request, which has {workload.longest} "
            "tokens: set it to at least that."
        )
    return found


class _Engine:
    """The host loop of `engine.core`, on a clock of its own."""

    def __init__(
        self, scheduler: Scheduler, arguments: EngineSettings, step_times: StepTimes, workload: Workload
    ) -> None:
        self._scheduler, self._times = scheduler, step_times
        config = scheduler.config
        self._depth = 1 + config.async_scheduling
        self._buckets = make_buckets(
            config.max_num_batched_tokens,
            config.max_num_seqs,
            eager=arguments.enforce_eager,
            # where attention is a kernel of ours
            decode_only=arguments.platform not in (None, "cpu"),
            four_rows=arguments.has_four_rows,
        )
        #: (tokens, requests) of a step -> tokens of its program
        self._sizes: dict[tuple[int, int], int] = {}
        self._workload = workload
        self._requests: list[Request] = []
        self._coming: collections.deque[Request] = collections.deque()
        self._expect(arguments)
        #: when outputs came, and of which requests, by their number
        self._got: list[tuple[float, list[int]]] = []
        self._flight: collections.deque[tuple[SchedulerOutput, float]] = collections.deque()
        self._now = self._device_free = workload.begins
        self._seen: list[tuple[float, float, int, int]] = []

    def _expect(self, arguments: EngineSettings) -> None:
        """Have the requests come at their times."""
        hashes: list[tuple[bytes, ...]] = [()] * len(self._workload)
        if arguments.enable_prefix_caching and arguments.block_size:
            hashes = self._workload.block_hashes(arguments.block_size)
        for number, (each, own) in enumerate(zip(self._workload.requests, hashes, strict=True)):
            # nobody streams, as far as a workload says
            params = SamplingParams(
                max_tokens=each.num_output_tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
            )
            # hashes name the content; the tokens behind them are each request's own
            tokens = [number] * each.num_prompt_tokens
            request = Request(str(number), tokens, params, block_hashes=list(own), arrival_time=each.arrival)
            self._requests.append(request)
            self._coming.append(request)

    def run(self) -> None:
        """Until everything has ended."""
        coming, flight, scheduler = self._coming, self._flight, self._scheduler
        limit = self._workload.max_concurrency or len(self._workload)
        while coming or flight or scheduler.has_unfinished:
            while coming and coming[0].arrival_time <= self._now:
                if len(scheduler.running) + len(scheduler.waiting) >= limit:
                    break
                if self._workload.max_concurrency:
                    coming[0].arrival_time = self._now
                scheduler.add_request(coming.popleft())
            launched = self._launch()
            if flight and (not launched or len(flight) >= self._depth):
                self._read()
            elif not launched and coming:
                self._now = max(self._now, coming[0].arrival_time)

    def _launch(self) -> bool:
        step = self._scheduler.schedule()
        rows = len(step.rows)
        if not rows:
            return False
        scheduler = self._scheduler
        usage = scheduler.kv_cache_manager.usage
        self._seen.append((self._now, usage, len(scheduler.running), len(scheduler.waiting)))
        self._now += self._times.host_seconds(rows)
        tokens = rows if step.num_steps > 1 else sum(step.counts)
        seconds = self._times.device_seconds(StepShape.of(step, self._size(tokens, rows)))
        self._device_free = max(self._device_free, self._now) + seconds
        self._flight.append((step, self._device_free))
        return True

    def _size(self, tokens: int, rows: int) -> int:
        rows = min(tokens, rows)
        found = self._sizes.get((tokens, rows))
        if found is None:
            found = self._sizes[tokens, rows] = pick_bucket(self._buckets, tokens, rows).tokens
        return found

    def _read(self) -> None:
        step, done = self._flight.popleft()
        self._now = now = max(self._now, done)
        if step.goes_on_alone:
            counts = list(step.counts)
        else:
            counts = [int(wanted > 0) for wanted in step.wanted]
        updates = self._scheduler.update(step, StepOutput(token_ids=[0] * sum(counts), counts=counts))
        self._got.append((now, [request.arrival_order for request in updates.requests]))

    def result(self) -> SimulatedRun:
        """What came of it."""
        count = len(self._workload)
        numbers = np.concatenate([np.array(got, int) for _, got in self._got])
        moments = np.repeat([now for now, _ in self._got], [len(got) for _, got in self._got])
        # of each request, its moments in order
        order = np.argsort(numbers, kind="stable")
        numbers, moments = numbers[order], moments[order]
        starts = np.searchsorted(numbers, np.arange(count + 1))
        done = np.flatnonzero(np.diff(starts))
        same = np.diff(numbers) == 0
        seen: Any = np.array(self._seen).reshape(-1, 4).T
        return SimulatedRun(
            arrivals=np.array([self._requests[number].arrival_time for number in done]),
            firsts=moments[starts[:-1][done]],
            lasts=moments[starts[1:][done] - 1],
            prompt_lengths=np.array([self._requests[number].num_prompt_tokens for number in done], int),
            output_lengths=np.array([self._requests[number].num_output_tokens for number in done], int),
            itl=np.diff(moments)[same],
            preemptions=self._scheduler.stats().num_preemptions,
            cached_tokens=self._scheduler.kv_cache_manager.prefix_cache_stats.hits,
            times=seen[0],
            kv_cache_usage=seen[1],
            num_running=seen[2].astype(int),
            num_waiting=seen[3].astype(int),
        )
