"""Replicas of a model answer as one does, and as one engine: whatever is asked, and whatever becomes of them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.data_parallel import found_with
from support.own_process import found_by
from support.tensor_parallel import ARGUMENTS, GREEDY, PROMPTS, SEEDED, generate, tokens

import jaxllm
from jaxllm import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    LateChunkingParams,
    LLMEngine,
    PoolingParams,
    RequestOutputKind,
    SamplingParams,
)
from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.chrome_trace import events
from jaxllm.planning import api
from jaxllm.runner.runner import Runner

MANY = PROMPTS * 3


@pytest.fixture(scope="module")
def one(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **ARGUMENTS) as llm:
        yield llm


@pytest.fixture(scope="module")
def two(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, data_parallel_size=2, **ARGUMENTS) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_is_left(two: LLM) -> Iterator[None]:
    yield
    core: Any = two.engine.core
    assert core.is_idle and not core._of
    for replica in core._replicas:
        assert not replica.load and not replica._expected
        assert replica.core.scheduler.kv_cache_manager.pool.num_used == 0


@pytest.fixture(scope="module")
def expected(one: LLM) -> dict[str, Any]:
    """What one device answers."""
    return found_with(one)


def by_engine(llm: LLM, name: str, field: str = "value") -> list[Any]:
    return [getattr(metric, field) for metric in llm.get_metrics() if metric.name == name]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_tokens_are_those_of_one(one: LLM, two: LLM, params: SamplingParams):
    before = by_engine(two, "vllm:generation_tokens")
    assert tokens(generate(two, MANY, params)) == tokens(generate(one, MANY, params))
    done = np.subtract(by_engine(two, "vllm:generation_tokens"), before)
    assert done.sum() == len(MANY) * 40 and done.min() > 0.3 * done.sum()
    assert min(by_engine(two, "vllm:num_preemptions")) > 0


def test_every_way_to_ask(one: LLM, two: LLM):
    several = dataclasses.replace(SEEDED, n=3)
    beams = BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True)

    def answers(llm: LLM) -> list[Any]:
        completed = sorted(llm.as_completed(iter(MANY), GREEDY), key=lambda output: output.index)
        ids = llm.enqueue(MANY, GREEDY)
        collected = llm.wait_for_completion(use_tqdm=False)
        assert [output.request_id for output in collected] == ids
        return [
            [[list(c.token_ids) for c in output.outputs] for output in generate(llm, PROMPTS, several)],
            [[beam.tokens for beam in output.sequences] for output in llm.beam_search(PROMPTS[:2], beams)],
            tokens(completed),
            tokens(collected),
            "".join(llm.stream(PROMPTS[0], GREEDY)),
        ]

    assert answers(two) == answers(one)


def test_structured_outputs_and_log_probabilities(one: LLM, two: LLM):
    choice = dataclasses.replace(GREEDY, structured_outputs={"choice": ["yes", "no", "perhaps"]})
    scored = dataclasses.replace(GREEDY, prompt_logprobs=0, logprobs=2, max_tokens=4)

    def logprobs(llm: LLM) -> list[float]:
        found = []
        for output in generate(llm, PROMPTS, scored):
            entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            found += [value.logprob for entry in entries for value in entry.values()]
        return found

    texts = [[output.outputs[0].text for output in generate(llm, MANY, choice)] for llm in (one, two)]
    assert texts[0] == texts[1] and set(texts[1]) <= {"yes", "no", "perhaps"}
    np.testing.assert_allclose(logprobs(two), logprobs(one), atol=1e-4)


def test_a_prompt_comes_back_to_the_replica_that_has_it(two: LLM):
    assert two.reset_prefix_cache()
    short = dataclasses.replace(GREEDY, max_tokens=2)
    texts = [letter * 40 for letter in "abcd"]
    generate(two, texts, short)
    before = by_engine(two, "vllm:prefix_cache_hits")
    again = generate(two, texts, short)
    assert [output.num_cached_tokens for output in again] == [32] * 4
    hits = np.subtract(by_engine(two, "vllm:prefix_cache_hits"), before)
    assert sorted(hits) == [64, 64]


def test_nothing_is_compiled_after_the_start(two: LLM):
    from test_compiles import counted_events  # pyright: ignore[reportMissingImports]

    with counted_events() as counts:
        generate(two, MANY, SEEDED)
        two.sleep(1)
        two.wake_up()
        generate(two, MANY, dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=1))
    assert not counts


def test_replicas_of_a_cpu_share_weights_and_programs(two: LLM, one: LLM):
    first, second = two.apply_model(lambda params: params)
    assert first is second
    programs = [runner.head.programs for runner in two.engine.runners if isinstance(runner, Runner)]
    assert len(programs) == 2 and programs[0] is programs[1]
    weights = sum(array.nbytes for array in jax.tree.leaves(first))
    assert two.engine.num_bytes - 2 * (one.engine.num_bytes - weights) == weights


def test_weights_sleep_and_change_everywhere(one: LLM, two: LLM):
    expected = tokens(generate(one, PROMPTS, GREEDY))
    for level in (1, 2):
        two.sleep(level)
        assert two.is_sleeping
        with pytest.raises(RuntimeError, match="the engine sleeps"):
            generate(two, PROMPTS, GREEDY)
        assert not two.wake_up(["weights"]) and two.wake_up()
        assert tokens(generate(two, PROMPTS, GREEDY)) == expected
    (params, _) = two.apply_model(lambda params: params)
    two.update_weights(jax.tree.map(lambda array: -array, params))
    changed = tokens(generate(two, [PROMPTS[0]] * 6, GREEDY))
    assert changed[0] != expected[0] and changed == [changed[0]] * 6
    assert two.collective_rpc("reload_weights") == [None, None]
    assert tokens(generate(two, PROMPTS, GREEDY)) == expected
    two.release_kv_cache_memory()
    assert two.wake_up(["kv_cache"])
    assert tokens(generate(two, PROMPTS, GREEDY)) == expected


def test_requests_end_when_they_are_told_to(one: LLM, two: LLM):
    expected = dict(zip("abcd", tokens(generate(one, PROMPTS, GREEDY)), strict=True))
    engine = LLMEngine(two)
    for name, prompt in zip("abcd", PROMPTS, strict=True):
        engine.add_request(name, prompt, GREEDY)
    with pytest.raises(ValidationError, match="Request id 'a' is in use"):
        engine.add_request("a", "again", GREEDY)
    outputs = []
    while not outputs:
        outputs += engine.step()
    engine.abort_request(["b", "c"])
    assert engine.get_num_unfinished_requests() == 2
    while engine.has_unfinished_requests():
        outputs += engine.step()
    last = {output.request_id: output for output in outputs if output.finished}
    assert {name: list(output.outputs[0].token_ids) for name, output in last.items()} == {
        name: expected[name] for name in "ad"
    }


def test_asynchronous_requests_and_pauses(one: LLM, tiny_model: Path):
    delta = dataclasses.replace(GREEDY, output_kind=RequestOutputKind.DELTA)

    async def main() -> list[list[int]]:
        engine = await AsyncLLM.start(tiny_model, data_parallel_size=2, **ARGUMENTS)

        async def ask(prompt: str) -> list[int]:
            return [i async for output in engine.generate(prompt, delta) for i in output.outputs[0].token_ids]

        tasks = [asyncio.create_task(ask(prompt)) for prompt in MANY]
        for mode in ("keep", "keep", "wait"):
            await asyncio.sleep(0.01)
            await engine.pause_generation(mode=mode, clear_cache=mode == "wait")
            assert await engine.is_paused()
            await engine.resume_generation()
        found = await asyncio.gather(*tasks)
        left = asyncio.create_task(ask(PROMPTS[0]))
        await asyncio.sleep(0.01)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        assert await ask(PROMPTS[0]) == found[0]
        await asyncio.to_thread(engine.shutdown)
        return found

    assert asyncio.run(main()) == tokens(generate(one, MANY, GREEDY))


def test_an_error_ends_what_its_replica_runs(one: LLM, two: LLM, caplog: pytest.LogCaptureFixture):
    """Here the device of the second replica fails once, in the midst of a batch."""
    expected = tokens(generate(one, MANY, GREEDY))
    runner: Any = two.engine.runners[1]
    execute, launches = runner.execute, iter(range(10**6))

    def failing(scheduled: Any) -> Any:
        if next(launches) == 3:
            raise RuntimeError("out of memory")
        return execute(scheduled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "execute", failing)
        outputs = two.generate(MANY, GREEDY, use_tqdm=False, on_error="return")
    lost = [output.error for output in outputs if output.error is not None]
    assert 0 < len(lost) < len(MANY)
    assert set(lost) == {"replica 1 failed: RuntimeError('out of memory')"}
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.error is not None or list(output.outputs[0].token_ids) == wanted
    assert "Replica 1 failed; its requests are ended" in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        launches = iter(range(10**6))
        patch.setattr(runner, "execute", failing)
        with pytest.raises(RuntimeError, match="replica 1 failed"):
            generate(two, MANY, GREEDY)
    assert tokens(generate(two, MANY, GREEDY)) == expected


def test_a_bad_prompt_fails_alone(one: LLM, two: LLM):
    outputs = two.generate([PROMPTS[0], "x" * 500, PROMPTS[1]], GREEDY, use_tqdm=False, on_error="return")
    assert [output.error is None for output in outputs] == [True, False, True]
    assert tokens([outputs[0], outputs[2]]) == tokens(generate(one, PROMPTS[:2], GREEDY))


def test_a_trace_shows_the_replicas(two: LLM, tmp_path: Path):
    with two.trace() as trace:
        generate(two, MANY, GREEDY)
    assert trace.engines == [0, 1] and " on 2 replicas; " in repr(trace)
    assert {request.engine for request in trace.requests} == {0, 1} and len(trace.requests) == len(MANY)
    for engine in trace.engines:
        steps = [step for step in trace.steps if step.engine == engine]
        assert [step.step for step in steps] == sorted(step.step for step in steps)
        assert trace.arrays(engine)["num_decode_tokens"].sum() == sum(step.num_decode_tokens for step in steps)
    names = {event["pid"]: event["args"]["name"] for event in events(trace) if event["name"] == "process_name"}
    assert names == {1: "engine 0", 2: "requests", 3: "engine 1"}
    trace.save_chrome_trace(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    pytest.importorskip("matplotlib")
    titles = [axes.get_title() for axes in trace.plot().axes if axes.get_title()]
    assert titles == ["replica 0", "replica 1"]


def test_metrics_carry_the_replicas_number(two: LLM):
    labels = {metric.labels["engine"] for metric in two.get_metrics()}
    assert labels == {"0", "1"}
    stats = two.engine.core.stats()
    assert stats.generation_tokens == sum(by_engine(two, "vllm:generation_tokens"))
    from prometheus_client import generate_latest

    text = generate_latest(two.prometheus_registry()).decode()
    for engine in "01":
        assert f'vllm:generation_tokens_total{{engine="{engine}",' in text


def test_statistics_are_of_all_replicas(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAXLLM_LOG_STATS_INTERVAL", "1000")
    with (
        caplog.at_level(logging.INFO, "jaxllm"),
        LLM(tiny_model, data_parallel_size=2, disable_log_stats=False, **ARGUMENTS) as llm,
    ):
        generate(llm, MANY, GREEDY)
    lines = [record.message for record in caplog.records if record.message.startswith("Engine 000")]
    assert len(lines) == 1 and "Running: 0 reqs" in lines[0]


def test_the_plan_is_of_each_replica(tiny_model: Path, one: LLM, two: LLM, monkeypatch: pytest.MonkeyPatch):
    plan, whole = two.memory_plan, one.memory_plan
    assert (plan.data_parallel_size, plan.weight_sharers) == (2, 2)
    assert plan.weight_bytes == -(-whole.weight_bytes // 2)
    assert plan.num_blocks == whole.num_blocks and plan.vllm_lines()[0].endswith(", on each of 2 replicas")
    planned = jaxllm.plan(tiny_model, device="cpu", data_parallel_size=2, **ARGUMENTS)
    assert planned.fits and str(planned).startswith("Each of 2 replicas: Memory plan on cpu")
    assert planned.memory.weight_bytes == plan.weight_bytes
    monkeypatch.setattr(api, "find_compiler", lambda folder: None)
    gpu = jaxllm.plan(tiny_model, device="h100", data_parallel_size=2, **ARGUMENTS).memory
    assert (gpu.data_parallel_size, gpu.weight_sharers, gpu.weight_bytes) == (2, 1, whole.weight_bytes)


def test_sizes_that_cannot_be_are_refused(tiny_model: Path):
    with pytest.raises(ValidationError, match="data_parallel_size must be at least 1, got 0"):
        LLM(tiny_model, data_parallel_size=0)
    with pytest.raises(ValidationError, match='data_parallel_size=2 with load_format="null": there is no model'):
        LLM(tiny_model, data_parallel_size=2, load_format="null")
    with pytest.raises(ValidationError) as raised:
        LLM(tiny_model, data_parallel_size=2, tensor_parallel_size=2)
    assert str(raised.value).startswith("data_parallel_size=2 x tensor_parallel_size=2 needs 4 devices; JAX has 1 of")
    assert "JAX_NUM_CPU_DEVICES=4" in str(raised.value)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two replicas of two devices each, in a process of their own."""
    return found_by("support.data_parallel", tmp_path_factory.mktemp("replicas"))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["greedy", "seeded", "after prefix hits", "structured", "many"])
