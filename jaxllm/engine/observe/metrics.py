"""What the engine counts and measures, under vLLM's names.

Recording is meant for the host loop: little per token, the rest per step or per request. Any thread may take a snapshot
meanwhile.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.api.metric import Counter, Gauge, Histogram, Metric, Observations, Vector, one_two_five
from jaxllm.engine.observe.draft_counts import DraftCounts
from jaxllm.engine.request import RequestStatus
from jaxllm.engine.scheduling.stats import SchedulerStats

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.engine.cache.prefix_cache_stats import PrefixCacheStats
    from jaxllm.engine.request import Request
    from jaxllm.engine.scheduling.step_updates import StepUpdates
    from jaxllm.multimodal.processor_cache import ProcessorCache

__all__ = ["Counter", "EngineMetrics", "Gauge", "Histogram", "Metric", "Vector", "one_two_five"]

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

_COUNTS = (1, 2, 5, 10, 20)

#: requests that ran to their end; the others' times and lengths say nothing about the model
_COMPLETED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH, RequestStatus.FINISHED_REPETITION)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A few numbers for those who show them while the engine runs: counters since its start, in tokens, beside the
    scheduler's present state.
    """

    scheduler: SchedulerStats
    #: of requests that have their first token
    prompt_tokens: int
    #: those of them that the prefix cache had
    prompt_tokens_cached: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    #: of the most recent 1000 requests, in [0, 1]
    prefix_cache_hit_rate: float
    #: of what the prefix cache did not have, and the host's pool of blocks had; None: there is no such pool
    external_hit_rate: float | None = None
    #: steps of a request that had drafts, their drafts, and those of them that were right
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


def total_stats(parts: Sequence[EngineStats]) -> EngineStats:
    """Of several engines together; shares of the cache are means of theirs."""
    schedulers = [part.scheduler for part in parts]
    asked = sum(part.prefix_cache_queries for part in parts)
    hits = sum(part.prefix_cache_hit_rate * part.prefix_cache_queries for part in parts)
    usages = [one.host_cache_usage for one in schedulers if one.host_cache_usage is not None]
    encoders = [one.encoder_cache_usage for one in schedulers if one.encoder_cache_usage is not None]
    rates = [part.external_hit_rate for part in parts if part.external_hit_rate is not None]
    return EngineStats(
        scheduler=SchedulerStats(
            num_running=sum(one.num_running for one in schedulers),
            num_waiting=sum(one.num_waiting for one in schedulers),
            num_preemptions=sum(one.num_preemptions for one in schedulers),
            num_preempted_tokens=sum(one.num_preempted_tokens for one in schedulers),
            kv_cache_usage=sum(one.kv_cache_usage for one in schedulers) / len(parts),
            host_cache_usage=sum(usages) / len(usages) if usages else None,
            num_stores_skipped=sum(one.num_stores_skipped for one in schedulers),
            encoder_cache_usage=sum(encoders) / len(encoders) if encoders else None,
            encoder_cache_queries=sum(one.encoder_cache_queries for one in schedulers),
            encoder_cache_hits=sum(one.encoder_cache_hits for one in schedulers),
        ),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        prompt_tokens_cached=sum(part.prompt_tokens_cached for part in parts),
        generation_tokens=sum(part.generation_tokens for part in parts),
        prefix_cache_queries=asked,
        prefix_cache_hits=sum(part.prefix_cache_hits for part in parts),
        prefix_cache_hit_rate=hits / asked if asked else 0.0,
        external_hit_rate=sum(rates) / len(rates) if rates else None,
        num_drafts=sum(part.num_drafts for part in parts),
        num_draft_tokens=sum(part.num_draft_tokens for part in parts),
        num_accepted_tokens=sum(part.num_accepted_tokens for part in parts),
    )


