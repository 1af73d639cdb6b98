"""The scheduler's decisions, step by step, in the order that vLLM's V1 scheduler takes them."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any, NamedTuple

import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.request import Request, RequestStatus
from jaxllm.engine.scheduling.scheduler import Scheduler
from jaxllm.engine.step import SchedulerOutput, StepOutput

EOS = frozenset({2})


class RequestUpdate(NamedTuple):
    """An entry of `StepUpdates`, as it is when the step has been read."""

    request: Request
    new_token_ids: list[int]
    finished: bool


def scheduler(num_blocks: int = 100, block_size: int = 4, window: int | None = None, **kwargs: Any) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64)
    groups = (KVCacheGroup(layers=(0,), sliding_window=window),)
    cache = CacheConfig(num_blocks=num_blocks, block_size=block_size, groups=groups)
    return Scheduler(dataclasses.replace(config, **kwargs), cache)


def add(engine: Scheduler, name: str, length: int, priority: int = 0, **params: Any) -> Request:
    start = 1000 * (ord(name[0]) - ord("a") + 1)
    params.setdefault("max_tokens", 30)
    new = Request(
        name,
        list(range(start, start + length)),
        SamplingParams(**params),
        eos_token_ids=EOS,
        priority=priority,
    )
    engine.add_request(new)
    return new


def read(engine: Scheduler, step: SchedulerOutput, *tokens: int) -> list[RequestUpdate]:
    """Read a step that scores nothing: the given tokens where it samples; by default all sevens."""
    given = iter(tokens)
    token_ids = [next(given, 7) for _ in range(sum(step.wanted))]
    updates = engine.update(step, StepOutput(token_ids=token_ids, counts=list(step.wanted)))
    return [
        RequestUpdate(request, request.all_token_ids[-count:], request.is_finished)
        for request, count in zip(updates.requests, updates.counts, strict=True)
    ]


def work(step: SchedulerOutput) -> dict[str, tuple[int, int, int]]:
    """Request -> start, count, wanted."""
    entries = zip(step.requests, step.starts, step.counts, step.wanted, strict=True)
    return {request.request_id: (start, count, wanted) for request, start, count, wanted in entries}


def test_prefill_then_decode() -> None:
    engine = scheduler()
    a = add(engine, "a", 6)
    step = engine.schedule()
    assert work(step) == {"a": (0, 6, 1)}
    (new,) = step.admitted
    assert (new.row, new.num_computed_tokens, new.num_prompt_tokens) == (0, 0, 6)
    assert new.block_ids == ([1, 2],)
    assert new.stop_token_ids == EOS
    assert read(engine, step, 50) == [RequestUpdate(a, [50], False)]
    assert a.output_token_ids == [50]
    step = engine.schedule()
    assert work(step) == {"a": (6, 1, 1)}
    assert step.admitted == step.new_blocks == []
    read(engine, step)
    read(engine, engine.schedule())
    # Position 8 is the first of the third block.
    step = engine.schedule()
    assert work(step) == {"a": (8, 1, 1)}
    assert step.new_blocks == [(0, 0, 2, [3])]


def test_running_requests_come_first_and_prompts_fill_the_rest_in_chunks() -> None:
    engine = scheduler(max_num_batched_tokens=10)
    add(engine, "a", 4)
    add(engine, "b", 15)
    add(engine, "c", 5)
    step = engine.schedule()
    assert work(step) == {"a": (0, 4, 1), "b": (0, 6, 0)}
    assert [update.request.request_id for update in read(engine, step)] == ["a"]
    step = engine.schedule()
    assert work(step) == {"a": (4, 1, 1), "b": (6, 9, 1)}
    read(engine, step)
    assert work(engine.schedule()) == {"a": (5, 1, 1), "b": (15, 1, 1), "c": (0, 5, 1)}


def test_without_chunked_prefill_a_prompt_waits_for_a_budget_that_holds_it() -> None:
    engine = scheduler(max_num_batched_tokens=64, enable_chunked_prefill=False)
    add(engine, "a", 40)
    add(engine, "b", 30)
    add(engine, "c", 2)
    step = engine.schedule()
    assert work(step) == {"a": (0, 40, 1)}, "and nobody overtakes it"
    read(engine, step)
    assert work(engine.schedule()) == {"a": (40, 1, 1), "b": (0, 30, 1), "c": (0, 2, 1)}


def test_long_prefill_threshold_holds_only_in_company() -> None:
    engine = scheduler(long_prefill_token_threshold=5)
    add(engine, "a", 20)
    step = engine.schedule()
    assert work(step) == {"a": (0, 20, 1)}
    read(engine, step)
    add(engine, "b", 12)
    step = engine.schedule()
    assert work(step) == {"a": (20, 1, 1), "b": (0, 5, 0)}
    read(engine, step)
    engine.abort(["a"])
    assert work(engine.schedule()) == {"b": (5, 7, 1)}


def test_an_adaptive_threshold_leaves_everybody_a_fair_share() -> None:
    """vLLM's rule: the limit is the threshold, or the budget divided by the requests that are there if that is more."""
    engine = scheduler(
        max_num_seqs=8,
        max_num_batched_tokens=24,
        long_prefill_token_threshold=5,
        long_prefill_token_threshold_adaptive=True,
    )
    add(engine, "a", 20)
    add(engine, "b", 20)
    assert work(step := engine.schedule()) == {"a": (0, 12, 0), "b": (0, 12, 0)}
    read(engine, step)
    for name in "cdef":
        add(engine, name, 7)
    assert work(engine.schedule()) == {"a": (12, 5, 0), "b": (12, 5, 0), "c": (0, 5, 0), "d": (0, 5, 0), "e": (0, 4, 0)}


