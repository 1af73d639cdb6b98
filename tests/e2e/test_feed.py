"""How the prompts of a call get into the engine: any iterable, with back-pressure, in any order of completion."""

from __future__ import annotations

import copy
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import SMALL

from jaxllm import LLM, RequestOutput, RequestOutputKind, SamplingParams
from jaxllm.api.errors import ValidationError

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
PROMPTS = [f"prompt number {i} " * (i % 4 + 1) for i in range(30)]


@pytest.fixture(scope="module")
def expected(engine: LLM) -> list[str]:
    return [engine.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].text for prompt in PROMPTS]


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_any_iterable_will_do(engine: LLM, expected: list[str]):
    for prompts in (PROMPTS, tuple(PROMPTS), (p for p in PROMPTS), dict.fromkeys(PROMPTS).keys(), map(str, PROMPTS)):
        assert texts(engine.generate(prompts, GREEDY, use_tqdm=False)) == expected


def test_single_prompts_of_every_form(engine: LLM):
    ids = engine.get_tokenizer().encode(PROMPTS[0])
    forms: list[Any] = [
        PROMPTS[0],
        ids,
        iter(ids),
        {"prompt": PROMPTS[0]},
        {"prompt_token_ids": ids},
        {"prompt": ids},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    (chat,) = engine.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False)
    alone = [engine.generate(form, GREEDY, use_tqdm=False) for form in forms]
    assert all(len(outputs) == 1 for outputs in alone)
    found = [outputs[0].outputs[0].text for outputs in alone]
    assert found[:-1] == found[:1] * (len(forms) - 1)
    assert found[-1] == chat.outputs[0].text and alone[-1][0].prompt == "user: hi\n"


def test_an_endless_source_is_read_as_it_is_needed(engine: LLM, expected: list[str]):
    read = itertools.count()

    def endless() -> Iterator[str]:
        for number in read:
            yield PROMPTS[number % len(PROMPTS)]

    outputs = engine.as_completed(endless(), GREEDY)
    window = 256
    for count, output in enumerate(itertools.islice(outputs, 300), start=1):
        assert output.outputs[0].text == expected[output.index % len(PROMPTS)]
        ahead = next(copy.copy(read)) - count
        assert ahead <= window
    outputs.close()
    assert not engine.engine.client.has_unfinished
    assert engine.engine.core.cores[0].scheduler.kv_cache_manager.pool.num_used == 0


def test_outputs_may_make_the_next_prompts(engine: LLM, expected: list[str]):
    answers: queue.Queue[str] = queue.Queue()

    def source() -> Iterator[str]:
        yield PROMPTS[0]
        for prompt in PROMPTS[1:4]:
            assert answers.get(timeout=60) is not None
            yield prompt

    found = []
    for output in engine.as_completed(source(), GREEDY):
        found.append(output.outputs[0].text)
        answers.put(found[-1])
    assert found == expected[:4]


def test_outputs_come_in_the_order_of_completion(engine: LLM):
    long, short = SamplingParams(temperature=0.0, max_tokens=40), SamplingParams(temperature=0.0, max_tokens=2)
    outputs = list(engine.as_completed(PROMPTS[:3], [long, short, short]))
    assert [output.index for output in outputs][-1] == 0
    assert [o.index for o in engine.generate(PROMPTS[:3], [long, short, short], use_tqdm=False)] == [0, 1, 2]


def test_on_output_takes_what_is_finished(engine: LLM, expected: list[str]):
    taken: list[RequestOutput] = []
    assert engine.generate(PROMPTS, GREEDY, use_tqdm=False, on_output=taken.append) == []
    assert sorted(output.index for output in taken) == list(range(len(PROMPTS)))
    assert all(output.outputs[0].text == expected[output.index] for output in taken)


