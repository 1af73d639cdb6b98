"""Who is preempted, what becomes of it, and what the log says about it."""

from __future__ import annotations

import logging

import pytest
from test_scheduler import RequestUpdate, add, read, scheduler, work

from jaxllm.engine.request import RequestStatus


def test_the_latest_admission_is_preempted_and_comes_back_first() -> None:
    engine = scheduler(num_blocks=6)
    add(engine, "a", 8, max_tokens=2)
    b, c = add(engine, "b", 8), add(engine, "c", 1)
    step = engine.schedule()
    assert list(work(step)) == ["a", "b", "c"]
    read(engine, step)
    # a's third block is c's, the youngest's; for b's third one nobody younger is left.
    step = engine.schedule()
    assert work(step) == {"a": (8, 1, 1)}
    assert [c.status, b.status] == [RequestStatus.PREEMPTED, RequestStatus.PREEMPTED]
    assert (b.num_preemptions, b.num_computed_tokens, b.row, b.num_tokens) == (1, 0, -1, 9)
    assert engine.stats().num_preemptions == 2
    assert engine.stats().num_preempted_tokens == 9
    assert engine.waiting.peek() is b
    read(engine, step)
    step = engine.schedule()
    # b finds its own two blocks, which nobody needed meanwhile, and computes its output; c had no full block.
    assert work(step) == {"b": (8, 1, 1), "c": (0, 2, 1)}
    back = step.admitted[0]
    assert (back.num_prompt_tokens, back.num_computed_tokens, back.token_ids) == (8, 8, b.all_token_ids)
    assert b.num_cached_tokens == 0, "hits are those of the first admission"
    assert engine.kv_cache_manager.prefix_cache_stats.preempted_hits == 8


def test_a_request_preempts_itself_when_it_is_the_youngest() -> None:
    engine = scheduler(num_blocks=5)
    a, b = add(engine, "a", 5), add(engine, "b", 8)
    read(engine, engine.schedule())
    step = engine.schedule()
    assert work(step) == {"a": (5, 1, 1)}
    assert b.status is RequestStatus.PREEMPTED and a.status is RequestStatus.RUNNING


def test_priority_picks_the_most_urgent_and_preempts_the_least() -> None:
    engine = scheduler(num_blocks=7, policy="priority")
    low, high, middle = (
        add(engine, "a", 7, priority=5),
        add(engine, "b", 3, priority=1),
        add(engine, "c", 8, priority=3),
    )
    step = engine.schedule()
    assert list(work(step)) == ["b", "c", "a"]
    read(engine, step)
    # c needs its third block; one is free. Then b and a decode within theirs.
    step = engine.schedule()
    assert work(step) == {"b": (3, 1, 1), "c": (8, 1, 1), "a": (7, 1, 1)}
    read(engine, step)
    step = engine.schedule()
    # b's second block is taken from a, the least urgent
    assert work(step) == {"b": (4, 1, 1), "c": (9, 1, 1)}
    assert low.status is RequestStatus.PREEMPTED
    assert high.num_preemptions == middle.num_preemptions == 0


@pytest.mark.parametrize(("length", "num_blocks"), [(5, 7), (7, 8)], ids=["in its blocks", "with a new block"])
def test_the_least_urgent_gives_way_even_if_it_runs_longest(length: int, num_blocks: int) -> None:
    engine = scheduler(num_blocks=num_blocks, policy="priority")
    low = add(engine, "a", length, priority=5)
    read(engine, engine.schedule())
    high = add(engine, "b", 16, priority=1)
    step = engine.schedule()
    assert work(step) == {"a": (length, 1, 1), "b": (0, 16, 1)}
    read(engine, step)
    # b comes first, whose fifth block is one of a's; then there is no a.
    step = engine.schedule()
    assert work(step) == {"b": (16, 1, 1)}
    assert [len(entries) for entries in (step.rows, step.starts, step.counts, step.wanted)] == [1] * 4
    assert [entry[:3] for entry in step.new_blocks] == [(high.row, 0, 4)]
    assert (low.status, low.num_output_placeholders, low.num_output_tokens) == (RequestStatus.PREEMPTED, 0, 2)
    assert engine.stats().num_preempted_tokens == length + 1
    assert engine.kv_cache_manager.pool.num_used == 5


def test_what_a_victim_would_have_got_goes_to_the_others() -> None:
    engine = scheduler(num_blocks=8, max_num_batched_tokens=6, policy="priority", reserve_full_prompt=False)
    add(engine, "a", 5, priority=5)
    read(engine, engine.schedule())
    add(engine, "b", 8, priority=1)
    for _ in range(5):
        read(engine, engine.schedule())
    add(engine, "c", 20, priority=1)
    step = engine.schedule()
    assert work(step) == {"a": (10, 1, 1), "b": (11, 1, 1), "c": (0, 4, 0)}
    read(engine, step)
    # b gets a block of a's: of the six tokens five are left for c, not four.
    assert work(engine.schedule()) == {"b": (12, 1, 1), "c": (4, 5, 0)}