def test_fewer_requests_may_run_than_there_is_room_for() -> None:
    engine = scheduler(max_num_seqs=4, max_num_active_seqs=2)
    for name in "abc":
        add(engine, name, 3)
    assert work(step := engine.schedule()) == {"a": (0, 3, 1), "b": (0, 3, 1)}
    read(engine, step)
    engine.abort(["a"])
    assert work(engine.schedule()) == {"b": (3, 1, 1), "c": (0, 3, 1)}


def test_max_num_seqs_and_rows() -> None:
    engine = scheduler(max_num_seqs=2)
    for name in "abc":
        add(engine, name, 3)
    step = engine.schedule()
    assert step.rows == [0, 1]
    read(engine, step, 2, 7)
    step = engine.schedule()
    assert [(request.request_id, row) for request, row in zip(step.requests, step.rows, strict=True)] == [
        ("b", 1),
        ("c", 0),
    ]
    assert (engine.stats().num_running, engine.stats().num_waiting) == (2, 0)


def test_a_prompt_is_admitted_only_whole_unless_told_otherwise() -> None:
    for reserve, expected in ((True, ["a"]), (False, ["a", "b"])):
        engine = scheduler(num_blocks=11, max_num_batched_tokens=26, reserve_full_prompt=reserve)
        add(engine, "a", 20)
        add(engine, "b", 21)
        assert list(work(engine.schedule())) == expected, "five blocks are left, b needs six but only two now"


def test_same_step_prefix_hits() -> None:
    engine = scheduler()
    a = add(engine, "a", 9)
    twin = Request("twin", list(a.prompt_token_ids), SamplingParams())
    engine.add_request(twin)
    step = engine.schedule()
    assert work(step) == {"a": (0, 9, 1), "twin": (8, 1, 1)}
    assert step.admitted[1].num_computed_tokens == 8
    assert step.admitted[1].block_ids == ([1, 2, 4],)
    assert (a.num_cached_tokens, twin.num_cached_tokens) == (0, 8)
    stats = engine.kv_cache_manager.prefix_cache_stats
    assert (stats.queries, stats.hits, stats.hit_rate) == (18, 8, 8 / 18)


def test_steps_are_scheduled_before_earlier_ones_are_read() -> None:
    engine = scheduler()
    a = add(engine, "a", 4, max_tokens=3)
    first, second, third, fourth = (engine.schedule() for _ in range(4))
    assert [work(step) for step in (first, second, third)] == [
        {"a": (0, 4, 1)},
        {"a": (4, 1, 1)},
        {"a": (5, 1, 1)},
    ]
    assert fourth.rows == [], "three tokens are on their way, and three are wanted"
    assert a.num_output_placeholders == 3
    assert engine.has_unfinished
    updates = [read(engine, step, token) for step, token in ((first, 10), (second, 11), (third, 12))]
    assert [update[0].finished for update in updates] == [False, False, True]
    assert (a.output_token_ids, a.finish_reason) == ([10, 11, 12], "length")
    assert not engine.has_unfinished


