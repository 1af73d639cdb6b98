"""What is done before a step's tokens are known, and what can wait until the next launch is done."""

from __future__ import annotations

from test_scheduler import add, read, scheduler, work

from jaxllm.engine.step import StepOutput


def test_what_is_scheduled_ahead_is_part_of_the_next_step() -> None:
    engine = scheduler(long_prefill_token_threshold=8)
    add(engine, "a", 3)
    add(engine, "b", 20)
    first = engine.schedule()
    engine.schedule_ahead()
    add(engine, "c", 2)
    read(engine, first)
    second = engine.schedule()
    assert work(second) == {"a": (3, 1, True), "b": (8, 8, False), "c": (0, 2, True)}
    assert second.step == first.step + 1
    assert engine.schedule().step == second.step + 1


def test_who_ends_is_taken_back() -> None:
    engine = scheduler(max_num_batched_tokens=8)
    ended, aborted = add(engine, "a", 2), add(engine, "b", 2)
    add(engine, "c", 12)
    first = engine.schedule()
    engine.schedule_ahead()
    blocks = engine.kv_cache_manager.pool.num_used
    assert [update.finished for update in read(engine, first, 2)] == [True, False]
    assert ended.num_computed_tokens == 2 and ended.num_output_placeholders == 0
    engine.abort(["b"])
    assert aborted.num_output_placeholders == 0
    assert engine.kv_cache_manager.pool.num_used == blocks - 2
    # others get what they were to get
    add(engine, "d", 6)
    assert work(engine.schedule()) == {"c": (4, 6, False), "d": (0, 2, False)}


def test_nobody_is_preempted_ahead() -> None:
    """While a step runs that may end a request, whose blocks then suffice."""
    engine = scheduler(num_blocks=5, block_size=2)
    add(engine, "a", 3, max_tokens=1)
    survivor = add(engine, "b", 4)
    first = engine.schedule()
    engine.schedule_ahead()
    read(engine, first)
    second = engine.schedule()
    assert work(second) == {"b": (4, 1, True)} and survivor.num_preemptions == 0
    assert [(first, len(ids)) for _, _, first, ids in second.new_blocks] == [(2, 1)]


def test_blocks_of_a_step_that_is_not_launched_are_not_cached() -> None:
    engine = scheduler(max_num_batched_tokens=4)
    add(engine, "a", 12)
    first = engine.schedule()
    engine.cache_filled_blocks()
    engine.schedule_ahead()
    engine.cache_filled_blocks()
    engine.abort(["a"])
    read(engine, first)
    same = add(engine, "a", 12)
    assert work(engine.schedule())["a"][0] == 4
    assert same.num_cached_tokens == 4


def test_tokens_that_end_nobody_can_wait() -> None:
    engine = scheduler()
    goes_on, ends, stops = add(engine, "a", 2), add(engine, "b", 2, max_tokens=1), add(engine, "c", 2)
    step = engine.schedule()
    updates = engine.end_requests(step, StepOutput(token_ids=[7, 8, 2]))
    assert (ends.finish_reason, stops.finish_reason) == ("length", "stop")
    assert goes_on.output_token_ids == [] and len(updates) == 0
    assert work(engine.schedule()) == {"a": (2, 1, True)}
    engine.settle()
    assert [update.new_token_ids for update in updates] == [[7], [8], [2]]
    assert goes_on.output_token_ids == [7] and goes_on.num_output_placeholders == 1


def test_blocks_of_outputs_are_cached_in_lots_and_at_the_end() -> None:
    engine = scheduler(max_model_len=200, block_size=32)
    first = add(engine, "a", 40, max_tokens=150)
    cached = []
    while not first.is_finished:
        read(engine, engine.schedule())
        cached.append((first.num_tokens, len(engine.kv_cache_manager.pool._cached[0])))
    changes = [now for before, now in zip([(0, 0), *cached], cached, strict=False) if now[1] != before[1]]
    # the prompt's only full block; the first block that ends in outputs; two blocks of 32; what was full at the end,
    # of which the last token was never computed
    assert changes == [(40, 1), (65, 2), (129, 4), (190, 5)]


def test_what_is_computed_of_an_ended_request_does_not_grow_when_it_is_taken_back() -> None:
    engine = scheduler()
    ended = add(engine, "a", 2)
    first = engine.schedule()
    engine.schedule()
    engine.schedule_ahead()
    read(engine, first, 2)
    # its last token has no keys and values for sure: the step in flight may have stopped at it
    assert (ended.num_tokens, ended.num_computed_tokens) == (3, 2)
