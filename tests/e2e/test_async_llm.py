"""The engine under asyncio: against what the synchronous one gives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import SMALL

from jaxllm import AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.engine.client import EngineClient

PROMPTS = [f"prompt number {i} " * (i % 3 + 1) for i in range(9)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10)
DELTA = SamplingParams(temperature=0.0, max_tokens=10, output_kind=RequestOutputKind.DELTA)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[AsyncLLM]:
    engine = AsyncLLM(tiny_model, **SMALL)
    yield engine
    engine.shutdown()


async def collect(engine: AsyncLLM, prompt: str, params: SamplingParams, **options: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, **options)]


def test_many_coroutines_share_the_engine(engine: AsyncLLM):
    expected = [output.outputs[0].text for output in engine.llm.generate(PROMPTS, GREEDY, use_tqdm=False)]

    async def main() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(collect(engine, prompt, GREEDY) for prompt in PROMPTS))

    found = asyncio.run(main())
    assert [outputs[-1].outputs[0].text for outputs in found] == expected
    for outputs in found:
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        texts = [output.outputs[0].text for output in outputs]
        assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
        assert len(outputs) == 10
    assert not engine.engine.client.has_unfinished


def test_deltas_add_up_to_the_text(engine: AsyncLLM):
    expected = engine.llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0]

    async def main() -> list[RequestOutput]:
        return await collect(engine, PROMPTS[0], DELTA)

    outputs = asyncio.run(main())
    assert "".join(output.outputs[0].text for output in outputs) == expected.text
    assert [i for output in outputs for i in output.outputs[0].token_ids] == expected.token_ids


def test_children_stream_side_by_side(engine: AsyncLLM):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=6, n=3, output_kind=RequestOutputKind.DELTA)
    single = [SamplingParams(temperature=1.0, seed=3 + i, max_tokens=6) for i in range(3)]
    expected = [o.outputs[0].text for o in engine.llm.generate(["tell me"] * 3, single, use_tqdm=False)]

    async def main() -> list[RequestOutput]:
        return await collect(engine, "tell me", params, request_id="mine")

    outputs = asyncio.run(main())
    texts = ["", "", ""]
    for output in outputs:
        assert output.request_id == "mine" and len(output.outputs) == 1
        texts[output.outputs[0].index] += output.outputs[0].text
    assert texts == expected
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_abort_gives_what_there_is(engine: AsyncLLM):
    long = SamplingParams(temperature=0.0, max_tokens=100)

    async def main() -> list[RequestOutput]:
        outputs = []
        async for output in engine.generate("go on", long, "to be ended"):
            outputs.append(output)
            if len(outputs) == 3:
                await engine.abort("to be ended")
        return outputs

    last = asyncio.run(main())[-1]
    assert last.finished and last.outputs[0].finish_reason == "abort"
    assert 3 <= len(last.outputs[0].token_ids) < 100


def test_leaving_the_loop_or_being_cancelled_ends_the_request(engine: AsyncLLM):
    long = SamplingParams(temperature=0.0, max_tokens=200)

    async def main() -> None:
        async for _ in engine.generate("first", long):
            break
        task = asyncio.create_task(collect(engine, "second", long))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # what is posted is done in order: the ends of both come before this
        await engine.reset_prefix_cache()
        assert not engine.engine.client.has_unfinished
        assert engine.engine.core.cores[0].scheduler.kv_cache_manager.pool.num_used == 0

    asyncio.run(main())


def test_a_bad_request_fails_alone(engine: AsyncLLM):
    async def main() -> None:
        good = asyncio.create_task(collect(engine, PROMPTS[1], GREEDY))
        with pytest.raises(ValidationError, match="empty"):
            await collect(engine, "", GREEDY)
        with pytest.raises(ValidationError, match="logprobs of 99"):
            await collect(engine, "x", SamplingParams(logprobs=99))
        first = engine.generate("x", GREEDY, "same")
        await anext(first)
        with pytest.raises(ValidationError, match="'same' is in use"):
            await collect(engine, "y", GREEDY, request_id="same")
        await first.aclose()
        assert (await good)[-1].finished

    asyncio.run(main())


def test_other_methods_run_beside_it(engine: AsyncLLM):
    async def main() -> None:
        chat = [o async for o in engine.chat([{"role": "user", "content": "hi"}], GREEDY)]
        assert chat[-1].prompt == "user: hi\n"
        stream = asyncio.create_task(collect(engine, PROMPTS[2], GREEDY))
        together = await asyncio.to_thread(lambda: engine.llm.generate(PROMPTS, GREEDY, use_tqdm=False))
        assert (await stream)[-1].outputs[0].text == together[2].outputs[0].text
        await engine.sleep(1)
        assert await engine.is_sleeping()
        with pytest.raises(RuntimeError, match="wake_up"):
            await collect(engine, "x", GREEDY)
        assert await engine.wake_up()
        assert (await collect(engine, PROMPTS[2], GREEDY))[-1].outputs[0].text == together[2].outputs[0].text

    asyncio.run(main())


@pytest.mark.parametrize("clear_cache", [True, False])
def test_a_pause_keeps_requests(engine: AsyncLLM, clear_cache: bool):
    long = SamplingParams(temperature=0.0, max_tokens=40)
    expected = engine.llm.generate(["kept", "added"], long, use_tqdm=False)
    counts: list[int] = []

    async def stream() -> RequestOutput:
        async for output in engine.generate("kept", long):
            counts.append(len(output.outputs[0].token_ids))
        return output

    async def main() -> list[RequestOutput]:
        running = asyncio.create_task(stream())
        while len(counts) < 5:
            await asyncio.sleep(0)
        await engine.pause_generation(mode="keep", clear_cache=clear_cache)
        assert await engine.is_paused() and not await engine.is_sleeping()
        # what the last step has brought is on its way
        added = asyncio.create_task(collect(engine, "added", long))
        await engine.check_health()
        for _ in range(20):
            await asyncio.sleep(0)
        at_rest = len(counts)
        assert (engine.engine.core.cores[0].scheduler.kv_cache_manager.pool.num_used == 0) is clear_cache
        with pytest.raises(RuntimeError, match=r"generation is paused: call resume_generation\(\) first"):
            await asyncio.to_thread(lambda: engine.llm.generate("x", GREEDY, use_tqdm=False))
        await asyncio.sleep(0.1)
        assert len(counts) == at_rest < 40 and not added.done()
        await engine.resume_generation()
        assert not await engine.is_paused()
        return [await running, (await added)[-1]]

    found = asyncio.run(main())
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]
    assert counts == list(range(1, 41))


@pytest.mark.parametrize("mode", ["abort", "wait"])
def test_a_pause_ends_requests(engine: AsyncLLM, mode: str):
    long = SamplingParams(temperature=0.0, max_tokens=40)

    async def main() -> RequestOutput:
        stream = engine.generate("go on", long)
        first = await anext(stream)
        await engine.pause_generation(mode=mode)
        with pytest.raises(RuntimeError, match="generation is paused"):
            await collect(engine, "refused", GREEDY)
        # one pause takes the place of another
        await engine.pause_generation(mode="keep")
        kept = asyncio.create_task(collect(engine, "kept", GREEDY))
        await asyncio.sleep(0.05)
        assert not kept.done()
        await engine.pause_generation(mode="wait")
        assert (await kept)[-1].outputs[0].finish_reason == "length"
        await engine.resume_generation()
        assert (await collect(engine, "new", GREEDY))[-1].finished
        with pytest.raises(ValidationError, match="got 'nap'"):
            await engine.pause_generation(mode="nap")
        return [first, *[output async for output in stream]][-1]

    last = asyncio.run(main())
    completion = last.outputs[0]
    assert completion.finish_reason == ("abort" if mode == "abort" else "length")
    assert (len(completion.token_ids) == 40) is (mode == "wait")


def test_weights_change_in_a_pause(engine: AsyncLLM):
    long = SamplingParams(temperature=0.0, max_tokens=40)
    expected = engine.llm.generate("kept", long, use_tqdm=False)[0].outputs[0].token_ids
    (params,) = engine.llm.apply_model(lambda params: params)

    async def main() -> RequestOutput:
        pool, stream = engine.engine.core.cores[0].scheduler.kv_cache_manager.pool, engine.generate("kept", long)
        await anext(stream)
        await engine.pause_generation(mode="keep", clear_cache=False)
        assert pool.num_used > 0
        await engine.update_weights(params)
        assert pool.num_used == 0 and await engine.collective_rpc(lambda runner: runner.params.norm.size) == [64]
        await engine.resume_generation()
        return [output async for output in stream][-1]

    last = asyncio.run(main())
    assert last.outputs[0].token_ids == expected and last.metrics.num_preemptions == 1


def test_shutdown_tells_who_waits(tiny_model: Path):
    async def main() -> None:
        async with await AsyncLLM.start(tiny_model, **SMALL) as engine:
            stream = engine.generate("hello", SamplingParams(temperature=0.0, max_tokens=200))
            await anext(stream)
        with pytest.raises(RuntimeError, match="shut down"):
            async for _ in stream:
                pass
        with pytest.raises(RuntimeError, match="shut down"):
            await collect(engine, "x", GREEDY)

    asyncio.run(main())


def test_the_synchronous_engine_works_inside_a_running_loop(engine: AsyncLLM):
    async def main() -> int:
        return len(engine.llm.generate(PROMPTS, GREEDY, use_tqdm=False))

    assert asyncio.run(main()) == len(PROMPTS)


def test_a_pooling_engine_encodes(tiny_model: Path):
    async def main() -> None:
        async with await AsyncLLM.start(tiny_model, runner="pooling", **SMALL) as engine:
            expected = [output.outputs.embedding for output in engine.llm.embed(PROMPTS, use_tqdm=False)]

            async def embed(prompt: str) -> Any:
                (output,) = [o async for o in engine.encode(prompt, pooling_task="embed", request_id=prompt)]
                assert output.finished and output.request_id == prompt
                return output.outputs.data.tolist()

            assert await asyncio.gather(*map(embed, PROMPTS)) == expected
            with pytest.raises(ValidationError, match="only supported for generative models"):
                engine.generate("x")
            with pytest.raises(ValidationError, match="Classification API is not supported"):
                engine.encode("x", pooling_task="classify")

    asyncio.run(main())


def test_the_event_loop_does_not_wait_for_steps(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch):
    """A request is submitted while a step holds the engine: the loop goes on meanwhile."""
    stepping, go_on = threading.Event(), threading.Event()
    step = engine.engine.core.step

    def slow_step() -> Any:
        stepping.set()
        assert go_on.wait(60)
        return step()

    async def main() -> None:
        monkeypatch.setattr(engine.engine.core, "step", slow_step)
        first = asyncio.create_task(collect(engine, "first", GREEDY))
        await asyncio.to_thread(stepping.wait, 60)
        second = asyncio.create_task(collect(engine, "second", GREEDY))
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not second.done(), "the loop got here although the step has not ended"
        go_on.set()
        assert (await first)[-1].finished and (await second)[-1].finished

    asyncio.run(main())


LONG = SamplingParams(temperature=0.0, max_tokens=200)


def test_what_is_posted_while_the_engine_ends_is_told(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """A request, and something else, wait for a step that ends after `shutdown` has begun."""
    stepping, go_on = threading.Event(), threading.Event()

    async def main() -> None:
        engine = await AsyncLLM.start(tiny_model, **SMALL)
        step = engine.engine.core.step

        def slow_step() -> Any:
            stepping.set()
            assert go_on.wait(60)
            return step()

        monkeypatch.setattr(engine.engine.core, "step", slow_step)
        first = asyncio.create_task(collect(engine, "first", LONG))
        await asyncio.to_thread(stepping.wait, 60)
        waiting = [asyncio.create_task(collect(engine, "second", GREEDY)), asyncio.create_task(engine.abort("x"))]
        while len(engine._thread._work) < len(waiting):
            await asyncio.sleep(0.005)
        end = asyncio.create_task(asyncio.to_thread(engine.shutdown))
        while engine.is_running:
            await asyncio.sleep(0.005)
        go_on.set()
        results = await asyncio.wait_for(asyncio.gather(first, *waiting, return_exceptions=True), 20)
        assert [type(result) for result in results] == [RuntimeError] * 3
        assert all("shut down" in str(result) for result in results)
        await end

    asyncio.run(main())


def test_what_waits_for_the_tokenizer_is_told_of_the_end(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    reading, go_on = threading.Event(), threading.Event()

    async def main() -> None:
        engine = await AsyncLLM.start(tiny_model, **SMALL)
        reader = engine.engine.inputs.reader
        read = reader.read

        def slow_read(*arguments: Any) -> Any:
            reading.set()
            assert go_on.wait(60)
            return read(*arguments)

        monkeypatch.setattr(reader, "read", slow_read)
        waiting = [asyncio.create_task(collect(engine, prompt, GREEDY)) for prompt in PROMPTS[:3]]
        await asyncio.to_thread(reading.wait, 60)
        await asyncio.to_thread(engine.shutdown)
        go_on.set()
        results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 20)
        assert [type(result) for result in results] == [RuntimeError] * 3
        assert all("shut down" in str(result) for result in results)

    asyncio.run(main())


def test_an_error_while_a_request_is_ended_leaves_the_engine_usable(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail() -> None:
        raise OSError("the device is gone")

    async def main() -> None:
        stream = engine.generate("first", LONG)
        await anext(stream)
        with monkeypatch.context() as patch:
            patch.setattr(engine.engine.core, "drain", fail)
            await stream.aclose()
            await asyncio.wait_for(engine.abort("nobody"), 20)
        assert (await asyncio.wait_for(collect(engine, PROMPTS[0], GREEDY), 20))[-1].finished

    asyncio.run(main())
    assert "the device is gone" in caplog.text


def test_a_request_that_is_cancelled_while_it_is_added_is_ended(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch):
    adding, go_on = threading.Event(), threading.Event()
    client = engine.engine.client
    add = client.add

    def slow_add(*arguments: Any) -> None:
        adding.set()
        assert go_on.wait(60)
        add(*arguments)

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(client, "add", slow_add)
            task = asyncio.create_task(collect(engine, "first", LONG))
            await asyncio.to_thread(adding.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
            # done after what was posted before
            await engine.abort("nobody")
        assert not client.has_unfinished

    asyncio.run(main())


def test_a_finished_request_gives_its_name_away(engine: AsyncLLM):
    async def main() -> None:
        first = engine.generate("first", GREEDY, "name")
        async for output in first:
            if output.finished:
                break
        second = engine.generate("second", SamplingParams(temperature=0.0, max_tokens=40), "name")
        await anext(second)
        await first.aclose()

        async def rest() -> list[RequestOutput]:
            return [output async for output in second]

        assert len((await asyncio.wait_for(rest(), 20))[-1].outputs[0].token_ids) == 40

    asyncio.run(main())


def test_an_aborted_pooling_request_is_not_its_callers_fault(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with await AsyncLLM.start(tiny_model, runner="pooling", **SMALL) as engine:
            # nothing runs: the request waits until it is aborted
            monkeypatch.setattr(EngineClient, "can_step", False)
            output = anext(engine.encode("x", pooling_task="embed", request_id="x"))
            task = asyncio.ensure_future(output)
            while not engine.engine.client.has_unfinished:
                await asyncio.sleep(0.005)
            await engine.abort("x")
            with pytest.raises(RuntimeError, match="aborted"):
                await asyncio.wait_for(task, 20)

    asyncio.run(main())