class EngineMetrics:
    """Counters and histograms of one engine, from its start.

    Args:
        model_name: a label of all metrics.
        max_model_len: tokens; the last bound of the histograms of lengths is at most this.
        engine: the number of this one among several.
        cache_info: what `vllm:cache_config_info` says of the cache (block_size, num_gpu_blocks, ...).
        expert_layers: the layers that have experts, where their load is counted.
        num_drafts: most drafts of a step.
        processor_cache: of prepared pictures; None: there are none, or another one counts.
    """

    def __init__(
        self,
        model_name: str,
        *,
        max_model_len: int = 1_000_000,
        engine: int = 0,
        cache_info: Mapping[str, Any] | None = None,
        expert_layers: Sequence[int] = (),
        num_drafts: int = 0,
        processor_cache: ProcessorCache | None = None,
    ) -> None:
        #: of every metric
        self.labels = {"model_name": model_name, "engine": str(engine)}
        self._processor_cache = processor_cache
        self._cache_info = {name: str(value) for name, value in (cache_info or {}).items()}
        self._expert_layers = tuple(expert_layers)
        #: [layers with experts, experts]; None: nothing has been counted
        self._expert_load: np.ndarray | None = None
        #: held while numbers that belong together change, and while they are read
        self._lock = threading.Lock()
        self._prompt_tokens = 0
        self._prompt_tokens_cached = 0
        self._prompt_tokens_external = 0
        self._generation_tokens = 0
        self._finished = {status: 0 for status in RequestStatus if status.is_finished}
        self._rejections: dict[str, int] = {}
        self._drafts = DraftCounts(num_drafts)
        lengths = one_two_five(max_model_len)
        self._step_tokens = Observations(_STEP)
        self._first_token = Observations(_FIRST_TOKEN)
        self._between_tokens = Observations(_BETWEEN_TOKENS)
        self._time_per_output_token = Observations(_BETWEEN_TOKENS)
        self._latency = Observations(_REQUEST)
        self._queue_time = Observations(_REQUEST)
        self._inference_time = Observations(_REQUEST)
        self._prefill_time = Observations(_REQUEST)
        self._decode_time = Observations(_REQUEST)
        self._prompt_lengths = Observations(lengths)
        self._output_lengths = Observations(lengths)
        self._longest_outputs = Observations(lengths)
        self._computed_lengths = Observations(lengths)
        self._max_tokens = Observations(lengths)
        self._n = Observations(_COUNTS)
        self._preemptions = Observations((0, *_COUNTS))

    def record_step(self, num_scheduled_tokens: int) -> None:
        """Count a step that was launched."""
        with self._lock:
            self._step_tokens.add(num_scheduled_tokens)

    def record_updates(self, updates: StepUpdates) -> None:
        """Count what one step brought, after stop strings have been looked for.

        The time between two tokens of a request is that between the steps that brought them; the tokens of one launch
        share it.
        """
        num_tokens = 0
        # neighbours mostly came through the step before as well: runs of one interval
        run, run_length = 0.0, 0
        with self._lock:
            for request, count in zip(updates.requests, updates.counts, strict=True):
                if not count:  # it ended where its token should have come
                    continue
                num_tokens += count
                now, before = request.last_token_ts, request.recorded_ts
                request.recorded_ts = now
                if before:
                    interval = (now - before) / count
                    if interval != run:
                        self._between_tokens.add(run, run_length)
                        run, run_length = interval, 0
                    run_length += count
                else:
                    self._prompt_tokens += request.num_prompt_tokens
                    self._prompt_tokens_cached += _num_cached(request)
                    self._prompt_tokens_external += request.num_external_tokens
                    self._first_token.add(now - request.arrival_time)
            self._between_tokens.add(run, run_length)
            self._generation_tokens += num_tokens
            for request in updates.ended:
                self._finish(request)

    def record_finished(self, request: Request) -> None:
        """Count the end of a request, once. Aborted and failed ones are counted, but not measured."""
        with self._lock:
            self._finish(request)

    def record_expert_load(self, load: np.ndarray) -> None:
        """Count the tokens that each expert got in one step, i32 [layers with experts, experts]."""
        with self._lock:
            before = 0 if self._expert_load is None else self._expert_load
            self._expert_load = before + load.astype("int64")

    def record_drafts(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """Count what one launch drafted, as `DraftCounts.add`."""
        with self._lock:
            self._drafts.add(drafted, accepted)

    def record_rejection(self, reason: str) -> None:
        """Count a request that was refused before it became one of the engine's."""
        with self._lock:
            self._rejections[reason] = self._rejections.get(reason, 0) + 1

    def record_completed_prompt(self, n: int, longest_output: int) -> None:
        """Count a prompt all of whose `n` > 1 completions have ended, `longest_output` tokens the longest of them."""
        with self._lock:
            self._n.add(n)
            self._longest_outputs.add(longest_output)

    def _finish(self, request: Request) -> None:
        self._finished[request.status] += 1
        if request.status not in _COMPLETED:
            return
        first, last, outputs = request.first_token_ts, request.last_token_ts, request.num_output_tokens
        self._latency.add(last - request.arrival_time)
        self._queue_time.add(request.scheduled_ts - request.queued_ts)
        self._inference_time.add(last - request.scheduled_ts)
        self._prefill_time.add(first - request.scheduled_ts)
        self._decode_time.add(last - first)
        self._time_per_output_token.add((last - first) / (outputs - 1) if outputs > 1 else 0.0)
        self._prompt_lengths.add(request.num_prompt_tokens)
        self._output_lengths.add(outputs)
        self._computed_lengths.add(request.num_prompt_tokens - _num_cached(request))
        self._preemptions.add(request.num_preemptions)
        if not request.pools and request.params.max_tokens is not None:
            self._max_tokens.add(request.params.max_tokens)
        if not request.is_child:
            self._n.add(1)
            self._longest_outputs.add(outputs)

    def stats(
        self, scheduler: SchedulerStats, prefix_cache: PrefixCacheStats, external: PrefixCacheStats
    ) -> EngineStats:
        """The few numbers that are shown while the engine runs."""
        with self._lock:
            return EngineStats(
                scheduler=scheduler,
                prompt_tokens=self._prompt_tokens,
                prompt_tokens_cached=self._prompt_tokens_cached,
                generation_tokens=self._generation_tokens,
                prefix_cache_hits=prefix_cache.hits,
                prefix_cache_queries=prefix_cache.queries,
                prefix_cache_hit_rate=prefix_cache.hit_rate,
                external_hit_rate=None if scheduler.host_cache_usage is None else external.hit_rate,
                num_drafts=self._drafts.num_drafts,
                num_draft_tokens=self._drafts.num_draft_tokens,
                num_accepted_tokens=self._drafts.num_accepted_tokens,
            )

    def snapshot(
        self, scheduler: SchedulerStats, prefix_cache: PrefixCacheStats, external: PrefixCacheStats
    ) -> list[Metric]:
        """All metrics as they are now; later recording does not change them. Safe from any thread.

        Args:
            external: of the host's pool of blocks.
        """
        with self._lock:
            counters = self._counters(scheduler, prefix_cache, external)
            return self._gauges(scheduler, prefix_cache) + counters + self._histograms()

    def _gauges(self, scheduler: SchedulerStats, prefix_cache: PrefixCacheStats) -> list[Metric]:
        values: dict[str, float] = {
            "vllm:num_requests_running": scheduler.num_running,
            "vllm:num_requests_waiting": scheduler.num_waiting,
            "vllm:kv_cache_usage_perc": scheduler.kv_cache_usage,
            # vLLM's name for it until 0.9
            "vllm:gpu_cache_usage_perc": scheduler.kv_cache_usage,
            # of the last 1000 requests; vLLM had it as a gauge before it left the division to Prometheus
            "vllm:gpu_prefix_cache_hit_rate": prefix_cache.hit_rate,
        }
        if scheduler.host_cache_usage is not None:
            values["vllm:kv_offload_cpu_cache_usage_perc"] = scheduler.host_cache_usage
        if scheduler.encoder_cache_usage is not None:
            values["jaxllm:encoder_cache_usage_perc"] = scheduler.encoder_cache_usage
        metrics: list[Metric] = [Gauge(name, self._with(), value) for name, value in values.items()]
        # whatever waits, waits for a row, blocks or the step's budget
        metrics += [
            Gauge("vllm:num_requests_waiting_by_reason", self._with(reason=reason), value)
            for reason, value in (("capacity", scheduler.num_waiting), ("deferred", 0))
        ]
        if self._cache_info:
            metrics.append(Gauge("vllm:cache_config_info", self._with(**self._cache_info), 1))
        return metrics

    def _counters(
        self, scheduler: SchedulerStats, prefix_cache: PrefixCacheStats, external: PrefixCacheStats
    ) -> list[Metric]:
        # before the queries, which are counted first: another thread never sees more hits than queries
        hits, external_hits = prefix_cache.hits, external.hits
        values = {
            "vllm:prefix_cache_queries": prefix_cache.queries,
            "vllm:prefix_cache_hits": hits,
            "vllm:external_prefix_cache_queries": external.queries,
            "vllm:external_prefix_cache_hits": external_hits,
            "vllm:num_preemptions": scheduler.num_preemptions,
            "jaxllm:preempted_tokens": scheduler.num_preempted_tokens,
            "vllm:prompt_tokens": self._prompt_tokens,
            "vllm:prompt_tokens_cached": self._prompt_tokens_cached,
            "vllm:generation_tokens": self._generation_tokens,
        }
        if scheduler.host_cache_usage is not None:
            values["vllm:kv_offload_stores_skipped"] = scheduler.num_stores_skipped
        if scheduler.encoder_cache_usage is not None:
            values["jaxllm:encoder_cache_hits"] = scheduler.encoder_cache_hits
            values["jaxllm:encoder_cache_queries"] = scheduler.encoder_cache_queries
        if self._processor_cache is not None:
            values["vllm:mm_cache_hits"] = self._processor_cache.num_hits
            values["vllm:mm_cache_queries"] = self._processor_cache.num_queries
        by_source = {
            "local_compute": self._prompt_tokens - self._prompt_tokens_cached,
            "local_cache_hit": self._prompt_tokens_cached - self._prompt_tokens_external,
            "external_kv_transfer": self._prompt_tokens_external,
        }
        metrics: list[Metric] = [Counter(name, self._with(), value) for name, value in values.items()]
        metrics += [
            Counter("vllm:prompt_tokens_by_source", self._with(source=source), value)
            for source, value in by_source.items()
        ]
        metrics += [
            Counter("vllm:request_success", self._with(finished_reason=str(status.finish_reason)), count)
            for status, count in self._finished.items()
        ]
        metrics += [
            Counter("vllm:admission_rejections", self._with(reason=reason), count)
            for reason, count in self._rejections.items()
        ]
        metrics += self._drafts.metrics(self.labels)
        if self._expert_load is not None:
            metrics += [
                Counter("jaxllm:expert_tokens", self._with(layer=str(layer), expert=str(expert)), count)
                for layer, counts in zip(self._expert_layers, self._expert_load.tolist(), strict=True)
                for expert, count in enumerate(counts)
            ]
        return metrics

    def _histograms(self) -> list[Metric]:
        observed = {
            "vllm:iteration_tokens_total": self._step_tokens,
            "vllm:time_to_first_token_seconds": self._first_token,
            "vllm:inter_token_latency_seconds": self._between_tokens,
            # vLLM's name for it until 0.10
            "vllm:time_per_output_token_seconds": self._between_tokens,
            "vllm:request_time_per_output_token_seconds": self._time_per_output_token,
            "vllm:e2e_request_latency_seconds": self._latency,
            "vllm:request_queue_time_seconds": self._queue_time,
            "vllm:request_inference_time_seconds": self._inference_time,
            "vllm:request_prefill_time_seconds": self._prefill_time,
            "vllm:request_decode_time_seconds": self._decode_time,
            "vllm:request_prompt_tokens": self._prompt_lengths,
            "vllm:request_generation_tokens": self._output_lengths,
            "vllm:request_max_num_generation_tokens": self._longest_outputs,
            "vllm:request_prefill_kv_computed_tokens": self._computed_lengths,
            "vllm:request_params_max_tokens": self._max_tokens,
            "vllm:request_params_n": self._n,
            "vllm:request_num_preemptions": self._preemptions,
        }
        return [observations.histogram(name, self._with()) for name, observations in observed.items()]

    def adapters(self, max_loras: int, waiting: Iterable[str], running: Iterable[str]) -> Metric:
        """vLLM's gauge of adapters, which tells in its labels: those that requests wait and run with, by name. Its
        value is the time, in seconds since 1970.
        """
        names = {"waiting_lora_adapters": waiting, "running_lora_adapters": running}
        told = {label: ",".join(sorted(each)) for label, each in names.items()}
        return Gauge("vllm:lora_requests_info", self._with(max_lora=str(max_loras), **told), time.time())

    def _with(self, **labels: str) -> dict[str, str]:
        return {**self.labels, **labels}


def _num_cached(request: Request) -> int:
    """Prompt tokens that the prefix cache had; -1 stands for a request that was never admitted."""
    return max(request.num_cached_tokens, 0)