def test_an_error_in_the_callers_code_ends_the_call_alone(engine: LLM, expected: list[str]):
    def broken() -> Iterator[str]:
        yield from PROMPTS[:5]
        raise OSError("the file is gone")

    def refuse(output: RequestOutput) -> None:
        raise KeyError(output.index)

    with pytest.raises(OSError, match="the file is gone"):
        engine.generate(broken(), GREEDY, use_tqdm=False)
    with pytest.raises(KeyError):
        engine.generate(PROMPTS, GREEDY, use_tqdm=False, on_output=refuse)
    assert not engine.engine.client.has_unfinished
    assert texts(engine.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_bad_prompts_among_good_ones(engine: LLM, expected: list[str]):
    mixed: list[Any] = [PROMPTS[0], "", PROMPTS[1], {"messages": "hi"}, PROMPTS[2], [10**6], "x" * 300, PROMPTS[3]]
    outputs = engine.generate(iter(mixed), GREEDY, use_tqdm=False, on_error="return")
    assert [output.index for output in outputs] == list(range(len(mixed)))
    good = [output for output in outputs if output.error is None]
    assert texts(good) == expected[:4]
    reasons = [output.error or "" for output in outputs if output.error is not None]
    assert len(reasons) == 4
    for reason, words in zip(
        reasons, ("empty", "messages must be", "out of vocabulary", "maximum model length"), strict=True
    ):
        assert words in reason
    conversations: list[Any] = [[{"role": "user", "content": "hi"}], [{"content": "who am I?"}], []]
    outputs = engine.chat(conversations, GREEDY, use_tqdm=False, on_error="return")
    assert [output.error is None for output in outputs] == [True, False, False]
    hi = {"messages": [{"role": "user", "content": "hi"}]}
    wrong: list[Any] = [{**hi, "chat_template_kwargs": value} for value in (3, {"tools": []}, {4: 5})]
    outputs = engine.generate([hi, *wrong], GREEDY, use_tqdm=False, on_error="return")
    assert [output.error is None for output in outputs] == [True, False, False, False]
    assert all("chat_template_kwargs" in (output.error or "") for output in outputs[1:])
    with pytest.raises(ValidationError, match="role"):
        engine.chat(conversations, GREEDY, use_tqdm=False)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_tokenizer_pool_changes_nothing(tiny_model: Path, expected: list[str], workers: int):
    with LLM(tiny_model, tokenizer_pool_size=workers, **SMALL) as llm:
        before = threading.active_count()
        assert texts(llm.generate(PROMPTS * 10, GREEDY, use_tqdm=False)) == expected * 10
        # a pool starts a thread where none is idle
        assert min(workers, 1) <= threading.active_count() - before <= workers
        assert [output.prompt_token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == [
            llm.get_tokenizer().encode(prompt) for prompt in PROMPTS
        ]


def test_threads_share_the_engine(engine: LLM, expected: list[str]):
    found: dict[int, list[str]] = {}

    def work(number: int) -> None:
        found[number] = texts(engine.generate(PROMPTS[number::5], GREEDY, use_tqdm=False))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: expected[number::5] for number in range(5)}


def test_the_callers_objects_are_left_alone(engine: LLM):
    params = [
        SamplingParams(temperature=0.5, seed=1, max_tokens=3, stop=["x"], logit_bias={1: 200.0}) for _ in range(2)
    ]
    prompts: list[Any] = [{"prompt": "a"}, {"messages": [{"role": "user", "content": [{"type": "text", "text": "b"}]}]}]
    before = copy.deepcopy((params, prompts))
    engine.generate(prompts, params, use_tqdm=False)
    list(engine.stream("a", params[0]))
    assert (params, prompts) == before
    assert params[0].output_kind is RequestOutputKind.CUMULATIVE


CALLS: dict[str, tuple[Callable[[LLM], Any], str]] = {
    "fewer params": (lambda e: e.generate(PROMPTS[:4], [GREEDY] * 3), r"lengths of prompts \(4\) and params \(3\)"),
    "more params": (lambda e: e.generate(PROMPTS[:2], [GREEDY] * 3), r"lengths of prompts \(2\) and params \(3\)"),
    "fewer, unknown": (lambda e: e.generate(iter(PROMPTS[:4]), [GREEDY] * 3), r"\(at least 4\) and params \(3\)"),
    "more, unknown": (lambda e: e.generate(iter(PROMPTS[:2]), iter([GREEDY] * 3)), "2 prompts, and more params"),
    "priority": (lambda e: e.generate(PROMPTS[:2], GREEDY, priority=[0]), r"\(2\) and priority \(1\)"),
    "on_error": (lambda e: e.generate("x", GREEDY, on_error="ignore"), "got 'ignore'"),
    "no side": (lambda e: e.generate("x", tokenization_kwargs={"truncation_side": "top"}), "'top'"),
    "nothing left": (lambda e: e.generate("x", tokenization_kwargs={"truncate_prompt_tokens": 0}), "at least 1"),
    "unknown option": (lambda e: e.generate("x", tokenization_kwargs={"padding": True}), "'padding'"),
    "stream of n": (lambda e: e.stream("x", SamplingParams(n=2)), "n=2"),
}


@pytest.mark.parametrize(("call", "words"), CALLS.values(), ids=CALLS)
def test_bad_calls_say_what_is_wrong(engine: LLM, call: Callable[[LLM], Any], words: str):
    with pytest.raises(ValidationError, match=words):
        call(engine)


def test_prompts_are_truncated_when_asked_for(engine: LLM):
    ids = list(range(65, 95))

    def left(**options: Any) -> list[int]:
        return engine.generate({"prompt_token_ids": ids * 10}, GREEDY, use_tqdm=False, tokenization_kwargs=options)[
            0
        ].prompt_token_ids

    assert left(truncate_prompt_tokens=5) == ids[-5:]
    assert left(truncate_prompt_tokens=5, truncation_side="right") == ids[:5]
    assert left(truncation=True, max_length=7) == ids[:7]
    assert left(truncate_prompt_tokens=-1) == (ids * 10)[-255:]


def fail_elsewhere(llm: LLM) -> None:
    """Another call, whose step ends every request."""

    def fail() -> None:
        raise OSError("the device is gone")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="the device is gone"):
        patch.setattr(llm.engine.core, "step", fail)
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)


def test_what_another_call_does_between_two_outputs_is_told(engine: LLM):
    """Two outputs come with the same step; the engine fails when one of them has been taken."""
    for on_error in ("raise", "return"):
        outputs = engine.as_completed(["a", "b", "c" * 200], GREEDY, on_error=on_error)
        assert next(outputs).error is None
        fail_elsewhere(engine)
        assert next(outputs).error is None
        if on_error == "raise":
            with pytest.raises(RuntimeError, match="the device is gone"):
                next(outputs)
        else:
            assert "the device is gone" in (next(outputs).error or "")
        assert next(outputs, None) is None


def test_what_another_call_does_to_enqueued_requests_is_told(engine: LLM, expected: list[str]):
    engine.enqueue(PROMPTS[:2], GREEDY)
    fail_elsewhere(engine)
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.wait_for_completion(use_tqdm=False)
    assert engine.wait_for_completion(use_tqdm=False) == []
    assert texts(engine.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
