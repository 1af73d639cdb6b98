"""An engine's metrics for Prometheus. Nothing is registered globally, and nothing is counted twice: every scrape takes
a snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from jaxllm.api.errors import ValidationError
from jaxllm.api.metric import Counter, Gauge, Histogram, Metric, Vector

if TYPE_CHECKING:
    from prometheus_client.core import Metric as MetricFamily

HELP = {
    "vllm:num_requests_running": "Requests that run.",
    "vllm:num_requests_waiting": "Requests that wait.",
    "vllm:num_requests_waiting_by_reason": "Requests that wait, by what they wait for.",
    "vllm:kv_cache_usage_perc": "Share of the KV cache in use, in [0, 1].",
    "vllm:gpu_cache_usage_perc": "The old name of vllm:kv_cache_usage_perc.",
    "vllm:gpu_prefix_cache_hit_rate": "Share of the last 1000 requests' tokens that the prefix cache had, in [0, 1].",
    "vllm:cache_config_info": "The cache's configuration, in labels.",
    "vllm:lora_requests_info": "The time; in labels, the adapters that requests wait and run with.",
    "vllm:prefix_cache_queries": "Tokens that the prefix cache was asked for.",
    "vllm:prefix_cache_hits": "Tokens of these that it had.",
    "vllm:external_prefix_cache_queries": "Tokens that the prefix cache lacks, and the host was asked for.",
    "vllm:external_prefix_cache_hits": "Tokens of these that the host had.",
    "vllm:kv_offload_cpu_cache_usage_perc": "Share of the host's blocks that have contents, in [0, 1].",
    "vllm:kv_offload_stores_skipped": "Evicted blocks for which the host had no room.",
    "vllm:num_preemptions": "Preemptions.",
    "vllm:prompt_tokens": "Prompt tokens of requests that have their first token.",
    "vllm:prompt_tokens_cached": "Prompt tokens of these that the prefix cache had.",
    "vllm:prompt_tokens_by_source": "Prompt tokens, by where their keys and values came from.",
    "vllm:generation_tokens": "Tokens generated.",
    "vllm:spec_decode_num_drafts": "Checks of drafts.",
    "vllm:spec_decode_num_draft_tokens": "Drafts that were checked.",
    "vllm:spec_decode_num_accepted_tokens": "Drafts of these that were right.",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "Right drafts, by their place.",
    "vllm:request_success": "Finished requests, by how they ended.",
    "vllm:admission_rejections": "Requests that were refused, by why.",
    "jaxllm:preempted_tokens": "Computed tokens that preemptions gave up.",
    "jaxllm:steps": "Steps.",
    "jaxllm:steps_full": "Steps that used up max_num_batched_tokens.",
    "jaxllm:steps_without_row": "Steps while requests waited for a row, and less than half of the KV cache was in use.",
    "jaxllm:steps_starved": "Steps with free rows, while prompts were being tokenized.",
    "jaxllm:steps_encoder_full": "Steps in which a prompt ended in front of a picture that had to wait.",
    "jaxllm:step_tokens": "Tokens of the steps that are padded to a program's size.",
    "jaxllm:step_bucket_tokens": "Tokens that the programs of these steps have room for.",
    "jaxllm:host_seconds": "Seconds in which the host worked.",
    "jaxllm:device_wait_seconds": "Seconds in which the host waited for the device.",
    "jaxllm:tokenizer_wait_seconds": "Seconds in which nothing ran, since no prompt was tokenized yet.",
    "jaxllm:most_requests": "Most requests that ran and waited at once.",
    "jaxllm:most_running": "Most requests that ran at once.",
    "jaxllm:longest_request": "Tokens of the longest request that has ended.",
    "jaxllm:most_encoder_tokens": "Most vectors of pictures that would have been in use, had there been room.",
    "jaxllm:prefix_cache_evicted": "Tokens that the prefix cache would have had, had it evicted nothing.",
    "jaxllm:prefix_cache_missing_blocks": "Blocks with which it would have had them.",
    "jaxllm:prefix_cache_salted": "Tokens that it had under another cache_salt.",
    "jaxllm:prefix_cache_salted_requests": "Requests that this befell.",
    "vllm:mm_cache_queries": "Images and videos of prompts.",
    "vllm:mm_cache_hits": "Those of them that were prepared already.",
    "jaxllm:encoder_cache_usage_perc": "Share of the encoder's cache that running requests use, in [0, 1].",
    "jaxllm:encoder_cache_queries": "Images and frames whose vectors chunks needed.",
    "jaxllm:encoder_cache_hits": "Those of them that were on the device already.",
    "jaxllm:expert_tokens": "Tokens that each expert of each layer got (record_expert_load).",
    "vllm:iteration_tokens_total": "Tokens a step.",
    "vllm:time_to_first_token_seconds": "From a request's arrival to its first token.",
    "vllm:inter_token_latency_seconds": "Between two tokens of a request.",
    "vllm:time_per_output_token_seconds": "The old name of vllm:inter_token_latency_seconds.",
    "vllm:request_time_per_output_token_seconds": "Mean time a token after the first, of a request.",
    "vllm:e2e_request_latency_seconds": "From a request's arrival to its last token.",
    "vllm:request_queue_time_seconds": "Time that a request waited before it first ran.",
    "vllm:request_inference_time_seconds": "From a request's first step to its last token.",
    "vllm:request_prefill_time_seconds": "From a request's first step to its first token.",
    "vllm:request_decode_time_seconds": "From a request's first token to its last one.",
    "vllm:request_prompt_tokens": "Prompt tokens a request.",
    "vllm:request_generation_tokens": "Generated tokens a request.",
    "vllm:request_max_num_generation_tokens": "Generated tokens of a prompt's longest completion.",
    "vllm:request_prefill_kv_computed_tokens": "Prompt tokens of a request that the prefix cache did not have.",
    "vllm:request_params_max_tokens": "max_tokens of a request.",
    "vllm:request_params_n": "n of a prompt.",
    "vllm:request_num_preemptions": "Preemptions of a request.",
}

#: of a vector's counters; vLLM's label of a draft's places, the only vector that there is
_PLACE = "position"
_FAMILIES = {
    Counter: CounterMetricFamily,
    Vector: CounterMetricFamily,
    Gauge: GaugeMetricFamily,
    Histogram: HistogramMetricFamily,
}


def families(metrics: Iterable[Metric]) -> list[MetricFamily]:
    """Prometheus' families of a snapshot, counters with the suffix ``_total``, those of a vector by their place."""
    made: dict[str, MetricFamily] = {}
    for metric in metrics:
        labels = list(metric.labels)
        family = made.get(metric.name)
        if family is None:
            kind = _FAMILIES[type(metric)]
            labels += [_PLACE] if isinstance(metric, Vector) else []
            family = made[metric.name] = kind(metric.name, HELP.get(metric.name, metric.name), labels=labels)
        values = list(metric.labels.values())
        if isinstance(metric, Histogram) and isinstance(family, HistogramMetricFamily):
            family.add_metric(values, list(metric.buckets.items()), metric.sum)
        elif isinstance(metric, Vector) and isinstance(family, CounterMetricFamily):
            for place, value in enumerate(metric.values):
                family.add_metric([*values, str(place)], value)
        elif isinstance(metric, (Counter, Gauge)) and isinstance(family, (CounterMetricFamily, GaugeMetricFamily)):
            family.add_metric(values, metric.value)
    return list(made.values())


class MetricsCollector(Collector):
    """Asks `snapshot` at every scrape; from the scraping thread, while the engine runs."""

    def __init__(self, snapshot: Callable[[], list[Metric]]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[MetricFamily]:
        return families(self._snapshot())


def metrics_registry(snapshot: Callable[[], list[Metric]]) -> CollectorRegistry:
    """A registry of its own, with the metrics that `snapshot` gives."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(MetricsCollector(snapshot))
    return registry


class MetricsServer:
    """``http://address:port/metrics``, answered by a thread, until `close`.

    Args:
        port: 0 takes a free one; the attribute `port` says which.
        address: of the interface; the default is reached from this machine alone.

    Raises:
        ValidationError: the port is taken, or is none.
    """

    def __init__(self, registry: CollectorRegistry, port: int, address: str = "127.0.0.1") -> None:
        self.address = address
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except (OSError, OverflowError) as error:
            raise ValidationError(
                f"metrics cannot be served on {address}:{port} ({error}). Another port may be free; 0 takes any."
            ) from error
        self.port: int = self._server.server_port

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}/metrics"

    def close(self) -> None:
        """Free the port; idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