def test_what_a_finished_request_sampled_later_is_dropped() -> None:
    engine = scheduler()
    a, b = add(engine, "a", 4), add(engine, "b", 4)
    first, second, third = engine.schedule(), engine.schedule(), engine.schedule()
    read(engine, first, 2, 20)
    assert (a.finish_reason, a.stop_reason, a.output_token_ids) == ("stop", None, [2])
    assert engine.kv_cache_manager.pool.num_used == 2, "a's blocks are free while its later steps run"
    assert [update.request for update in read(engine, second)] == [b]
    engine.abort(["b"])
    assert read(engine, third) == []
    assert b.finish_reason == "abort"


@pytest.mark.parametrize(
    ("params", "token", "expected"),
    [
        ({}, 2, ("stop", None)),
        ({"ignore_eos": True}, 2, (None, None)),
        ({"stop_token_ids": [9]}, 9, ("stop", 9)),
        ({"stop_token_ids": [2]}, 2, ("stop", None)),
        ({"stop_token_ids": [2], "ignore_eos": True}, 2, ("stop", 2)),
        ({"max_tokens": 1}, 2, ("stop", None)),
        ({"max_tokens": 1, "stop_token_ids": [9]}, 9, ("stop", 9)),
        ({"max_tokens": 1}, 8, ("length", None)),
        ({"max_tokens": 1, "ignore_eos": True}, 2, ("length", None)),
        ({}, 8, (None, None)),
    ],
)
def test_stops(params: dict[str, Any], token: int, expected: tuple[str | None, int | None]) -> None:
    engine = scheduler()
    a = add(engine, "a", 4, **params)
    assert read(engine, engine.schedule(), token)[0].finished == (expected[0] is not None)
    assert (a.finish_reason, a.stop_reason) == expected
    assert a.output_token_ids == [token]


def test_a_request_ends_at_max_model_len() -> None:
    engine = scheduler(max_model_len=8)
    a = add(engine, "a", 5, max_tokens=None)
    while engine.has_unfinished:
        step = engine.schedule()
        assert step.starts[0] + step.counts[0] < 8
        read(engine, step)
    assert (a.num_tokens, a.finish_reason) == (8, "length")


def test_a_request_that_outgrows_the_pool_ends_as_if_at_max_model_len() -> None:
    engine = scheduler(num_blocks=4)
    assert engine.max_tokens_per_request == 12
    a = add(engine, "a", 12, max_tokens=None)
    b = add(engine, "b", 3, max_tokens=None)
    for _ in range(100):
        if not engine.has_unfinished:
            break
        read(engine, engine.schedule())
    # Twelve tokens fit, and the thirteenth needs no keys.
    assert (a.num_tokens, a.finish_reason) == (13, "length")
    assert (b.num_tokens, b.finish_reason) == (13, "length")


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (0, "The decoder prompt cannot be empty"),
        (64, r"The decoder prompt \(length 64\) is longer than the maximum model length of 64.*max_model_len >= 65"),
        (41, r"length 41\) does not fit into the KV cache.*at most 40 tokens.*num_gpu_blocks_override >= 12"),
    ],
)
def test_prompts_that_can_never_run_are_refused(length: int, text: str) -> None:
    engine = scheduler(num_blocks=11)
    with pytest.raises(ValidationError, match=text):
        add(engine, "a", length)
    assert not engine.has_unfinished
    add(engine, "a", 40)
    with pytest.raises(ValidationError, match="Request id 'a' is in use"):
        add(engine, "a", 3)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"policy": "lifo"}, "policy must be"),
        ({"enable_chunked_prefill": False}, r"max_num_batched_tokens \(32\) is smaller than max_model_len \(64\)"),
        ({"num_blocks": 1}, "num_blocks must be at least 2"),
    ],
)
def test_configurations_that_cannot_work_are_refused(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        scheduler(**kwargs)


def test_a_pool_with_fewer_blocks_than_groups_is_refused() -> None:
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64)
    groups = tuple(KVCacheGroup(layers=(index,)) for index in range(3))
    with pytest.raises(ValueError, match=r"3 blocks of 16 tokens.*3 KV-cache groups.*num_gpu_blocks_override >= 4"):
        Scheduler(config, CacheConfig(block_size=16, num_blocks=3, groups=groups))
    assert Scheduler(config, CacheConfig(block_size=16, num_blocks=4, groups=groups)).max_tokens_per_request == 16


