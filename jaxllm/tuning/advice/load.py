"""How an engine fared for a while: what advice is made of."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from jaxllm.api.metric import Counter, Gauge, Histogram, Metric, Vector
from jaxllm.config.cache import KVCacheGroup
from jaxllm.config.capacity import blocks_per_request
from jaxllm.engine.observe.engine_settings import EngineSettings

#: names that vLLM has had for a metric before
_EARLIER = {
    "vllm:kv_cache_usage_perc": ("vllm:gpu_cache_usage_perc",),
    "vllm:inter_token_latency_seconds": ("vllm:time_per_output_token_seconds",),
    "vllm:prefix_cache_queries": ("vllm:gpu_prefix_cache_queries",),
    "vllm:prefix_cache_hits": ("vllm:gpu_prefix_cache_hits",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Settings and metrics are always there; steps and requests where a trace was on.

    Of several replicas, counters are sums, and gauges those of the one that has the most.
    """

    settings: EngineSettings
    metrics: tuple[Metric, ...]
    #: `Trace.arrays`; None: there was no trace
    steps: Mapping[str, np.ndarray] | None = None
    #: tokens of each request's prompt and output; None: there was no trace
    lengths: tuple[tuple[int, int], ...] | None = None

    def has(self, name: str) -> bool:
        """Whether there is a metric of this name, or of an earlier one."""
        return bool(self._named(name))

    def count(self, name: str) -> float:
        """A counter's value; 0 where there is none. A scrape without types has old names of counters as gauges."""
        return sum(metric.value for metric in self._named(name) if isinstance(metric, Counter | Gauge))

    def gauge(self, name: str) -> float:
        """A gauge's value; 0 where there is none."""
        return max(self.gauges(name).values(), default=0.0)

    def gauges(self, name: str) -> dict[str, float]:
        """A gauge's value in each engine of each server (Prometheus names these, where it was asked in their place); of
        several under one label, such as reasons or models, their sum.
        """
        found: dict[str, float] = {}
        for metric in self._named(name):
            if isinstance(metric, Gauge) and math.isfinite(metric.value):
                engine = " of ".join(metric.labels[label] for label in ("engine", "instance") if label in metric.labels)
                found[engine] = found.get(engine, 0.0) + metric.value
        return found

    def values(self, name: str) -> list[int]:
        """Of counters in order; [] where there are none."""
        found = [metric.values for metric in self._named(name) if isinstance(metric, Vector)]
        return [sum(column) for column in zip(*found, strict=True)]

    def histogram(self, name: str) -> Histogram | None:
        """None where there is none, or nothing was observed."""
        found = [metric for metric in self._named(name) if isinstance(metric, Histogram) and metric.count]
        if not found:
            return None
        buckets = {bound: sum(each.buckets.get(bound, 0) for each in found) for bound in found[0].buckets}
        total, count = sum(each.sum for each in found), sum(each.count for each in found)
        return Histogram(name, {}, count, total, buckets)

    def at_most(self, name: str, share: float = 1.0) -> float | None:
        """The bound that `share` of a histogram's observations do not exceed; inf where it has none, None where
        nothing was observed.
        """
        found = self.histogram(name)
        if found is None:
            return None
        bounds = (float(bound) for bound, count in found.buckets.items() if count >= share * found.count)
        return min(bounds, default=math.inf)

    def share_above(self, name: str, bound: float) -> float | None:
        """The share of a histogram's observations that certainly exceeded `bound`; None where nothing was observed."""
        found = self.histogram(name)
        if found is None:
            return None
        most = min((count for text, count in found.buckets.items() if float(text) >= bound), default=found.count)
        return 1 - most / found.count

    def _named(self, name: str) -> list[Metric]:
        for each in (name, *_EARLIER.get(name, ())):
            found = [metric for metric in self.metrics if metric.name == each]
            if found:
                return found
        return []

    # What several rules ask.

    @property
    def rows(self) -> int | None:
        """Requests that may run at once."""
        return self.settings.max_num_active_seqs or self.settings.max_num_seqs

    @property
    def usable_blocks(self) -> int | None:
        """Blocks of the KV cache that hold tokens."""
        return None if self.settings.num_blocks is None else self.settings.num_blocks - 1

    def blocks(self, num_tokens: int) -> int:
        """Most blocks that a request of so many tokens holds at once."""
        settings = self.settings
        groups = [KVCacheGroup(layers=(), sliding_window=window) for window in settings.windows]
        chunk = settings.max_num_batched_tokens
        return blocks_per_request(groups, settings.block_size or 16, num_tokens, max_chunk=chunk)

    @functools.cached_property
    def longest(self) -> tuple[int, ...]:
        """Tokens of the requests that could have run at once, the longest first: of all, where there was a trace, else
        as many as there were at once, each as long as any; () where nothing is known of them.
        """
        if self.lengths is not None:
            return tuple(sorted((prompt + output for prompt, output in self.lengths), reverse=True))
        count = int(self.gauge("jaxllm:most_requests"))
        running, waiting = (self.gauges(f"vllm:num_requests_{what}") for what in ("running", "waiting"))
        count = count or int(max((running[each] + waiting.get(each, 0.0) for each in running), default=0.0))
        longest = self.gauge("jaxllm:longest_request")
        if not longest:
            parts = [self.at_most(f"vllm:request_{part}_tokens") for part in ("prompt", "generation")]
            most = self.settings.max_model_len or math.inf
            longest = min(sum(part or 0 for part in parts), most)
        return (int(longest),) * count if 0 < longest < math.inf else ()

    def room(self, share: float = 1.0) -> int:
        """How many of the longest requests fit into this share of the KV cache at once, at least 1."""
        left, count = share * (self.usable_blocks or 0), 0
        for tokens in self.longest:
            left -= self.blocks(tokens)
            if left < 0:
                break
            count += 1
        return max(count, 1)
