"""Several decode steps in one launch change nothing of what is generated, of why it ends, and of what is cached."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import EOS

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput
from jaxllm.api.sampling_params import RequestOutputKind
from jaxllm.engine.observe.step_observer import StepObserver
from jaxllm.engine.step import SchedulerOutput

STEPS = 6
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 8,
    "block_size": 8,
}


class Launches(StepObserver):
    """Counts what was launched."""

    def __init__(self) -> None:
        self.single, self.several = 0, 0

    def launched(self, step: SchedulerOutput) -> None:
        self.several += step.num_steps > 1
        self.single += step.num_steps == 1


@pytest.fixture(scope="module")
def single(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **ARGUMENTS, num_gpu_blocks_override=129, enforce_eager=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def several(tiny_model: Path) -> Iterator[LLM]:
    """With a pool that does not hold eight long requests."""
    with LLM(tiny_model, **ARGUMENTS, num_gpu_blocks_override=40, num_decode_steps=STEPS) as llm:
        yield llm


def ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(256) for _ in range(count)]


def results(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    completions = [output.outputs[0] for output in outputs]
    return [(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in completions]


def compare(single: LLM, several: LLM, prompts: list[list[int]], params: Any) -> tuple[list[RequestOutput], Launches]:
    """The same requests on both engines give the same; returns what, and the launches that several steps took."""
    launches = Launches()
    for llm in (single, several):
        llm.reset_prefix_cache()
    wanted = single.generate(prompts, params, use_tqdm=False)
    several.engine.core.observe(launches)
    got = several.generate(prompts, params, use_tqdm=False)
    several.engine.core.stop_observing(launches)
    assert results(got) == results(wanted)
    assert several.engine.core.cores[0].scheduler.kv_cache_manager.pool.num_used == 0
    return got, launches


GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 5}
PENALISED: dict[str, Any] = {
    **SAMPLED,
    "presence_penalty": 0.7,
    "frequency_penalty": 0.4,
    "repetition_penalty": 1.2,
    "top_k": 40,
}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
def test_lengths_of_every_kind(single: LLM, several: LLM, sampling: dict[str, Any]):
    """Lengths that are no multiple of the steps, and batches of which some rows are done early."""
    rng = random.Random(1)
    prompts = [ids(rng, length) for length in (1, 7, 8, 9, 30, 64, 3, 17)]
    params = [SamplingParams(**sampling, max_tokens=n, ignore_eos=True) for n in (1, 2, 5, 6, 7, 13, 40, 57)]
    outputs, launches = compare(single, several, prompts, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 5, 6, 7, 13, 40, 57]
    assert launches.several >= 8
    (_, alone) = compare(single, several, prompts[:1], params[-1])
    assert alone.single + alone.several <= 1 + 1 + 1 + 57 // STEPS + 2


def test_the_end_of_the_context(single: LLM, several: LLM):
    params = SamplingParams(**GREEDY, max_tokens=None, ignore_eos=True)
    for length in (100, 111, 121, 127):
        (output,), launches = compare(single, several, [ids(random.Random(2), length)], params)
        assert len(output.outputs[0].token_ids) == 128 - length
        assert (launches.several > 0) == (length < 127)


@pytest.mark.parametrize("sampling", [GREEDY, PENALISED], ids=["greedy", "penalised"])
def test_stop_ids_at_every_position(single: LLM, several: LLM, sampling: dict[str, Any]):
    """And what is in the prefix cache afterwards is what was computed: a follow-up hits it and goes on alike."""
    prompt = ids(random.Random(3), 13)
    (whole,) = single.generate(prompt, SamplingParams(**sampling, max_tokens=30, ignore_eos=True), use_tqdm=False)
    tokens = whole.outputs[0].token_ids
    stops = [i for i, token in enumerate(tokens) if token not in tokens[:i]]
    assert len(stops) > 14
    base = SamplingParams(**sampling, max_tokens=30, ignore_eos=True)
    params = [dataclasses.replace(base, stop_token_ids=[tokens[i]]) for i in stops]
    for first in range(0, len(stops), 8):
        some = params[first : first + 8]
        outputs, launches = compare(single, several, [prompt] * len(some), some)
        assert launches.several
        for i, output in zip(stops[first:], outputs, strict=False):
            assert (output.outputs[0].token_ids, output.outputs[0].stop_reason) == (tokens[: i + 1], tokens[i])
    for i, stopping in zip(stops, params, strict=True):
        several.reset_prefix_cache()
        several.generate(prompt, stopping, use_tqdm=False)
        (following,) = several.generate(prompt + tokens[: i + 1] + [5], SamplingParams(**GREEDY), use_tqdm=False)
        single.reset_prefix_cache()
        (wanted,) = single.generate(prompt + tokens[: i + 1] + [5], SamplingParams(**GREEDY), use_tqdm=False)
        assert following.num_cached_tokens == (13 + i) // 8 * 8
        assert results([following]) == results([wanted])


def test_eos(single: LLM, several: LLM):
    """EOS ends it on the device, is passed over with ignore_eos, and does not come before min_tokens."""
    rng = random.Random(4)
    prompts = [ids(rng, 5) for _ in range(8)]
    bias: dict[str, Any] = {"logit_bias": {EOS: 10.0}, **SAMPLED}
    params = [
        SamplingParams(**{**bias, "seed": i}, max_tokens=50, min_tokens=0 if i < 4 else 20, ignore_eos=i in (2, 6))
        for i in range(8)
    ]
    outputs, launches = compare(single, several, prompts, params)
    assert launches.several
    _, before = compare(single, several, prompts[4:], dataclasses.replace(params[4], min_tokens=18, max_tokens=18))
    assert before.several
    ended = [output.outputs[0].finish_reason for output in outputs]
    assert ended.count("stop") >= 4 and ended[2] == ended[6] == "length"
    assert EOS in outputs[2].outputs[0].token_ids
    assert all(len(output.outputs[0].token_ids) > 20 for output in outputs[4:])


def test_constraints_that_stay_as_they_are(single: LLM, several: LLM):
    prompts = [ids(random.Random(5), 4)] * 4
    params = [
        SamplingParams(**GREEDY, max_tokens=20, ignore_eos=True, allowed_token_ids=list(range(40, 60))),
        SamplingParams(**PENALISED, max_tokens=20, ignore_eos=True, logit_bias={7: 3.0, 9: -2.0}),
        SamplingParams(**SAMPLED, max_tokens=20, ignore_eos=True, bad_words=["a", "bc", "e f"]),
        SamplingParams(**GREEDY, max_tokens=20, ignore_eos=True),
    ]
    assert compare(single, several, prompts, params)[1].several


@pytest.mark.parametrize(
    "options",
    [
        {"stop": ["never to be found"]},
        {"logprobs": 1},
        {"stop_token_ids": list(range(200, 220))},
        {"stop_token_ids": list(range(200, 220)), "min_tokens": 20},
        {"repetition_detection": {"max_pattern_size": 3, "min_count": 9}},
        {"structured_outputs": {"regex": "[a-z]{20}"}},
    ],
    ids=lambda options: ", ".join(options),
)
def test_what_needs_the_host_gets_single_steps(single: LLM, several: LLM, options: dict[str, Any]):
    """So do those beside it."""
    prompts = [ids(random.Random(6), 4)] * 2
    (plain,) = single.generate(prompts[0], SamplingParams(**GREEDY, max_tokens=20, ignore_eos=True), use_tqdm=False)
    if "stop_token_ids" in options:
        never = [token for token in range(256) if token not in plain.outputs[0].token_ids]
        options = {**options, "stop_token_ids": never[: len(options["stop_token_ids"])]}
    params = [
        SamplingParams(**GREEDY, max_tokens=20, **options),
        SamplingParams(**GREEDY, max_tokens=20, ignore_eos=True),
    ]
    assert compare(single, several, prompts, params)[1].several == 0


def test_streams_get_every_token_by_itself(several: LLM):
    params = SamplingParams(**GREEDY, max_tokens=24, ignore_eos=True)
    launches = Launches()
    several.engine.core.observe(launches)
    pieces = list(several.stream("abc", params))
    assert len(pieces) > 12 and launches.several == 0
    coarse = list(several.stream("abc", dataclasses.replace(params, stream_interval=4)))
    several.engine.core.stop_observing(launches)
    assert "".join(coarse) == "".join(pieces) and launches.several


class Traffic:
    """Requests added to an engine's core between its steps."""

    def __init__(self, llm: LLM):
        self.llm, self.core = llm, llm.engine.core.cores[0]
        self.requests: list[Any] = []

    def add(self, prompt: list[int], params: SamplingParams, **options: Any) -> Any:
        final = dataclasses.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
        request, text = self.llm.engine.inputs.request(f"t{len(self.requests)}", prompt, final, **options)
        self.core.add_request(request, text)
        self.requests.append(request)
        return request

    def finish(self) -> None:
        while self.core.has_unfinished:
            self.core.step()
        self.core.drain()
        assert self.core.scheduler.kv_cache_manager.pool.num_used == 0


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_arrivals_aborts_and_preemptions(single: LLM, several: LLM, asynchronous: bool, monkeypatch: Any):
    monkeypatch.setattr(several.engine.core, "_depth", 2 if asynchronous else 1)
    several.reset_prefix_cache()
    rng = random.Random(7)
    prompts = [ids(rng, rng.randint(1, 30)) for _ in range(24)]
    lengths = [rng.randint(3, 90) for _ in prompts]
    kinds = [
        SamplingParams(**rng.choice((GREEDY, PENALISED)), max_tokens=length, stop_token_ids=ids(rng, 3))
        for length in lengths
    ]
    wanted = single.generate(prompts, kinds, use_tqdm=False)
    traffic, launches = Traffic(several), Launches()
    traffic.core.observe(launches)
    aborted = []
    for prompt, params in zip(prompts, kinds, strict=True):
        request = traffic.add(prompt, params)
        for _ in range(rng.choice((0, 1, 4, 12))):
            traffic.core.step()
        if rng.random() < 0.2 and not request.is_finished:
            traffic.core.abort([request.request_id])
            aborted.append(request)
    traffic.finish()
    traffic.core.stop_observing(launches)
    assert launches.several > 5 and aborted
    assert sum(request.num_preemptions for request in traffic.requests) > 0
    for request, output in zip(traffic.requests, wanted, strict=True):
        tokens = output.outputs[0].token_ids
        if request in aborted:
            assert request.output_token_ids == tokens[: request.num_output_tokens]
        else:
            assert request.output_token_ids == tokens
            assert request.finish_reason == output.outputs[0].finish_reason


