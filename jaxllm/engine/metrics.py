"""What the engine counts and measures, under vLLM's names.

Recording is meant for the host loop: one dictionary access per token, the rest per step or per request.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jaxllm.engine.request import RequestStatus

if TYPE_CHECKING:
    from jaxllm.engine.prefix_cache_stats import PrefixCacheStats
    from jaxllm.engine.request import Request
    from jaxllm.engine.scheduler import RequestUpdate, SchedulerStats


@dataclasses.dataclass(frozen=True)
class Metric:
    """One value, or one family of them, at the time of the snapshot."""

    name: str
    labels: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Counter(Metric):
    """Only ever grows."""

    value: int


@dataclasses.dataclass(frozen=True)
class Gauge(Metric):
    """Goes up and down."""

    value: float


@dataclasses.dataclass(frozen=True)
class Vector(Metric):
    """Counters in order, such as one per position of a draft."""

    values: list[int]


@dataclasses.dataclass(frozen=True)
class Histogram(Metric):
    """`buckets`: upper bound (included), as the text of a float -> observations up to it; the last one is "+Inf"."""

    count: int
    sum: float
    buckets: dict[str, int]


# vLLM's bounds; seconds
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# tokens
_STEP = (1, *(2**power for power in range(3, 15)))

#: requests that ran to their end; the others' times and lengths say nothing about the model
_COMPLETED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH)


def one_two_five(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most`; vLLM's bounds for numbers of tokens."""
    series = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    return tuple(itertools.takewhile(lambda bound: bound <= most, series))


class _Observations:
    """A histogram that is being filled."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(float(bound) for bound in bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def histogram(self, name: str, labels: dict[str, str]) -> Histogram:
        cumulative = list(itertools.accumulate(self._counts))
        buckets = dict(zip((*map(str, self._bounds), "+Inf"), cumulative, strict=True))
        return Histogram(name, labels, cumulative[-1], self._sum, buckets)


class EngineMetrics:
    """Counters and histograms of one engine, from its start.

    Every request that gets a token has to be recorded as finished, by `record_updates` or by `record_finished`.

    Args:
        model_name: the label of all metrics.
        max_model_len: tokens; the last bound of the histograms of lengths is at most this.
        cache_info: what `vllm:cache_config_info` says of the cache (block_size, num_gpu_blocks, ...).
    """

    def __init__(
        self, model_name: str, *, max_model_len: int = 1_000_000, cache_info: Mapping[str, Any] | None = None
    ) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._cache_info = {name: str(value) for name, value in (cache_info or {}).items()}
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._finished = {status: 0 for status in RequestStatus if status.is_finished}
        #: when each request that runs got its last token
        self._last_token_ts: dict[str, float] = {}
        lengths = one_two_five(max_model_len)
        self._step_tokens = _Observations(_STEP)
        self._first_token = _Observations(_FIRST_TOKEN)
        self._between_tokens = _Observations(_BETWEEN_TOKENS)
        self._latency = _Observations(_REQUEST)
        self._queue_time = _Observations(_REQUEST)
        self._prompt_lengths = _Observations(lengths)
        self._output_lengths = _Observations(lengths)

    def record_step(self, num_scheduled_tokens: int) -> None:
        """Count a step that was launched."""
        self._step_tokens.add(num_scheduled_tokens)

    def record_updates(self, updates: Iterable[RequestUpdate]) -> None:
        """Count what one step brought, after stop strings have been looked for.

        The time between two tokens of a request is that between the steps that brought them.
        """
        last_token_ts = self._last_token_ts
        # the requests of a step mostly came through the step before as well: few distinct intervals, many requests
        intervals: dict[float, int] = {}
        for update in updates:
            request = update.request
            self._generation_tokens += len(update.new_token_ids)
            now = request.last_token_ts
            before = last_token_ts.get(request.request_id)
            if before is None:
                self._prompt_tokens += request.num_prompt_tokens
                self._first_token.add(now - request.arrival_time)
            else:
                intervals[now - before] = intervals.get(now - before, 0) + 1
            last_token_ts[request.request_id] = now
            if request.is_finished:
                self.record_finished(request)
        for interval, times in intervals.items():
            self._between_tokens.add(interval, times)

    def record_finished(self, request: Request) -> None:
        """Count the end of a request, once. Aborted and failed ones are counted, but not measured."""
        self._last_token_ts.pop(request.request_id, None)
        self._finished[request.status] += 1
        if request.status in _COMPLETED:
            self._latency.add(request.last_token_ts - request.arrival_time)
            self._queue_time.add(request.scheduled_ts - request.queued_ts)
            self._prompt_lengths.add(request.num_prompt_tokens)
            self._output_lengths.add(request.num_output_tokens)

    def snapshot(self, scheduler: SchedulerStats, prefix_cache: PrefixCacheStats) -> list[Metric]:
        """All metrics as they are now; later recording does not change them."""
        gauges: dict[str, float] = {
            "vllm:num_requests_running": scheduler.num_running,
            "vllm:num_requests_waiting": scheduler.num_waiting,
            "vllm:kv_cache_usage_perc": scheduler.kv_cache_usage,
            # of the last 1000 requests; vLLM had it as a gauge before it left the division to Prometheus
            "vllm:gpu_prefix_cache_hit_rate": prefix_cache.hit_rate,
        }
        counters = {
            "vllm:prefix_cache_queries": prefix_cache.queries,
            "vllm:prefix_cache_hits": prefix_cache.hits,
            "vllm:num_preemptions": scheduler.num_preemptions,
            "vllm:prompt_tokens": self._prompt_tokens,
            "vllm:generation_tokens": self._generation_tokens,
        }
        histograms = {
            "vllm:iteration_tokens_total": self._step_tokens,
            "vllm:time_to_first_token_seconds": self._first_token,
            "vllm:inter_token_latency_seconds": self._between_tokens,
            "vllm:e2e_request_latency_seconds": self._latency,
            "vllm:request_queue_time_seconds": self._queue_time,
            "vllm:request_prompt_tokens": self._prompt_lengths,
            "vllm:request_generation_tokens": self._output_lengths,
        }
        metrics: list[Metric] = [Gauge(name, self._with(), value) for name, value in gauges.items()]
        if self._cache_info:
            metrics.append(Gauge("vllm:cache_config_info", self._with(**self._cache_info), 1))
        metrics += [Counter(name, self._with(), value) for name, value in counters.items()]
        metrics += [
            Counter("vllm:request_success", self._with(finished_reason=str(status.finish_reason)), count)
            for status, count in self._finished.items()
        ]
        metrics += [observed.histogram(name, self._with()) for name, observed in histograms.items()]
        return metrics

    def _with(self, **labels: str) -> dict[str, str]:
        return {**self._labels, **labels}
