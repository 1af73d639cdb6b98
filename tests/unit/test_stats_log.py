"""vLLM's line of statistics: its words, and the numbers of an interval worked out by hand."""

from __future__ import annotations

import logging

import pytest
from support.fake_engine import FakeEngine

from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.metrics import EngineStats
from jaxllm.engine.observe.stats_log import StatsLog, stats_interval
from jaxllm.engine.scheduling.stats import SchedulerStats


class Engine:
    """Counters and a clock that are set by hand."""

    def __init__(self) -> None:
        self.now = 50.0
        self.prompt = self.cached = self.generated = self.preemptions = 0
        self.drafts = self.drafted = self.accepted = 0
        self.running, self.waiting, self.usage, self.hit_rate = 8, 2, 0.919, 0.123

    def stats(self) -> EngineStats:
        scheduler = SchedulerStats(
            num_running=self.running,
            num_waiting=self.waiting,
            num_preemptions=self.preemptions,
            num_preempted_tokens=0,
            kv_cache_usage=self.usage,
        )
        return EngineStats(
            scheduler=scheduler,
            prompt_tokens=self.prompt,
            prompt_tokens_cached=self.cached,
            generation_tokens=self.generated,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
            prefix_cache_hit_rate=self.hit_rate,
            num_drafts=self.drafts,
            num_draft_tokens=self.drafted,
            num_accepted_tokens=self.accepted,
        )

    def log(self, interval: float = 10.0, *, prefix_caching: bool = True, cache_name: str = "KV cache") -> StatsLog:
        return StatsLog(
            self.stats, interval, prefix_caching=prefix_caching, cache_name=cache_name, clock=lambda: self.now
        )

    def turn(self, log: StatsLog, seconds: float, *, prompt: int = 0, cached: int = 0, generated: int = 0) -> None:
        log.turn_begins()
        self.now += seconds
        self.prompt, self.cached = self.prompt + prompt, self.cached + cached
        self.generated += generated
        log.turn_ends()


def test_the_line_is_vllms(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="jaxllm")
    engine = Engine()
    log = engine.log(cache_name="GPU KV cache")
    engine.turn(log, 4.0, prompt=300_000, cached=60_000, generated=8)
    assert not caplog.messages
    engine.turn(log, 6.0, generated=2400)
    assert caplog.messages == [
        "Engine 000: Avg prompt throughput: 24000.0 tokens/s, Avg generation throughput: 240.8 tokens/s, "
        "Running: 8 reqs, Waiting: 2 reqs, GPU KV cache usage: 91.9%, Prefix cache hit rate: 12.3%"
    ]
    engine.preemptions = 3
    engine.turn(log, 10.0, generated=100)
    assert caplog.messages[1].startswith(
        "Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 10.0"
    )
    assert "Waiting: 2 reqs, Preemptions: 3, GPU" in caplog.messages[1]
    engine.turn(log, 10.0, generated=100)
    assert "Preemptions" not in caplog.messages[2], "an interval counts its own"
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_what_became_of_drafts_is_told(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="jaxllm")
    engine = Engine()
    engine.drafts, engine.drafted, engine.accepted = 7, 21, 9
    log = engine.log()
    engine.drafts, engine.drafted, engine.accepted = 7 + 8, 21 + 24, 9 + 14
    engine.turn(log, 10.0, generated=22)
    engine.turn(log, 10.0, generated=1)
    assert caplog.messages[0].endswith(", Mean acceptance length: 2.75, Accepted: 14 of 24 drafted tokens")
    assert "cceptance" not in caplog.messages[1], "an interval counts its own"


def test_without_a_prefix_cache_there_is_no_hit_rate(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="jaxllm")
    engine = Engine()
    log = engine.log(prefix_caching=False)
    engine.turn(log, 10.0, generated=1)
    assert caplog.messages[0].endswith(", KV cache usage: 91.9%")


def test_the_time_between_two_calls_does_not_count(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="jaxllm")
    engine = Engine()
    log = engine.log()
    engine.turn(log, 4.0, generated=50)
    engine.running = engine.waiting = 0
    engine.turn(log, 1.0, generated=50)
    engine.now += 3600
    engine.running = 1
    engine.turn(log, 5.0, generated=100)
    assert "Avg generation throughput: 20.0 tokens/s, Running: 1 reqs" in caplog.messages[0]
    # the requests were aborted, which no turn tells
    engine.turn(log, 1.0, generated=10)
    engine.now += 3600
    engine.turn(log, 4.0, generated=10)
    assert len(caplog.messages) == 1
    # the caller was busy for a moment while requests waited for the next turn: that is part of the speed
    engine.now += 5.0
    engine.turn(log, 0.0)
    assert "Avg generation throughput: 2.0 tokens/s" in caplog.messages[1]


def test_the_rest_is_logged_at_the_end_and_nothing_twice(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="jaxllm")
    engine = Engine()
    log = engine.log()
    log.engine_ends()
    assert not caplog.messages
    engine.turn(log, 2.0, generated=50)
    log.engine_ends()
    log.engine_ends()
    (line,) = caplog.messages
    assert "Avg generation throughput: 25.0 tokens/s" in line


def test_an_engines_own_counters(caplog: pytest.LogCaptureFixture):
    """Every turn takes half a second, and as long passes between two."""
    caplog.set_level(logging.INFO, logger="jaxllm")
    engine, ticks = FakeEngine(), iter(range(10_000))
    engine.core.observe(StatsLog(engine.core.stats, 1e9, prefix_caching=True, clock=lambda: next(ticks) / 2))
    engine.add("a", [1, 2, 3], 6)
    engine.add("b", [4, 5, 6, 7], 4)
    engine.run()
    engine.core.shutdown()
    (line,) = caplog.messages
    # 7 tokens in and 10 out; the clock advances half a second at every look, when a turn begins and when it ends: 6
    # turns launch, and the seventh reads what is left
    seconds = 7 - 0.5
    assert f"prompt throughput: {7 / seconds:.1f} tokens/s" in line
    assert f"generation throughput: {10 / seconds:.1f} tokens/s" in line
    assert "Running: 0 reqs, Waiting: 0 reqs, KV cache usage: 0.0%, Prefix cache hit rate: 0.0%" in line


def test_the_interval_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JAXLLM_LOG_STATS_INTERVAL", raising=False)
    assert stats_interval() == 10
    monkeypatch.setenv("JAXLLM_LOG_STATS_INTERVAL", "0.5")
    assert stats_interval() == 0.5
    for wrong in ("0", "-1", "soon", "nan", "inf", ""):
        monkeypatch.setenv("JAXLLM_LOG_STATS_INTERVAL", wrong)
        with pytest.raises(ValidationError, match="must be a number of seconds greater than 0"):
            stats_interval()
