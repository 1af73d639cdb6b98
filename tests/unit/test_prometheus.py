"""What Prometheus reads, by prometheus_client's own parser, against the snapshot that it was made from."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.fake_engine import FakeEngine

import jaxllm
from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.metrics import Counter, Gauge, Histogram, Metric, Vector
from jaxllm.engine.observe.prometheus import HELP, MetricsServer, families, metrics_registry

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def busy_engine() -> FakeEngine:
    engine = FakeEngine(num_blocks=8)
    for i in range(6):
        engine.add(str(i), [1, 2, 3, 4, 5, 6, 7, 8, i], 12 + i)
    engine.run()
    engine.core.record_rejection("invalid")
    engine.core.record_completed_prompt(3, 20)
    return engine


def parsed(text: str) -> Samples:
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, "a sample comes twice"
            samples[key] = sample.value
    return samples


def expected(metrics: list[Metric]) -> Samples:
    """Prometheus' text format, from its documentation."""
    samples: Samples = {}
    for metric in metrics:
        labels = set(metric.labels.items())
        if isinstance(metric, Counter):
            samples[metric.name + "_total", frozenset(labels)] = metric.value
        elif isinstance(metric, Gauge):
            samples[metric.name, frozenset(labels)] = metric.value
        elif isinstance(metric, Vector):
            for place, value in enumerate(metric.values):
                samples[metric.name + "_total", frozenset(labels | {("position", str(place))})] = value
        elif isinstance(metric, Histogram):
            samples[metric.name + "_count", frozenset(labels)] = metric.count
            samples[metric.name + "_sum", frozenset(labels)] = metric.sum
            for bound, count in metric.buckets.items():
                samples[metric.name + "_bucket", frozenset(labels | {("le", bound)})] = count
    return samples


def test_the_text_says_what_the_snapshot_says():
    engine = busy_engine()
    text = generate_latest(metrics_registry(engine.core.metrics)).decode()
    found = parsed(text)
    assert found == expected(engine.core.metrics())
    labels = frozenset({("model_name", "fake"), ("engine", "0")})
    # six prompts of 9 tokens, 12 + ... + 17 tokens of output
    assert found["vllm:prompt_tokens_total", labels] == 54
    assert found["vllm:generation_tokens_total", labels] == 87
    assert found["vllm:num_preemptions_total", labels] > 0
    assert found["vllm:request_success_total", labels | {("finished_reason", "length")}] == 6
    assert found["vllm:admission_rejections_total", labels | {("reason", "invalid")}] == 1
    assert found["vllm:request_params_n_count", labels] == 7
    assert found["vllm:request_params_n_sum", labels] == 9


def test_every_family_has_its_kind_and_a_help_text():
    made = families(busy_engine().core.metrics())
    # what that engine does not have
    others = {"vllm:cache_config_info", "vllm:lora_requests_info", "jaxllm:expert_tokens"}
    others |= {name for name in HELP if "spec_decode" in name or "encoder" in name}
    others |= {"vllm:kv_offload_cpu_cache_usage_perc", "vllm:kv_offload_stores_skipped"}
    others |= {name for name in HELP if name.startswith(("vllm:mm_cache", "jaxllm:encoder"))}
    assert {family.name for family in made} == HELP.keys() - others
    kinds = {family.name: family.type for family in made}
    assert kinds["vllm:prompt_tokens"] == "counter"
    assert kinds["vllm:kv_cache_usage_perc"] == "gauge"
    assert kinds["vllm:iteration_tokens_total"] == "histogram"
    assert all(family.documentation == HELP[family.name] for family in made)


def test_places_of_drafts_are_counters_with_a_label():
    """As vLLM's are, whose `LLM.get_metrics` makes one vector of them."""
    metrics: list[Metric] = [Vector("vllm:spec_decode_num_accepted_tokens_per_pos", {"engine": "0"}, [7, 3, 0])]
    assert parsed(generate_latest(metrics_registry(lambda: metrics)).decode()) == expected(metrics)


def test_nothing_is_registered_globally():
    before = generate_latest(REGISTRY)
    first, second = busy_engine(), busy_engine()
    registries = [metrics_registry(engine.core.metrics) for engine in (first, second)]
    assert all(b"vllm:" in generate_latest(registry) for registry in registries)
    assert b"vllm:" not in before and b"vllm:" not in generate_latest(REGISTRY)


def test_every_scrape_while_the_engine_runs_is_consistent():
    engine = FakeEngine(num_blocks=16)
    registry = metrics_registry(engine.core.metrics)
    seen: list[Samples] = []
    done = threading.Event()

    def scrape() -> None:
        while not done.is_set():
            seen.append(parsed(generate_latest(registry).decode()))

    thread = threading.Thread(target=scrape)
    thread.start()
    while len(seen) < 8:
        for i in range(20):
            engine.add(str(i), [1, 2, i % 12], 10)
        engine.run()
    done.set()
    thread.join()
    labels = frozenset({("model_name", "fake"), ("engine", "0")})
    tokens = []
    for samples in seen:
        finished = samples["vllm:request_success_total", labels | {("finished_reason", "length")}]
        # what is counted at the end of a request is counted together, and after its tokens
        for name in ("e2e_request_latency_seconds", "request_prompt_tokens", "request_num_preemptions"):
            assert samples[f"vllm:{name}_count", labels] == finished
        assert samples["vllm:request_generation_tokens_sum", labels] == 10 * finished
        assert samples["vllm:generation_tokens_total", labels] >= 10 * finished
        tokens.append(samples["vllm:generation_tokens_total", labels])
    assert tokens == sorted(tokens) and len(set(tokens)) > 1


def test_the_server_answers_and_frees_its_port():
    engine = busy_engine()
    server = MetricsServer(metrics_registry(engine.core.metrics), 0)
    assert server.url == f"http://127.0.0.1:{server.port}/metrics"
    with urllib.request.urlopen(server.url, timeout=10) as answer:
        assert parsed(answer.read().decode()) == expected(engine.core.metrics())
    with pytest.raises(ValidationError, match=f"127.0.0.1:{server.port} .*Another port may be free"):
        MetricsServer(metrics_registry(engine.core.metrics), server.port)
    server.close()
    server.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server.url, timeout=10)
    again = MetricsServer(metrics_registry(engine.core.metrics), server.port)
    again.close()


def test_the_dashboard_shows_what_there_is():
    """Every metric of the server's Grafana dashboard is one of the engine's."""
    text = (Path(jaxllm.__file__).parent / "entrypoints/serve/grafana.json").read_text()
    panels = json.loads(text)["panels"]
    used = {name for panel in panels for target in panel["targets"] for name in re.findall(r"vllm:\w+", target["expr"])}
    assert len(panels) == 10 and used
    for name in used:
        assert name in HELP or re.sub("_(total|bucket)$", "", name) in HELP, name
