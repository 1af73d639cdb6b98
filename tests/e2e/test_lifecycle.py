"""What an engine leaves behind: after Ctrl-C, after an error in a step, after its end. It must be nothing."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from support.live_buffers import live
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams
from jaxllm.engine.observe.progress import Progress
from jaxllm.engine.step import StepFuture
from jaxllm.runner.heads.sampling import SamplingHead
from jaxllm.runner.heads.step_results import StepResult
from jaxllm.runner.runner import Runner

PROMPTS = [
    list(range(first, first + length)) for first, length in ((1, 5), (7, 40), (90, 17), (60, 1), (30, 70), (3, 9))
]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)


class Failure(Exception):
    """Raised on purpose."""


def gauge(llm: LLM, name: str) -> float:
    (metric,) = [metric for metric in llm.get_metrics() if metric.name == name]
    return metric.value  # pyright: ignore[reportAttributeAccessIssue]


def tokens(llm: LLM, prompts: list[list[int]] | None = None) -> list[list[int]]:
    outputs = llm.generate(PROMPTS if prompts is None else prompts, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def assert_idle(llm: LLM) -> None:
    core = llm.engine.core.cores[0]
    assert not core.has_unfinished
    assert not core._in_flight
    assert core.scheduler.kv_cache_manager.pool.num_used == 0
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert gauge(llm, name) == 0


@pytest.fixture(scope="module")
def expected(engine: LLM) -> list[list[int]]:
    return tokens(engine)


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Do `action` inside the launch of the `number`-th step from now."""
    execute, count = Runner.execute, iter(range(1, 10**6))

    def wrapped(self: Runner, scheduled: Any) -> StepFuture:
        result = execute(self, scheduled)
        if next(count) == number:
            action()
        return result

    monkeypatch.setattr(Runner, "execute", wrapped)


def fail() -> None:
    raise Failure


# Ctrl-C.


def test_ctrl_c_ends_generate_and_leaves_the_engine_usable(
    engine: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    reached = threading.Event()
    at_step(monkeypatch, 5, reached.set)

    def press() -> None:
        reached.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, LONG, use_tqdm=False)
    presser.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_idle(engine)
    assert tokens(engine) == expected


def test_the_first_ctrl_c_lets_the_step_finish_the_second_does_not(
    engine: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    after_first = []

    def press_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        after_first.append(True)
        signal.raise_signal(signal.SIGINT)
        after_first.append(False)

    at_step(monkeypatch, 3, press_twice)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, LONG, use_tqdm=False)
    assert after_first == [True]
    assert_idle(engine)
    assert tokens(engine) == expected


def test_a_ctrl_c_in_the_very_last_step_is_not_swallowed(engine: LLM, monkeypatch: pytest.MonkeyPatch):
    one = SamplingParams(temperature=0, max_tokens=1)
    monkeypatch.setattr(Progress, "__exit__", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS[:1], one, use_tqdm=False)
    assert_idle(engine)


def test_the_handler_of_somebody_else_stays_in_charge(engine: LLM, monkeypatch: pytest.MonkeyPatch):
    seen = []
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    previous = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        assert len(tokens(engine)) == len(PROMPTS)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [1]


# An error inside a step.


