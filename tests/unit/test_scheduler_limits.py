"""The scheduler's limits: defaults of platform and memory, and what those that are given change. Expected values are
vLLM's offline defaults, the CPU's jaxllm's own.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.config.engine_args import engine_args
from jaxllm.config.resolve import default_block_size, platform_limits, scheduler_config
from jaxllm.config.scheduler import SchedulerConfig


def scheduler(max_model_len: int = 2048, platform: str = "cpu", gib: float | None = None, **kwargs: Any):
    memory = None if gib is None else int(gib * 2**30)
    return scheduler_config(
        engine_args("m", **kwargs), max_model_len=max_model_len, platform=platform, device_memory_bytes=memory
    )


def limits(config: SchedulerConfig) -> tuple[int, int]:
    return config.max_num_batched_tokens, config.max_num_seqs


@pytest.mark.parametrize(
    ("platform", "gib", "expected"),
    [
        ("cpu", 1000, (512, 256)),
        ("gpu", 139, (16384, 1024)),
        ("cuda", 70, (16384, 1024)),
        ("gpu", 69.9, (8192, 256)),
        ("gpu", None, (8192, 256)),
    ],
)
def test_platform_defaults(platform: str, gib: float | None, expected: tuple[int, int]):
    config = scheduler(131072, platform, gib)
    assert limits(config) == expected == platform_limits(platform, int(gib * 2**30) if gib else None)
    assert config.max_model_len == 131072


def test_the_default_block_is_the_platforms():
    assert [default_block_size(platform) for platform in ("cpu", "gpu")] == [64, 16]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", (8192, 256)),
        ("NVIDIA A100 80GB PCIe", (8192, 256)),
        ("NVIDIA GB10", (8192, 256)),
        ("NVIDIA H100 80GB HBM3", (16384, 1024)),
        ("NVIDIA GB100", (16384, 1024)),
    ],
)
def test_large_but_slower_gpus_have_the_small_ones_defaults(kind: str, expected: tuple[int, int]):
    assert platform_limits("gpu", 79 * 2**30, kind) == expected


@pytest.mark.parametrize(
    ("kwargs", "max_model_len", "expected"),
    [
        # no step can hold more than every sequence at its longest
        ({"max_num_seqs": 4}, 100, (400, 4)),
        ({"max_num_seqs": 1}, 1, (1, 1)),
        ({"max_num_batched_tokens": 4096}, 2048, (4096, 256)),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 64}, 2048, (64, 64)),
        # without chunks the longest prompt has to fit
        ({"enable_chunked_prefill": False}, 2048, (2048, 256)),
        ({"enable_chunked_prefill": False}, 300, (512, 256)),
        ({"enable_chunked_prefill": False, "max_num_seqs": 1}, 300, (300, 1)),
    ],
)
def test_limits_that_were_not_given_follow_those_that_were(
    kwargs: dict[str, Any], max_model_len: int, expected: tuple[int, int], caplog: pytest.LogCaptureFixture
):
    assert limits(scheduler(max_model_len, **kwargs)) == expected
    assert caplog.records == []


@pytest.mark.parametrize(
    ("kwargs", "expected", "told"),
    [
        ({"max_num_seqs": 1000}, (1000, 1000), ("max_num_seqs (1000)", "max_num_batched_tokens (512)")),
        ({"max_num_batched_tokens": 16}, (16, 16), ("max_num_batched_tokens (16)", "max_num_seqs (256)")),
        ({"max_num_batched_tokens": 1}, (1, 1), ("max_num_batched_tokens (1)", "using max_num_seqs=1.")),
    ],
)
def test_a_default_that_contradicts_what_was_given_is_changed_aloud(
    kwargs: dict[str, Any], expected: tuple[int, int], told: tuple[str, str], caplog: pytest.LogCaptureFixture
):
    """A step gives every running request at least one token."""
    assert limits(scheduler(2048, **kwargs)) == expected
    [record] = caplog.records
    assert record.levelno == logging.WARNING and all(part in record.getMessage() for part in told)


def test_more_tokens_than_a_step_can_hold_are_capped_aloud(caplog: pytest.LogCaptureFixture):
    assert limits(scheduler(100, max_num_seqs=4, max_num_batched_tokens=401)) == (400, 4)
    [record] = caplog.records
    assert "max_num_batched_tokens (401) exceeds max_num_seqs * max_model_len (400)" in record.getMessage()


def test_contradictions_are_refused_with_values_that_work():
    with pytest.raises(ValidationError, match=r"max_num_batched_tokens \(8\) must be .* max_num_seqs \(9\)"):
        engine_args("m", max_num_batched_tokens=8, max_num_seqs=9)
    with pytest.raises(ValidationError, match=r"long_prefill_token_threshold \(101\).* max_model_len \(100\)"):
        scheduler(100, long_prefill_token_threshold=101)
    with pytest.raises(ValidationError, match=r"max_num_batched_tokens \(99\) is smaller than max_model_len \(100\)"):
        scheduler(100, max_num_batched_tokens=99, enable_chunked_prefill=False)
    assert scheduler(100, max_num_batched_tokens=100, enable_chunked_prefill=False).max_num_batched_tokens == 100
    assert scheduler(100, long_prefill_token_threshold=100).long_prefill_token_threshold == 100


def test_an_adaptive_threshold_without_one_is_said_to_have_no_effect(caplog: pytest.LogCaptureFixture):
    scheduler(100, long_prefill_token_threshold_adaptive=True)
    [record] = caplog.records
    assert "long_prefill_token_threshold_adaptive has no effect without" in record.getMessage()


def test_the_rest_is_handed_on():
    config = scheduler(
        max_num_batched_tokens=64,
        max_num_seqs=8,
        long_prefill_token_threshold=32,
        scheduling_policy="priority",
        enable_chunked_prefill=True,
        async_scheduling=False,
        scheduler_reserve_full_isl=False,
    )
    assert config == SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=2048,
        long_prefill_token_threshold=32,
        policy="priority",
        max_scored_tokens=256,
        enable_chunked_prefill=True,
        async_scheduling=False,
        reserve_full_prompt=False,
    )


def test_requests_that_run_at_once_may_be_fewer_than_there_is_room_for():
    assert scheduler().max_num_active_seqs is None
    config = scheduler(
        max_num_seqs=8,
        max_num_active_seqs="3",
        long_prefill_token_threshold=16,
        long_prefill_token_threshold_adaptive=True,
    )
    assert (config.max_num_seqs, config.max_num_active_seqs) == (8, 3)
    assert config.long_prefill_token_threshold_adaptive
    with pytest.raises(ValidationError, match=r"max_num_active_seqs \(9\) cannot be greater than max_num_seqs \(8\)"):
        scheduler(max_num_seqs=8, max_num_active_seqs=9)