def test_the_number_of_steps_begins_small_and_grows(several: LLM):
    traffic = Traffic(several)
    steps: list[int] = []

    class Steps(StepObserver):
        def launched(self, step: SchedulerOutput) -> None:
            steps.append(step.num_steps)

    observer = Steps()
    traffic.core.observe(observer)
    params = SamplingParams(**GREEDY, max_tokens=60, ignore_eos=True)
    traffic.add([1, 2, 3], params)
    while len(steps) < 6:
        traffic.core.step()
    assert steps == [1, 1, 2, 4, 6, 6]
    traffic.add([4, 5], params)
    traffic.finish()
    assert steps[6:11] == [1, 1, 2, 4, 6]
    traffic.core.stop_observing(observer)


def test_asking_for_it(tiny_model: Path, caplog: pytest.LogCaptureFixture):
    arguments = {**ARGUMENTS, "load_format": "null"}
    with LLM(tiny_model, **arguments, num_scheduler_steps=4) as llm:
        assert llm.engine.core.cores[0].scheduler.config.num_decode_steps == 4
        launches = Launches()
        llm.engine.core.observe(launches)
        (output,) = llm.generate("abc", SamplingParams(max_tokens=30), use_tqdm=False)
        tokens = output.outputs[0].token_ids
        assert len(tokens) == 30 and launches.several > 5
        stopping = SamplingParams(max_tokens=30, stop_token_ids=[tokens[9]])
        (stopped,) = llm.generate("abc", stopping, use_tqdm=False)
        assert stopped.outputs[0].token_ids == tokens[:10]
    with LLM(tiny_model, **arguments, num_decode_steps=4, enforce_eager=True) as llm:
        assert llm.engine.core.cores[0].scheduler.config.num_decode_steps == 1
    assert "num_decode_steps=4 has no effect with enforce_eager=True" in caplog.text
    with pytest.raises(ValidationError, match="two names"):
        LLM(tiny_model, num_decode_steps=4, num_scheduler_steps=8)