def test_an_error_at_a_launch_ends_every_request(
    engine: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    for step in (1, 2, 6):
        with monkeypatch.context() as patch:
            at_step(patch, step, fail)
            with pytest.raises(Failure):
                engine.generate(PROMPTS, LONG, use_tqdm=False)
        assert_idle(engine)
        assert tokens(engine) == expected


def test_an_error_while_reading_a_step_ends_every_request(
    engine: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    read, count = StepResult.result, iter(range(1, 10**6))

    def result(self: StepResult) -> Any:
        if next(count) == 4:
            fail()
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(StepResult, "result", result)
        with pytest.raises(Failure):
            engine.generate(PROMPTS, LONG, use_tqdm=False)
    assert_idle(engine)
    assert tokens(engine) == expected


def test_an_error_after_the_donation_of_the_cache(
    engine: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    forward, count = SamplingHead._forward, iter(range(1, 10**6))

    def lose_the_cache(self: SamplingHead, *args: Any) -> Any:
        result = forward(self, *args)
        if next(count) == 3:
            for array in jax.tree.leaves(result[0]):
                array.delete()
            fail()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(SamplingHead, "_forward", lose_the_cache)
        with pytest.raises(Failure):
            engine.generate(PROMPTS, LONG, use_tqdm=False)
    assert_idle(engine)
    assert tokens(engine) == expected


def test_an_error_while_the_rest_is_read_ends_every_request(
    engine: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """The step that is still in flight when a stream is closed."""
    stream = engine.stream_chat([{"role": "user", "content": "abc"}], LONG)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(StepResult, "result", lambda self: fail())
        with pytest.raises(Failure):
            stream.close()
    assert_idle(engine)
    assert tokens(engine) == expected


# Streams.


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_stream_that_is_closed_early_frees_its_request(engine: LLM, expected: list[list[int]]):
    stream = engine.stream_chat(chat("hello"), LONG)
    next(stream)
    assert engine.engine.core.has_unfinished
    stream.close()
    assert_idle(engine)
    assert tokens(engine) == expected


def test_a_stream_that_is_dropped_frees_its_request(engine: LLM):
    stream = engine.stream_chat(chat("hello"), LONG)
    next(stream)
    del stream
    gc.collect()
    assert_idle(engine)


def test_streams_and_generate_share_the_engine(engine: LLM, expected: list[list[int]]):
    alone = "".join(engine.stream_chat(chat("hello"), LONG))
    assert alone == engine.chat(chat("hello"), LONG, use_tqdm=False)[0].outputs[0].text
    first, second = engine.stream_chat(chat("hello"), LONG), engine.stream_chat(chat("hello"), LONG)
    pieces = [next(first), next(second)]
    assert tokens(engine) == expected
    assert alone == pieces[1] + "".join(second)
    assert alone == pieces[0] + "".join(first)
    assert_idle(engine)


def test_a_stream_says_so_when_an_error_in_another_call_ends_it(engine: LLM, monkeypatch: pytest.MonkeyPatch):
    stream = engine.stream_chat(chat("hello"), LONG)
    next(stream)
    with monkeypatch.context() as patch:
        at_step(patch, 2, fail)
        with pytest.raises(Failure):
            tokens(engine)
    with pytest.raises(RuntimeError, match="cut short"):
        list(stream)
    assert_idle(engine)


# The engine's end.


def test_everything_is_freed_and_another_engine_starts(tiny_model: Path, expected: list[list[int]]):
    before = live()

    llm = LLM(tiny_model, **SMALL)
    assert tokens(llm) == expected
    assert live() > before
    llm.shutdown()
    assert live() <= before
    llm.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        tokens(llm)

    with LLM(tiny_model, **SMALL) as second:
        assert tokens(second) == expected
        assert live() > before
    assert live() <= before

    third = LLM(tiny_model, **SMALL)
    stream = third.stream_chat(chat("hello"), LONG)
    next(stream)
    del stream, third
    assert live() <= before


def test_an_engine_that_is_shut_down_in_the_middle_of_a_stream(tiny_model: Path):
    before = live()
    llm = LLM(tiny_model, **SMALL)
    stream = llm.stream_chat(chat("hello"), LONG)
    next(stream)
    llm.shutdown()
    with pytest.raises(RuntimeError, match="cut short"):
        list(stream)
    assert live() <= before


def test_calls_from_several_threads_do_not_disturb_each_other(tiny_model: Path):
    with LLM(tiny_model, **SMALL) as llm:
        alone = [tokens(llm, [prompt])[0] for prompt in PROMPTS]
        results: dict[int, list[list[int]]] = {}

        def call(i: int) -> None:
            results[i] = [tokens(llm, [PROMPTS[i]])[0] for _ in range(3)]

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(PROMPTS))]
        stream = llm.stream_chat([{"role": "user", "content": "hello"}], LONG)
        next(stream)
        for thread in threads:
            thread.start()
        rest = list(stream)
        for thread in threads:
            thread.join(timeout=120)
        assert rest
        assert results == {i: [expected] * 3 for i, expected in enumerate(alone)}
        assert_idle(llm)
