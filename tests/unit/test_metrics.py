"""Counters and histograms against numbers worked out by hand, and against counting one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.api.sampling_params import SamplingParams
from jaxllm.engine.cache.prefix_cache_stats import PrefixCacheStats
from jaxllm.engine.observe.metrics import Counter, EngineMetrics, Gauge, Histogram, Metric, one_two_five
from jaxllm.engine.request import Request, RequestStatus
from jaxllm.engine.scheduling.stats import SchedulerStats
from jaxllm.engine.scheduling.step_updates import StepUpdates

IDLE = SchedulerStats(num_running=0, num_waiting=0, num_preemptions=0, num_preempted_tokens=0, kv_cache_usage=0.0)


def arrived(request_id: str, num_prompt_tokens: int, *, at: float, scheduled: float) -> Request:
    request = Request(request_id, [1] * num_prompt_tokens, SamplingParams(), arrival_time=at)
    request.queued_ts = at + 0.125
    request.scheduled_ts = scheduled
    return request


def got_token(request: Request, *, at: float, status: RequestStatus = RequestStatus.RUNNING) -> Request:
    request.all_token_ids.append(7)
    request.last_token_ts = at
    request.first_token_ts = request.first_token_ts or at
    request.status = status
    return request


def step(*requests: Request) -> StepUpdates:
    """One that brought each of them a token."""
    ended = [request for request in requests if request.is_finished]
    return StepUpdates(list(requests), [1] * len(requests), list(range(len(requests))), ended)


def snapshot(metrics: EngineMetrics) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics.snapshot(IDLE, PrefixCacheStats(), PrefixCacheStats())}


def histogram(metrics: EngineMetrics, name: str) -> Histogram:
    found = snapshot(metrics)[name]
    assert isinstance(found, Histogram)
    return found


def counter(metrics: EngineMetrics, name: str) -> int:
    found = snapshot(metrics)[name]
    assert isinstance(found, Counter)
    return found.value


def steps(histogram: Histogram) -> dict[str, int]:
    """The buckets in which the count grows, and by how much."""
    counts = list(histogram.buckets.items())
    before = [0, *histogram.buckets.values()]
    return {bound: count - last for (bound, count), last in zip(counts, before, strict=False) if count != last}


def labelled(metrics: EngineMetrics, name: str, label: str) -> dict[str, int]:
    return {
        metric.labels[label]: metric.value
        for metric in metrics.snapshot(IDLE, PrefixCacheStats(), PrefixCacheStats())
        if isinstance(metric, Counter) and metric.name == name
    }


def successes(metrics: EngineMetrics) -> dict[str, int]:
    return labelled(metrics, "vllm:request_success", "finished_reason")


def two_requests() -> EngineMetrics:
    """a: 12 prompt tokens, arrives at 100, tokens at 100.5, 100.75, 101.5. b: 3 tokens, at 100.25, token at 101.5."""
    metrics = EngineMetrics("tiny", max_model_len=64)
    a = arrived("a", 12, at=100.0, scheduled=100.25)
    b = arrived("b", 3, at=100.25, scheduled=101.0)
    a.num_cached_tokens, b.num_preemptions = 8, 2
    a.params.max_tokens = 20
    metrics.record_step(15)
    metrics.record_updates(step(got_token(a, at=100.5)))
    metrics.record_step(1)
    metrics.record_updates(step(got_token(a, at=100.75)))
    metrics.record_step(4)
    stopped, length = RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH
    metrics.record_updates(step(got_token(a, at=101.5, status=stopped), got_token(b, at=101.5, status=length)))
    return metrics


def test_tokens_and_ends_are_counted():
    metrics = two_requests()
    assert counter(metrics, "vllm:prompt_tokens") == 15
    assert counter(metrics, "vllm:prompt_tokens_cached") == 8
    assert counter(metrics, "vllm:generation_tokens") == 4
    assert labelled(metrics, "vllm:prompt_tokens_by_source", "source") == {
        "local_compute": 7,
        "local_cache_hit": 8,
        "external_kv_transfer": 0,
    }
    assert successes(metrics) == {"stop": 1, "length": 1, "abort": 0, "error": 0, "repetition": 0}


@pytest.mark.parametrize(
    ("name", "total", "buckets"),
    [
        # a 0.5 s, b 1.25 s after their arrivals
        ("vllm:time_to_first_token_seconds", 1.75, {"0.5": 1, "2.5": 1}),
        # a: 0.25 s and 0.75 s
        ("vllm:inter_token_latency_seconds", 1.0, {"0.3": 1, "0.75": 1}),
        # a 1.5 s, b 1.25 s
        ("vllm:e2e_request_latency_seconds", 2.75, {"1.5": 2}),
        # a from 100.125 to 100.25, b from 100.375 to 101
        ("vllm:request_queue_time_seconds", 0.75, {"0.3": 1, "0.8": 1}),
        # a from 100.25 to 100.5 to 101.5, b from 101 to 101.5 and no further
        ("vllm:request_prefill_time_seconds", 0.75, {"0.3": 1, "0.5": 1}),
        ("vllm:request_decode_time_seconds", 1.0, {"0.3": 1, "1.0": 1}),
        ("vllm:request_inference_time_seconds", 1.75, {"0.5": 1, "1.5": 1}),
        # a: two tokens in 1 s after the first; b has only one
        ("vllm:request_time_per_output_token_seconds", 0.5, {"0.01": 1, "0.5": 1}),
        ("vllm:time_per_output_token_seconds", 1.0, {"0.3": 1, "0.75": 1}),
        # a found 8 of its 12 tokens
        ("vllm:request_prefill_kv_computed_tokens", 7.0, {"5.0": 2}),
        ("vllm:request_params_max_tokens", 20.0 + 16.0, {"20.0": 2}),
        ("vllm:request_params_n", 2.0, {"1.0": 2}),
        ("vllm:request_max_num_generation_tokens", 4.0, {"1.0": 1, "5.0": 1}),
        ("vllm:request_num_preemptions", 2.0, {"0.0": 1, "2.0": 1}),
        ("vllm:request_prompt_tokens", 15.0, {"5.0": 1, "20.0": 1}),
        ("vllm:request_generation_tokens", 4.0, {"1.0": 1, "5.0": 1}),
        ("vllm:iteration_tokens_total", 20.0, {"1.0": 1, "8.0": 1, "16.0": 1}),
    ],
)
def test_histograms_of_two_requests(name: str, total: float, buckets: dict[str, int]):
    found = histogram(two_requests(), name)
    assert steps(found) == buckets
    assert (found.sum, found.count) == (total, sum(buckets.values()))


def test_intervals_of_requests_in_one_step():
    """b joins late: its first interval is its own; from then on they have the same."""
    metrics = EngineMetrics("tiny")
    a, b = arrived("a", 1, at=0.0, scheduled=0.0), arrived("b", 1, at=0.0, scheduled=0.0)
    metrics.record_updates(step(got_token(a, at=1.0)))
    metrics.record_updates(step(got_token(b, at=3.0)))
    metrics.record_updates(step(got_token(a, at=5.0), got_token(b, at=5.0)))
    found = histogram(metrics, "vllm:inter_token_latency_seconds")
    assert (steps(found), found.sum) == ({"2.5": 1, "5.0": 1}, 6.0)
    metrics.record_updates(step(got_token(a, at=5.25), got_token(b, at=5.25)))
    found = histogram(metrics, "vllm:inter_token_latency_seconds")
    assert (steps(found), found.sum) == ({"0.3": 2, "2.5": 1, "5.0": 1}, 6.5)


def test_aborted_and_failed_requests_are_counted_but_not_measured():
    metrics = EngineMetrics("tiny")
    a, b = arrived("a", 4, at=1.0, scheduled=2.0), arrived("b", 4, at=1.0, scheduled=0.0)
    metrics.record_updates(step(got_token(a, at=3.0)))
    a.status, b.status = RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR
    metrics.record_finished(a)
    metrics.record_finished(b)
    assert successes(metrics) == {"stop": 0, "length": 0, "abort": 1, "error": 1, "repetition": 0}
    assert histogram(metrics, "vllm:e2e_request_latency_seconds").count == 0
    assert histogram(metrics, "vllm:request_queue_time_seconds").sum == 0.0
    # a's id may come again, and is a new request then
    metrics.record_updates(step(got_token(arrived("a", 5, at=8.0, scheduled=8.0), at=9.0)))
    assert histogram(metrics, "vllm:inter_token_latency_seconds").count == 0
    assert counter(metrics, "vllm:prompt_tokens") == 9


def test_refusals_are_counted_by_reason():
    metrics = EngineMetrics("tiny")
    assert labelled(metrics, "vllm:admission_rejections", "reason") == {}
    for reason in ("invalid", "full", "invalid"):
        metrics.record_rejection(reason)
    assert labelled(metrics, "vllm:admission_rejections", "reason") == {"invalid": 2, "full": 1}


def test_the_completions_of_a_prompt_count_as_one_prompt():
    metrics = EngineMetrics("tiny")
    parent = arrived("p", 5, at=0.0, scheduled=1.0)
    children = [parent.fork(f"{i}_p", SamplingParams(), i) for i in range(3)]
    for child in children:
        metrics.record_updates(step(got_token(child, at=2.0, status=RequestStatus.FINISHED_LENGTH)))
    assert histogram(metrics, "vllm:request_generation_tokens").count == 3
    assert histogram(metrics, "vllm:request_params_n").count == 0
    metrics.record_completed_prompt(3, 40)
    assert (histogram(metrics, "vllm:request_params_n").count, histogram(metrics, "vllm:request_params_n").sum) == (
        1,
        3,
    )
    assert histogram(metrics, "vllm:request_max_num_generation_tokens").sum == 40


def test_what_others_count_is_passed_on():
    prefix_cache = PrefixCacheStats()
    prefix_cache.record(20, 16, resumed=False)
    prefix_cache.record(50, 48, resumed=True)
    external = PrefixCacheStats()
    external.record(4, 3, resumed=False)
    scheduler = SchedulerStats(
        num_running=3,
        num_waiting=2,
        num_preemptions=7,
        num_preempted_tokens=90,
        kv_cache_usage=0.25,
        host_cache_usage=0.5,
        num_stores_skipped=9,
    )
    metrics = EngineMetrics("tiny", cache_info={"block_size": 16, "enable_prefix_caching": True})
    metrics_now = metrics.snapshot(scheduler, prefix_cache, external)
    found = {metric.name: metric for metric in metrics_now}
    waiting = "vllm:num_requests_waiting_by_reason"
    by_reason = {m.labels["reason"]: m.value for m in metrics_now if m.name == waiting and isinstance(m, Gauge)}
    assert by_reason == {"capacity": 2, "deferred": 0}
    labels = {"model_name": "tiny", "engine": "0"}
    assert found["vllm:num_requests_running"] == Gauge("vllm:num_requests_running", labels, 3)
    assert found["vllm:num_requests_waiting"] == Gauge("vllm:num_requests_waiting", labels, 2)
    assert found["vllm:kv_cache_usage_perc"] == Gauge("vllm:kv_cache_usage_perc", labels, 0.25)
    assert found["vllm:gpu_cache_usage_perc"] == Gauge("vllm:gpu_cache_usage_perc", labels, 0.25)
    assert found["vllm:num_preemptions"] == Counter("vllm:num_preemptions", labels, 7)
    assert found["vllm:prefix_cache_queries"] == Counter("vllm:prefix_cache_queries", labels, 20)
    assert found["vllm:prefix_cache_hits"] == Counter("vllm:prefix_cache_hits", labels, 16)
    for name, value in (
        ("vllm:external_prefix_cache_queries", 4),
        ("vllm:external_prefix_cache_hits", 3),
        ("vllm:kv_offload_stores_skipped", 9),
    ):
        assert found[name] == Counter(name, labels, value)
    usage = "vllm:kv_offload_cpu_cache_usage_perc"
    assert found[usage] == Gauge(usage, labels, 0.5)
    assert usage not in snapshot(metrics)
    info = {**labels, "block_size": "16", "enable_prefix_caching": "True"}
    assert found["vllm:cache_config_info"] == Gauge("vllm:cache_config_info", info, 1)
    assert "vllm:cache_config_info" not in snapshot(EngineMetrics("tiny"))


def test_a_snapshot_stays_as_it_was():
    metrics = two_requests()
    before = snapshot(metrics)
    kept = repr(before)
    metrics.record_step(3)
    before["vllm:prompt_tokens"].labels["model_name"] = "other"
    assert repr(before) == kept.replace("'tiny', 'engine': '0'}, value=15", "'other', 'engine': '0'}, value=15")
    assert snapshot(metrics)["vllm:prompt_tokens"].labels["model_name"] == "tiny"


def test_bounds():
    """vLLM's, as its documentation lists them."""
    metrics = EngineMetrics("tiny", max_model_len=300)

    def ends(name: str) -> tuple[str, ...]:
        bounds = list(histogram(metrics, name).buckets)
        return bounds[0], bounds[-2], bounds[-1]

    assert one_two_five(300) == (1, 2, 5, 10, 20, 50, 100, 200)
    assert one_two_five(1000)[-1] == 1000
    assert ends("vllm:request_prompt_tokens") == ("1.0", "200.0", "+Inf")
    assert ends("vllm:time_to_first_token_seconds") == ("0.001", "2560.0", "+Inf")
    assert ends("vllm:inter_token_latency_seconds") == ("0.01", "80.0", "+Inf")
    assert ends("vllm:e2e_request_latency_seconds") == ("0.3", "7680.0", "+Inf")
    assert list(histogram(metrics, "vllm:iteration_tokens_total").buckets) == [
        *("1.0", "8.0", "16.0", "32.0", "64.0", "128.0", "256.0", "512.0"),
        *("1024.0", "2048.0", "4096.0", "8192.0", "16384.0", "+Inf"),
    ]


@given(st.lists(st.integers(0, 40_000), max_size=30))
def test_buckets_count_what_is_at_most_their_bound(sizes: list[int]):
    metrics = EngineMetrics("tiny")
    for size in sizes:
        metrics.record_step(size)
    found = histogram(metrics, "vllm:iteration_tokens_total")
    assert found.buckets == {bound: sum(size <= float(bound) for size in sizes) for bound in found.buckets}
    assert (found.count, found.sum) == (len(sizes), sum(sizes))
