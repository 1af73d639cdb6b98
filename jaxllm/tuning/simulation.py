"""A workload on an engine that computes nothing, on a clock of its own: scheduler, block pool and prefix cache are the
real ones, and a model of how long steps take stands for the device.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.resolve import CPU_DECODE_STEPS_SEQS, GPU_DECODE_STEPS_SEQS
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.observe.engine_settings import EngineSettings
from jaxllm.engine.request import Request
from jaxllm.engine.scheduling.scheduler import Scheduler
from jaxllm.engine.step import SchedulerOutput, StepOutput
from jaxllm.runner.buckets import make_buckets, pick_bucket
from jaxllm.tuning.step_model import StepModel
from jaxllm.tuning.workload import WorkloadRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fared:
    """How a workload fared, measured or simulated. Times are in seconds."""

    #: from the first arrival to the last token
    seconds: float
    num_requests: int
    output_tokens: int
    #: of each request, from its arrival to its first token; and the mean time between its tokens, where it has several
    ttft: np.ndarray
    itl: np.ndarray
    preemptions: int
    #: prompt tokens, and those of them that the prefix cache had
    prompt_tokens: int
    cached_tokens: int
    #: share of the KV cache in use at the end of each step's decision, and when that was
    kv_cache_usage: np.ndarray
    times: np.ndarray

    @property
    def throughput(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, float]:
        """Numbers by name; "ttft_p50" and its like in seconds."""
        shares = {f"{name}_p{rank}": float(np.percentile(values, rank)) if len(values) else 0.0
                  for name, values in (("ttft", self.ttft), ("itl", self.itl)) for rank in (50, 99)}  # fmt: skip
        return {
            "throughput": self.throughput,
            **shares,
            "seconds": self.seconds,
            "preemptions": self.preemptions,
            "hit_rate": self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0,
            "kv_cache_usage_max": float(self.kv_cache_usage.max(initial=0.0)),
        }


def simulate(
    workload: Sequence[WorkloadRequest], settings: EngineSettings, model: StepModel, *, begins: float = 0.0
) -> Fared:
    """How the workload fares with these settings.

    Args:
        begins: when the engine looks for requests first.

    Raises:
        ValidationError: the settings lack what a scheduler needs, or ask for what is not simulated.
    """
    scheduler_config, cache_config = _configs(settings)
    try:
        scheduler = Scheduler(scheduler_config, cache_config)
    except ValueError as error:
        raise ValidationError(f"no engine has these settings: {error}") from None
    engine = _Engine(scheduler, settings, model, begins)
    for number, each in enumerate(sorted(workload, key=lambda request: request.arrival)):
        engine.expect(number, each)
    engine.run()
    return engine.fared()


class _Engine:
    """The host loop of `engine.core`, on a clock of its own."""

    def __init__(self, scheduler: Scheduler, settings: EngineSettings, model: StepModel, begins: float) -> None:
        self._scheduler, self._model = scheduler, model
        config = scheduler.config
        self._depth = 1 + config.async_scheduling
        self._buckets = make_buckets(config.max_num_batched_tokens, config.max_num_seqs, eager=settings.enforce_eager)
        self._block_size = scheduler.kv_cache_manager.block_size
        self._coming: collections.deque[tuple[float, Request]] = collections.deque()
        self._arrivals: dict[str, float] = {}
        self._firsts: dict[str, float] = {}
        self._lasts: dict[str, float] = {}
        self._requests: list[Request] = []
        self._flight: collections.deque[tuple[SchedulerOutput, float]] = collections.deque()
        self._now = self._device_free = begins
        self._usage: list[tuple[float, float]] = []

    def expect(self, number: int, each: WorkloadRequest) -> None:
        """Have a request come at its time."""
        # hashes name the content; the tokens behind them are each request's own
        tokens = [number] * each.num_prompt_tokens
        # nobody streams, as far as a trace knows
        params = SamplingParams(
            max_tokens=each.num_output_tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        request = Request(str(number), tokens, params, block_hashes=list(each.block_hashes), arrival_time=each.arrival)
        self._coming.append((each.arrival, request))
        self._arrivals[request.request_id] = each.arrival
        self._requests.append(request)

    def run(self) -> None:
        """Until everything has ended."""
        while self._coming or self._scheduler.has_unfinished or self._flight:
            while self._coming and self._coming[0][0] <= self._now:
                self._scheduler.add_request(self._coming.popleft()[1])
            launched = self._launch()
            if self._flight and (not launched or len(self._flight) >= self._depth):
                self._read()
            elif not launched and self._coming:
                self._now = max(self._now, self._coming[0][0])

    def _launch(self) -> bool:
        step = self._scheduler.schedule()
        if not step.rows:
            return False
        usage = self._scheduler.kv_cache_manager.usage
        self._usage.append((self._now, usage))
        self._now += self._model.host_seconds(len(step.rows))
        kv_tokens = self._scheduler.kv_cache_manager.pool.num_used * self._block_size
        seconds = 0.0
        for tokens in step.step_sizes():
            size = pick_bucket(self._buckets, tokens, min(tokens, len(step.rows))).tokens
            seconds += self._model.device_seconds(size, kv_tokens)
        self._device_free = max(self._device_free, self._now) + seconds
        self._flight.append((step, self._device_free))
        return True

    def _read(self) -> None:
        step, done = self._flight.popleft()
        self._now = max(self._now, done)
        counts = [
            wanted and (step.counts[entry] if step.goes_on_alone else 1) for entry, wanted in enumerate(step.wanted)
        ]
        output = StepOutput(token_ids=[0] * sum(counts), counts=counts)
        for request in self._scheduler.update(step, output).requests:
            self._firsts.setdefault(request.request_id, self._now)
            self._lasts[request.request_id] = self._now

    def fared(self) -> Fared:
        """What came of it."""
        stats, manager = self._scheduler.stats(), self._scheduler.kv_cache_manager
        times = [(self._arrivals[name], first, self._lasts[name]) for name, first in self._firsts.items()]
        outputs = {request.request_id: request.num_output_tokens for request in self._requests}
        arrays = np.array(times).reshape(-1, 3).T
        counts = np.array([outputs[name] for name in self._firsts])
        usage = np.array(self._usage).reshape(-1, 2).T
        several = counts > 1
        return Fared(
            seconds=float(arrays[2].max(initial=0.0) - arrays[0].min(initial=np.inf)) if len(times) else 0.0,
            num_requests=len(times),
            output_tokens=int(counts.sum()),
            ttft=arrays[1] - arrays[0],
            itl=(arrays[2] - arrays[1])[several] / (counts[several] - 1),
            preemptions=stats.num_preemptions,
            prompt_tokens=sum(request.num_prompt_tokens for request in self._requests),
            cached_tokens=manager.prefix_cache_stats.hits,
            kv_cache_usage=usage[1],
            times=usage[0],
        )


def _configs(settings: EngineSettings) -> tuple[SchedulerConfig, CacheConfig]:
    needed: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "num_blocks")
    }
    if missing := [name for name, value in needed.items() if value is None]:
        raise ValidationError(f"a simulation needs {', '.join(missing)}: take a trace of jaxllm, which says it.")
    if settings.num_speculative_tokens or settings.pipeline_parallel_size > 1:
        what = "speculative_config" if settings.num_speculative_tokens else "pipeline_parallel_size"
        raise ValidationError(f"{what} is not simulated: take a trace without it.")
    seqs, budget = needed["max_num_seqs"], needed["max_num_batched_tokens"]
    if budget < seqs:
        raise ValidationError(f"max_num_batched_tokens={budget} is less than max_num_seqs={seqs}, as in no engine.")
    most = CPU_DECODE_STEPS_SEQS if settings.platform == "cpu" else GPU_DECODE_STEPS_SEQS
    scheduler = SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=needed["max_model_len"],
        max_num_active_seqs=settings.max_num_active_seqs,
        enable_chunked_prefill=settings.enable_chunked_prefill,
        async_scheduling=settings.async_scheduling,
        num_decode_steps=settings.num_decode_steps,
        max_decode_steps_seqs=min(most, seqs) if settings.num_decode_steps > 1 else 0,
    )
    cache = CacheConfig(
        block_size=needed["block_size"],
        num_blocks=needed["num_blocks"],
        groups=tuple(KVCacheGroup(layers=(0,), sliding_window=window) for window in settings.windows),
        enable_prefix_caching=settings.enable_prefix_caching,
    )
    return scheduler, cache