def test_replicas_of_a_split_model_answer_as_one_device(found: dict[str, Any], expected: dict[str, Any], kind: str):
    assert found["replicas"][kind] == expected[kind]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["greedy", "seeded", "many"])
def test_replicas_of_stages_answer_as_one_device(found: dict[str, Any], expected: dict[str, Any], kind: str):
    assert found["stages"][kind] == expected[kind]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["prompt logprobs", "logprobs"])
def test_their_log_probabilities_are_those_of_one_device(found: dict[str, Any], expected: dict[str, Any], kind: str):
    np.testing.assert_allclose(found["replicas"][kind], expected[kind], atol=1e-4, rtol=1e-4)


def test_replicas_that_pool(tiny_model: Path):
    arguments = {**ARGUMENTS, "num_gpu_blocks_override": None, "max_model_len": 64}

    late = PoolingParams(late_chunking_params=LateChunkingParams(4))

    def vectors(count: int) -> list[np.ndarray]:
        with LLM(tiny_model, runner="pooling", convert="embed", data_parallel_size=count, **arguments) as llm:
            whole = [output.outputs.embedding for output in llm.embed(PROMPTS, use_tqdm=False)]
            chunks = llm.encode(PROMPTS, late, pooling_task="token_embed", use_tqdm=False)
            return [np.array(whole), *(np.array(output.outputs.data) for output in chunks)]

    for two, one in zip(vectors(2), vectors(1), strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5)


@pytest.mark.thorough
def test_each_has_its_own_devices(found: dict[str, Any]):
    assert found["devices"] == [[0, 1], [2, 3]] and found["world"] == [4, 2]
    assert min(found["steps"]) > 0 and found["pages"] == [0, 0]
    assert found["replicas"]["prefix hits"] > 0


@pytest.mark.thorough
def test_their_weights_sleep_and_change_everywhere(found: dict[str, Any], expected: dict[str, Any]):
    for kind in ("sleep", "own weights"):
        assert found[kind] == expected["many"]
    others = found["other weights"]
    assert others == [others[0]] * 4 and others[0] != expected["many"][0]