def test_what_a_victim_did_not_get_to_compute_is_no_prefix_hit() -> None:
    engine = scheduler(num_blocks=8, policy="priority", long_prefill_token_threshold=8, reserve_full_prompt=False)
    add(engine, "a", 27, priority=5)
    add(engine, "z", 3, priority=9)
    read(engine, engine.schedule())
    engine.abort(["z"])
    add(engine, "b", 4, priority=1)
    step = engine.schedule()
    assert work(step) == {"a": (8, 8, 0), "b": (0, 4, 1)}
    read(engine, step)
    # a was to fill blocks 4 and 5 in this step; b takes one of them, and the other has a's tokens only in name.
    step = engine.schedule()
    assert work(step) == {"b": (4, 1, 1)}
    read(engine, step)
    engine.abort(["b"])
    step = engine.schedule()
    assert work(step) == {"a": (16, 11, 1)}
    assert step.admitted[0].num_computed_tokens == 16


def test_a_preempted_request_keeps_what_is_on_its_way_and_waits_for_it() -> None:
    engine = scheduler(num_blocks=6)
    a, b = add(engine, "a", 8), add(engine, "b", 8)
    steps = [engine.schedule(), engine.schedule()]
    assert work(steps[1]) == {"a": (8, 1, 1)}
    assert b.status is RequestStatus.PREEMPTED and b.num_output_placeholders == 1
    engine.abort(["a"])
    assert engine.schedule().rows == [], "there is room, but b does not know all of its tokens"
    read(engine, steps[0], 50, 51)
    assert b.output_token_ids == [51]
    step = engine.schedule()
    assert step.admitted[0].token_ids == [*b.prompt_token_ids, 51]
    assert work(step) == {"b": (8, 1, 1)}
    assert a.output_token_ids == []


def test_a_preempted_request_can_end_with_what_was_on_its_way() -> None:
    engine = scheduler(num_blocks=6)
    add(engine, "a", 8)
    b = add(engine, "b", 8)
    first = engine.schedule()
    engine.schedule()
    updates = read(engine, first, 50, 2)
    assert updates[1] == RequestUpdate(b, [2], True)
    assert (len(engine.waiting), engine.num_unfinished, b.finish_reason) == (0, 1, "stop")


def test_the_warning_says_what_was_lost_and_what_would_have_avoided_it(caplog: pytest.LogCaptureFixture) -> None:
    def run(num_blocks: int, max_num_seqs: int = 4) -> int:
        engine = scheduler(num_blocks=num_blocks, max_num_seqs=max_num_seqs)
        for name in "abc":
            add(engine, name, 8, max_tokens=9)
        while engine.has_unfinished:
            read(engine, engine.schedule())
        return engine.stats().num_preemptions

    with caplog.at_level(logging.WARNING, "jaxllm"):
        assert run(num_blocks=9) > 0
    message = caplog.records[0].getMessage()
    assert message.startswith(
        "Sequence group c is preempted by PreemptionMode.RECOMPUTE mode because there is not enough KV cache space. "
        "This can affect the end-to-end performance. Increase gpu_memory_utilization or tensor_parallel_size to "
        "provide more KV cache memory. total_cumulative_preemption_cnt=1."
    )
    # Three requests of 9 tokens need 3 blocks each; 16 of the 17 tokens they end with need 4 each.
    assert "need 9 blocks now and at most 12 until they end; the cache has 8." in message
    assert "num_gpu_blocks_override >= 10 would have avoided this preemption" in message
    assert "num_gpu_blocks_override >= 13 or max_num_seqs <= 2 every one" in message
    assert "Lost: 8 computed tokens" in message
    # The advice is true, and not more than what is needed.
    assert run(num_blocks=13) == 0 < run(num_blocks=12)
    assert run(num_blocks=9, max_num_seqs=2) == 0


def test_the_warning_comes_first_and_then_every_fiftieth_time(caplog: pytest.LogCaptureFixture) -> None:
    engine = scheduler(num_blocks=4)
    with caplog.at_level(logging.WARNING, "jaxllm"):
        for index in range(120):
            add(engine, f"a{index}", 4, max_tokens=5)
            add(engine, f"b{index}", 4, max_tokens=5)
            while engine.has_unfinished:
                read(engine, engine.schedule())
    assert engine.stats().num_preemptions >= 100
    logged = [record.getMessage().split("preemption_cnt=")[1].split(".")[0] for record in caplog.records]
    assert logged[:3] == ["1", "50", "100"]


def test_preempting_everybody_counts_as_well() -> None:
    engine = scheduler()
    running = [add(engine, name, 5) for name in "ab"]
    read(engine, engine.schedule())
    engine.preempt_all()
    assert [request.num_preemptions for request in running] == [1, 1]
    stats = engine.stats()
    # five tokens of each prompt
    assert (stats.num_preemptions, stats.num_preempted_tokens, stats.num_running, stats.num_waiting) == (2, 10, 0, 2)
    assert stats.kv_cache_usage == 0
