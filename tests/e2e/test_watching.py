"""Watching a real engine: its port, its log, its traces and profiles, and what is left of them afterwards."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.step_counts import StepCounts

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [[3, 1, 4], list(range(50)), [9] * 20]


def total(llm: LLM, name: str) -> float:
    families = text_string_to_metric_families(generate_latest(llm.prometheus_registry()).decode())
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def test_a_trace_of_generate(engine: LLM):
    observers = engine.engine.core._observers
    with engine.trace() as trace:
        outputs = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
    again = engine.trace()
    engine.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert not again.steps and engine.engine.core._observers == observers
    assert sum(step.num_decode_tokens for step in trace.steps) == 3 * 5
    cached = sum(output.num_cached_tokens for output in outputs)
    assert sum(step.num_prefill_tokens for step in trace.steps) == 73 - cached
    for step in trace.steps:
        assert step.num_tokens <= step.bucket_tokens and step.num_seqs <= step.bucket_seqs
        assert step.device_time > 0
    for output in outputs:
        (request,) = [request for request in trace.requests if request.request_id == output.request_id]
        metrics = output.metrics
        assert request.scheduled is not None and request.first_token is not None and request.last_token is not None
        assert metrics.queue_time == pytest.approx(request.scheduled - request.queued)
        assert metrics.prefill_time == pytest.approx(request.first_token - request.scheduled)
        assert metrics.decode_time == pytest.approx(request.last_token - request.first_token)
        assert metrics.inference_time == pytest.approx(request.last_token - request.scheduled)
        assert metrics.time_per_output_token == pytest.approx(metrics.decode_time / 5)


def test_two_traces_and_a_trace_again(engine: LLM):
    with engine.trace() as outer:
        engine.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
        with engine.trace() as inner:
            engine.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
    assert 0 < len(inner.steps) < len(outer.steps)
    assert [step.step for step in outer.steps][-len(inner.steps) :] == [step.step for step in inner.steps]
    with inner:
        pass
    assert not inner.steps


def test_a_profile_names_steps_and_phases(engine: LLM, tmp_path: Path):
    observers = engine.engine.core._observers
    engine.start_profile("first", path=tmp_path)
    with pytest.raises(ValidationError, match="written already"):
        engine.start_profile(path=tmp_path)
    engine.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert engine.stop_profile() == tmp_path / "first"
    assert engine.engine.core._observers == observers
    (file,) = tmp_path.glob("first/plugins/profile/*/*.trace.json.gz")
    names = {event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    assert {"step", "schedule", "wait for the device", "update"} <= names
    assert any(name.startswith("launch ") and name.endswith(" tokens x 3 seqs") for name in names)
    with pytest.raises(ValidationError, match="none was started. Call start_profile first"):
        engine.stop_profile()
    with pytest.raises(ValidationError, match="prefix must be the name of a folder"):
        engine.start_profile("../elsewhere")


def test_refused_prompts_and_prompts_of_several_completions_are_counted(engine: LLM):
    before = {name: total(engine, name) for name in ("vllm:admission_rejections_total", "vllm:request_params_n_sum")}
    engine.generate([[1] * 300, PROMPTS[0]], GREEDY, use_tqdm=False, on_error="return")
    engine.generate(PROMPTS[:1], SamplingParams(n=3, temperature=1.0, max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert total(engine, "vllm:admission_rejections_total") == before["vllm:admission_rejections_total"] + 1
    assert total(engine, "vllm:request_params_n_sum") == before["vllm:request_params_n_sum"] + 1 + 3


def test_the_bar_is_the_callers(engine: LLM):
    made: list[dict[str, Any]] = []

    class Bar:
        def __init__(self, **arguments: Any) -> None:
            made.append(arguments)
            self.n = 0

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            made[0]["postfix"] = text

        def update(self, count: int) -> bool:
            made[0]["n"] = made[0].get("n", 0) + count
            return True

        def close(self) -> None:
            made[0]["closed"] = True

    engine.generate(PROMPTS, GREEDY, use_tqdm=Bar)
    assert made[0]["n"] == made[0]["total"] == 3 and made[0]["closed"]
    assert "running: 0, waiting: 0, KV cache: 0.0%" in made[0]["postfix"]
    engine.generate(iter(PROMPTS), GREEDY, use_tqdm=lambda **given: made.append(given) or Bar(**given))
    assert made[1]["total"] is None


def test_an_engine_that_logs_serves_and_profiles_by_its_arguments(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="jaxllm")
    monkeypatch.setenv("JAXLLM_LOG_STATS_INTERVAL", "0.0001")
    others = threading.enumerate()
    profiles = {"profiler": "torch", "torch_profiler_dir": str(tmp_path / "profiles")}
    llm = LLM(tiny_model, **SMALL, disable_log_stats=False, metrics_port=0, profiler_config=profiles)
    server = llm.engine.watching.server
    assert server is not None
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    lines = [message for message in caplog.messages if message.startswith("Engine 000: Avg prompt throughput: ")]
    assert len(lines) > 3 and all("Prefix cache hit rate" in line for line in lines)
    with urllib.request.urlopen(server.url, timeout=10) as answer:
        assert b"vllm:generation_tokens_total{" in answer.read()
    other = llm.serve_metrics(0)
    assert llm.start_profile() == tmp_path / "profiles"
    # the engine's end stops what is on
    with llm.trace() as trace:
        llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
        llm.shutdown()
    assert trace.steps
    assert list(tmp_path.glob("profiles/plugins/profile/*/*.xplane.pb"))
    for port in (server.port, other.port):
        with socket.socket() as free:
            assert free.connect_ex(("127.0.0.1", port)) != 0
    new = [thread for thread in threading.enumerate() if thread not in others and thread.is_alive()]
    assert not [thread for thread in new if thread.name.startswith("Thread-")]


def test_by_default_no_line_is_logged_and_nothing_but_counters_watches(engine: LLM, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, logger="jaxllm")
    engine.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [type(observer) for observer in engine.engine.core._observers] == [StepCounts]
    assert not [message for message in caplog.messages if "throughput" in message or "Advice" in message]
    assert engine.get_metrics()


def test_a_port_that_is_taken_ends_the_start(tiny_model: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValidationError, match=f"metrics cannot be served on 127.0.0.1:{port}"):
            LLM(tiny_model, **SMALL, metrics_port=port)