def test_after_a_failed_step_everything_can_be_ended() -> None:
    engine = scheduler(num_blocks=6)
    requests = [add(engine, name, 8) for name in "abc"]
    engine.schedule()
    assert not engine.reset_prefix_cache()
    assert engine.finish_all(RequestStatus.FINISHED_ERROR) == requests
    assert [request.finish_reason for request in requests] == ["error"] * 3
    assert engine.reset_prefix_cache()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    add(engine, "a", 8)
    assert work(engine.schedule()) == {"a": (0, 8, 1)}


def test_the_last_chunk_of_a_prompt_is_shared_in_its_own_step() -> None:
    engine = scheduler()
    add(engine, "a", 36)
    assert work(engine.schedule()) == {"a": (0, 32, 0)}
    again = Request("again", [*range(1000, 1036), 5], SamplingParams(max_tokens=3), eos_token_ids=EOS)
    engine.add_request(again)
    # nine blocks of four are full: eight of the step before, one of this one
    assert work(engine.schedule()) == {"a": (32, 4, 1), "again": (36, 1, 1)}


def test_blocks_that_decoding_fills_are_cached_when_their_tokens_are_known() -> None:
    engine = scheduler()
    a = add(engine, "a", 6)
    steps = [engine.schedule(), engine.schedule(), engine.schedule()]

    def cached() -> int:
        turn = Request("b", [*a.all_token_ids, 5, 6], SamplingParams())
        return engine.kv_cache_manager.get_computed_blocks(turn).num_tokens

    read(engine, steps[0])
    read(engine, steps[1])
    # both tokens of the second block are scheduled and known, and no step has been scheduled since
    assert (len(a.all_token_ids), a.num_computed_tokens, cached()) == (8, 8, 4)
    steps.append(engine.schedule())
    assert cached() == 8
    for step in steps[2:]:
        read(engine, step)
    read(engine, engine.schedule())
    read(engine, engine.schedule())
    assert len(a.all_token_ids) == 12
    assert engine.abort(["a"]) == [a]
    # what was not cached yet is not lost: all that is computed
    assert (a.num_computed_tokens, cached()) == (11, 8)


def test_blocks_of_outputs_are_cached_in_lots_and_at_the_end() -> None:
    engine = scheduler(max_model_len=200, block_size=32, max_num_batched_tokens=40)
    first = add(engine, "a", 40, max_tokens=150)
    cached = []
    while not first.is_finished:
        read(engine, engine.schedule())
        cached.append((first.num_tokens, len(engine.kv_cache_manager.pool._cached[0])))
    changes = [now for before, now in zip([(0, 0), *cached], cached, strict=False) if now[1] != before[1]]
    # the prompt's only full block; the first block that ends in outputs; two blocks of 32; what was full at the end,
    # of which the last token was never computed
    assert changes == [(41, 1), (65, 2), (129, 4), (190, 5)]


def test_what_is_computed_of_an_ended_request_is_what_is_certain() -> None:
    engine = scheduler()
    ended = add(engine, "a", 2)
    first = engine.schedule()
    engine.schedule()
    read(engine, first, 2)
    # its last token has no keys and values for sure: the step in flight may have stopped at it
    assert (ended.num_tokens, ended.num_computed_tokens) == (3, 2)


def test_times_are_in_order() -> None:
    engine = scheduler()
    a = add(engine, "a", 4)
    assert a.scheduled_ts == a.first_token_ts == 0.0
    read(engine, engine.schedule())
    first = a.first_token_ts
    read(engine, engine.schedule())
    assert 0 < a.arrival_time <= a.queued_ts <= a.scheduled_ts <= first == a.first_token_ts <= a.last_token_ts


def test_taking_in_a_step_makes_no_object_for_a_token() -> None:
    """They would make Python's collector go through the whole process every few hundred steps."""
    engine = scheduler(num_blocks=1000, block_size=64, max_num_seqs=200, max_num_batched_tokens=1000)
    requests = [add(engine, "abcdefgh"[i % 8] + str(i), 4) for i in range(200)]
    read(engine, engine.schedule())
    step = engine.schedule()
    output = StepOutput(token_ids=[7] * len(step.rows), counts=[1] * len(step.rows))
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        updates = engine.update(step, output)
        made = len(gc.get_objects()) - before
    finally:
        gc.enable()
    assert updates.requests == requests
    assert made < 20
