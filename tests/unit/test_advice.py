"""Each kind of advice: what hurts is there, and with the value that is named it is gone, with the same requests."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from support.large_models import QWQ_32B
from support.tiny_model import write_tiny_model
from support.virtual_time import VirtualTime

import jaxllm
from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.metric import Counter, Metric, Vector
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.observe.engine_settings import EngineSettings
from jaxllm.engine.observe.step_counts import StepCounts
from jaxllm.engine.request import Request
from jaxllm.engine.scheduling.scheduler import Scheduler
from jaxllm.engine.step import SchedulerOutput, StepOutput
from jaxllm.multimodal.items import Grid, MediaItem, PlacedItem, PromptMedia
from jaxllm.planning import api
from jaxllm.startup import engine_settings, start
from jaxllm.tuning.advice.advice import Advice, AdviceList
from jaxllm.tuning.advice.advise import advise, load_of_engine, load_of_trace
from jaxllm.tuning.advice.load import Load

#: room for everything, but for what a test takes away
ROOMY: dict[str, Any] = {
    "load_format": "null",
    "skip_tokenizer_init": True,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "max_model_len": 256,
    "block_size": 8,
    "num_gpu_blocks_override": 1024,
}
Prompts = list[list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "model.safetensors").unlink()  # it is not read
    return folder


def prompts(count: int, length: int, seed: int = 0) -> Prompts:
    draw = random.Random(seed)
    return [[draw.randrange(250) for _ in range(length)] for _ in range(count)]


def fare(
    model: Path,
    given: Prompts,
    *,
    max_tokens: int = 24,
    step_seconds: Callable[[SchedulerOutput], float] | None = None,
    host_seconds: float = 0.0,
    itl: float | None = None,
    salts: list[str] | None = None,
    one_by_one: bool = False,
    **arguments: Any,
) -> tuple[AdviceList, LLM]:
    """The advice of an engine that has met these prompts; of its trace, of which that of its metrics is a part."""
    items = [{"prompt_token_ids": ids} | ({} if salts is None else {"cache_salt": salt})
             for ids, salt in zip(given, salts or [""] * len(given), strict=True)]  # fmt: skip
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    with LLM(model, **{**ROOMY, **arguments}) as llm:
        clock = None if step_seconds is None else VirtualTime(llm, step_seconds, host_seconds=host_seconds)
        with llm.trace() if clock is None else clock.trace() as trace:
            for call in ([item] for item in items) if one_by_one else [items]:
                llm.generate(call, params, use_tqdm=False)
        found = advise(load_of_trace(trace), itl=itl)
        if clock is None:
            assert str(llm.advise(trace, itl=itl)) == str(found)
        counted = {advice.kind for advice in advise(load_of_engine(llm.engine))}
        assert counted <= {advice.kind for advice in found} | {"host time"}
        return found, llm


def cured(kind: str, model: Path, given: Prompts, *, by: str | None = None, **options: Any) -> Advice:
    """The advice of this kind; it is gone with each value that it names, or with that of the argument `by`."""
    found, _ = fare(model, given, **options)
    advice = found.of(kind)
    assert advice is not None, f"{kind} is not among {found}"
    assert advice.evidence and advice.numbers and f"{advice.argument}={advice.value!r}" in str(advice)
    for argument, value, _ in (advice.setting, *advice.instead):
        if by is None or by == argument:
            again, _ = fare(model, given, **{**options, argument: value})
            assert again.of(kind) is None, f"{argument}={value!r} leaves {again.of(kind)}"
    return advice


def test_nothing_hurts(model: Path):
    found, llm = fare(model, prompts(8, 30), step_seconds=lambda _: 1e-3)
    assert list(found) == [] and "Nothing" in str(found) and "Nothing" in found._repr_html_()


def test_preemptions(model: Path):
    given = prompts(12, 40)
    advice = cured("preemptions", model, given, num_gpu_blocks_override=60)
    # 63 of 64 tokens have keys and values at the end, in 8 blocks; all twelve run at once
    assert advice.setting[:2] == ("num_gpu_blocks_override", 12 * 8 + 1)
    assert ("max_num_seqs", 59 // 8) in [setting[:2] for setting in advice.instead]
    assert advice.numbers["preemptions"] > 0 and advice.numbers["lost_tokens"] > 0


def test_preemptions_of_a_cache_of_so_many_bytes(model: Path):
    size = 8 * 2 * 2 * 2 * 16 * 2  # eight tokens, two layers of two heads, keys and values of 16 numbers of two bytes
    options = {"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 60 * size}
    advice = cured("preemptions", model, prompts(12, 40), **options)
    assert advice.setting[:2] == ("kv_cache_memory_bytes", 97 * size)
    assert [setting.argument for setting in advice.instead] == ["max_num_seqs"]
    # int8 has scales of four bytes for 16 numbers: 5/8 of the bytes
    advice = cured("preemptions", model, prompts(12, 40), **{**options, "kv_cache_memory_bytes": 70 * size})
    assert ("kv_cache_dtype", "int8") in [setting[:2] for setting in advice.instead]


def test_preemptions_where_few_requests_are_long(model: Path):
    given = prompts(1, 50, seed=1) + prompts(11, 30)
    advice = cured("preemptions", model, given, num_gpu_blocks_override=80, max_num_seqs=11)
    assert [setting[:2] for setting in advice.instead] == [("max_num_seqs", 10), ("max_model_len", 56)]


@pytest.mark.parametrize("argument", ["gpu_memory_utilization", "tensor_parallel_size", "pipeline_parallel_size"])
def test_more_memory_is_what_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str):
    """The plan of a GPU that is not there stands for one that is: with the value that is named it has the blocks."""
    monkeypatch.setattr(api, "find_compiler", lambda folder: None)
    (tmp_path / "config.json").write_text(json.dumps(QWQ_32B))
    share = 0.86 if argument == "gpu_memory_utilization" else 0.96
    options = {"device": "h100", "max_model_len": 8192, "max_num_seqs": 64, "max_num_batched_tokens": 8192}
    options |= {"gpu_memory_utilization": share}
    memory = jaxllm.plan(tmp_path, **options).memory
    assert memory.block_size == 16
    seqs = memory.num_blocks // 100 + 20
    settings = EngineSettings(
        platform="gpu", gpu_memory_utilization=share, num_blocks=memory.num_blocks, block_size=16, max_num_seqs=seqs,
        block_bytes=memory.kv_bytes_per_token * 16, total_bytes=memory.total_bytes, weight_bytes=memory.weight_bytes,
        other_bytes=memory.activation_bytes + memory.state_bytes, max_num_batched_tokens=8192,
    )  # fmt: skip
    metrics = (Counter("vllm:num_preemptions", {}, 3),)
    advice = advise(Load(settings=settings, metrics=metrics, lengths=((1500, 100),) * seqs)).of("preemptions")
    assert advice is not None and advice.numbers["blocks_needed"] == 100 * seqs >= memory.num_blocks
    values = {setting.argument: setting.value for setting in (advice.setting, *advice.instead)}
    again = jaxllm.plan(tmp_path, **{**options, argument: values[argument]}).memory
    assert again.num_blocks > 100 * seqs
    if argument == "gpu_memory_utilization":
        # and no more than it takes: thousandths of 80 GB are twenty blocks
        assert again.num_blocks < 100 * seqs + 30


def test_a_queue_beside_an_empty_cache(model: Path):
    advice = cured("queue", model, prompts(12, 20), max_num_seqs=3)
    assert advice.setting[:2] == ("max_num_seqs", 12) and advice.numbers["most_requests"] == 12


def test_a_queue_grows_no_more_than_the_cache_holds(model: Path):
    # 44 tokens in 6 blocks each: nine tenths of 79 hold eleven
    advice = cured("queue", model, prompts(40, 20), max_num_seqs=3, num_gpu_blocks_override=80)
    assert advice.value == 11


def test_a_queue_of_active_requests(model: Path):
    assert cured("queue", model, prompts(12, 20), max_num_active_seqs=3).argument == "max_num_active_seqs"


def seconds(fixed: float, token: float) -> Callable[[SchedulerOutput], float]:
    return lambda step: fixed + token * sum(step.step_sizes())


def test_a_budget_that_starves_prompts(model: Path):
    options = {"max_num_batched_tokens": 32, "step_seconds": seconds(2e-3, 1e-5)}
    advice = cured("budget too small", model, prompts(12, 100), **options)
    # of a step of 800 tokens, a fifth is fixed
    assert advice.setting[:2] == ("max_num_batched_tokens", 1024)
    assert advice.numbers["fixed_share"] == pytest.approx(2e-3 / 2.32e-3, rel=0.02)


def test_a_budget_that_is_used_up_and_large_enough(model: Path):
    """What a device does not do faster in larger steps asks for none."""
    found, _ = fare(model, prompts(12, 100), max_num_batched_tokens=32, step_seconds=seconds(1e-5, 1e-4))
    assert found.of("budget too small") is None


def test_a_budget_that_is_too_large_for_the_time_between_tokens(model: Path):
    options = {"max_num_batched_tokens": 256, "max_num_seqs": 8, "step_seconds": seconds(1e-3, 5e-5), "itl": 8e-3}
    advice = cured("budget too large", model, prompts(24, 100), **options)
    # (8 - 1) ms at 50 us are 140 tokens, in programs of whole eights
    assert advice.setting[:2] == ("max_num_batched_tokens", 136)
    for itl in (-1.0, "soon"):
        with pytest.raises(ValidationError, match="itl must be a number of seconds"):
            advise(Load(settings=EngineSettings(), metrics=()), itl=cast("Any", itl))


def test_more_requests_than_the_time_between_tokens_has_room_for(model: Path):
    def padded(step: SchedulerOutput) -> float:
        return 1e-3 + 4e-4 * max(8, 1 << (sum(step.step_sizes()) - 1).bit_length())

    options = {"max_num_seqs": 16, "step_seconds": padded, "itl": 8e-3}
    advice = cured("too many requests", model, prompts(24, 100), **options)
    # (8 - 1) ms at 0.4 ms are 16 tokens in programs of whole eights, of which one is a prompt's
    assert advice.setting[:2] == ("max_num_seqs", 15)
    fewer = cured("budget too large", model, prompts(24, 100), **{**options, "max_num_seqs": 15})
    assert fewer.setting[:2] == ("max_num_batched_tokens", 16)


def test_more_requests_than_steps_without_prompts_have_room_for(model: Path):
    """All prompts are read at once, so that no step has one beside other requests."""
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "step_seconds": seconds(1e-3, 1e-3)}
    advice = cured("too many requests", model, prompts(8, 4), itl=5.5e-3, **options)
    assert advice.setting[:2] == ("max_num_seqs", 4)
    # a single request takes longer
    assert fare(model, prompts(8, 4), itl=1e-3, **options)[0].of("too many requests") is None


def test_prefixes_that_were_evicted(model: Path):
    given = [[*prefix, *end] for end in prompts(4, 12, seed=1) for prefix in prompts(6, 64)]
    advice = cured("evicted prefixes", model, given, one_by_one=True, num_gpu_blocks_override=40, max_tokens=4)
    # six prefixes of eight blocks come round by round, of which all but the first time each is asked for in vain
    assert advice.numbers["evicted_tokens"] == 3 * 6 * 64 and advice.numbers["hits"] == 0
    assert [setting.argument for setting in (advice.setting, *advice.instead)] == [
        "num_gpu_blocks_override", "kv_offloading_size",
    ]  # fmt: skip
    found, _ = fare(model, given, one_by_one=True, num_gpu_blocks_override=advice.value // 2, max_tokens=4)
    assert found.of("evicted prefixes") is not None


def test_prefixes_of_other_salts(model: Path):
    given = [[*prompts(1, 64)[0], *end] for end in prompts(6, 12, seed=1)]
    options = {"one_by_one": True, "max_tokens": 4}
    found, _ = fare(model, given, salts=[f"user {number}" for number in range(6)], **options)
    advice = found.of("salted prefixes")
    assert advice is not None and advice.setting[:2] == ("cache_salt", None)
    assert advice.numbers["salted_tokens"] == 5 * 64 and advice.numbers["requests"] == 5
    for salts in (None, ["all of them"] * 6):
        assert fare(model, given, salts=salts, **options)[0].of("salted prefixes") is None


def test_drafts_that_cost_more_than_they_bring(model: Path):
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    options = {"speculative_config": drafts, "max_tokens": 200, "max_num_batched_tokens": 16}

    def dear(step: SchedulerOutput) -> float:
        """A check of four takes more than four times as long as a step, and it brings at most four tokens."""
        return (6e-3 if step.num_drafts else 1e-3) + 1e-5 * sum(step.step_sizes())

    advice = cured("speculation", model, prompts(4, 30), step_seconds=dear, **options)
    assert advice.setting[:2] == ("speculative_config", None)
    found, _ = fare(model, prompts(4, 30), step_seconds=seconds(1e-3, 1e-5), **options)
    assert found.of("speculation") is None


def test_drafts_at_places_that_are_seldom_right():
    """Of 100 checks of three drafts the first is right in 40, the second in 20, the third in 4."""

    def found(places: list[int], drafted: int | None = None) -> Advice | None:
        settings = EngineSettings(num_speculative_tokens=len(places))
        counts = {"drafts": 100, "draft_tokens": drafted or 100 * len(places), "accepted_tokens": sum(places)}
        metrics: list[Metric] = [Counter(f"vllm:spec_decode_num_{name}", {}, value) for name, value in counts.items()]
        metrics.append(Vector("vllm:spec_decode_num_accepted_tokens_per_pos", {}, places))
        return advise(Load(settings=settings, metrics=tuple(metrics))).of("speculation")

    advice = found([40, 20, 4])
    assert advice is not None and advice.setting[:2] == ("num_speculative_tokens", 2)
    assert advice.numbers["right_at_place"] == 0.04 and found([40, 20]) is None
    # nothing is left of drafts of which none is right
    nothing = found([4, 2, 1])
    assert nothing is not None and nothing.setting[:2] == ("speculative_config", None)
    # checks that adapt their length: most had no third draft, so that it was seldom right says nothing against it
    assert found([60, 4, 4], drafted=110) is None
    shorter = found([60, 1, 0], drafted=280)
    assert shorter is not None and shorter.setting[:2] == ("num_speculative_tokens", 1)


def test_padding_of_few_programs(model: Path):
    given = prompts(8, 20)
    advice = cured("padding", model, given, enforce_eager=True, max_num_batched_tokens=64)
    assert advice.setting[:2] == ("enforce_eager", False)


def test_padding_of_a_number_of_requests_between_two_programs(model: Path):
    advice = cured("padding", model, prompts(36, 20), max_num_seqs=9)
    assert advice.setting[:2] == ("max_num_seqs", 8)


def test_a_device_that_waits_for_the_host(model: Path):
    options = {"step_seconds": lambda step: 3e-4 * step.num_steps, "host_seconds": 1e-3}
    advice = cured("host time", model, prompts(8, 20), max_tokens=80, **options)
    assert advice.setting[:2] == ("num_decode_steps", 8)
    options = {"step_seconds": lambda step: 2e-3, "host_seconds": 1e-3}
    advice = cured("host time", model, prompts(8, 20), max_tokens=80, async_scheduling=False, **options)
    assert advice.setting[:2] == ("async_scheduling", True)


def test_what_an_engine_refuses_is_not_advised(model: Path, monkeypatch: pytest.MonkeyPatch):
    """Stages, and replicas that step together, have one step a launch; those, models that draft, and engines without a
    prefix cache, no block of the host's.
    """
    options = {"step_seconds": lambda step: 3e-4, "host_seconds": 1e-3, "enforce_eager": True}
    found, _ = fare(model, prompts(8, 20), max_tokens=80, **options)
    assert found.of("host time") is None
    given, make = [], start.engine_settings
    monkeypatch.setattr(start, "engine_settings", lambda *them, **named: given.extend(them) or make(*them, **named))
    LLM(model, **ROOMY).shutdown()
    args, *others = given
    for changes, single_steps, offloads in (
        ({}, False, True),
        ({"pipeline_parallel_size": 2}, True, True),
        ({"data_parallel_size": 2, "enable_expert_parallel": True}, True, False),
        ({"speculative_config": {"model": str(model), "num_speculative_tokens": 2}}, False, False),
        ({"enable_prefix_caching": False}, False, False),
    ):
        settings = make(dataclasses.replace(args, **changes), *others, num_devices=2)
        assert settings.one_step_at_a_time == single_steps
        assert (settings.host_block_bytes is not None) == offloads


def test_a_wait_for_grammars_is_no_work_of_the_host(model: Path):
    with LLM(model, **ROOMY) as llm:
        (core,) = llm.engine.core.cores
        clock = VirtualTime(llm, lambda _: 1e-3)

        class Compiling:
            def failed(self) -> list[Any]:
                return []

            def wait(self) -> None:
                clock.now += 5.0

            def shutdown(self) -> None:
                pass

        core._constraints = cast("Any", Compiling())
        assert core.step() == [] and clock.now == 5.0 and core.counts.host_seconds == 0.0


def test_prompts_that_are_tokenized_slowly(model: Path, monkeypatch: pytest.MonkeyPatch):
    processors = set(range(4))
    monkeypatch.setattr(engine_settings.os, "sched_getaffinity", lambda _: processors, raising=False)
    given = [{"prompt_token_ids": ids} for ids in prompts(256, 8)]

    def run(threads: int) -> Advice | None:
        with LLM(model, **ROOMY, tokenizer_pool_size=threads) as llm:
            read = llm.engine.inputs.reader.read

            def slowly(*arguments: Any) -> Any:
                time.sleep(0.02)
                return read(*arguments)

            monkeypatch.setattr(llm.engine.inputs.reader, "read", slowly)
            llm.generate(given, SamplingParams(max_tokens=1), use_tqdm=False)
            return llm.advise().of("tokenizer")

    advice = run(1)
    assert advice is not None and advice.setting[:2] == ("tokenizer_pool_size", 2)
    assert run(4) is None


def test_pictures_that_wait_for_the_encoder():
    """Two pictures of ten vectors each of four requests, and an encoder that makes 20."""

    def run(budget: int) -> AdviceList:
        config = SchedulerConfig(
            max_num_seqs=4,
            max_num_batched_tokens=64,
            max_model_len=128,
            encoder_cache_tokens=budget,
            max_encoder_tokens=budget,
        )
        cache = CacheConfig(
            block_size=8, num_blocks=100, groups=(KVCacheGroup(layers=(0,)),), enable_prefix_caching=False
        )
        scheduler = Scheduler(config, cache)
        counts = StepCounts(scheduler)
        for number in range(4):
            scheduler.add_request(picture_request(number))
        while scheduler.has_unfinished:
            step = scheduler.schedule()
            counts.scheduled(step)
            sampled = [int(wanted > 0) for wanted in step.wanted]
            scheduler.update(step, StepOutput(token_ids=[1] * sum(sampled), counts=sampled))
        settings = EngineSettings(max_num_encoder_input_tokens=budget, max_num_batched_tokens=64)
        return advise(Load(settings=settings, metrics=tuple(counts.metrics({}))))

    advice = run(20).of("encoder budget")
    # those of two requests and a part of the third fit into a step of 64 tokens
    assert advice is not None and advice.setting[:2] == ("max_num_encoder_input_tokens", 64)
    assert run(advice.value).of("encoder budget") is None


def picture_request(number: int) -> Request:
    pixels = np.zeros((10, 1), np.uint8)
    grid = Grid(2, 5)
    pictures = [MediaItem(content_hash=f"{number} {place}", grid=grid, num_tokens=10, pixels=pixels) for place in "ab"]
    items = tuple(PlacedItem(picture, start, start + 10, "") for picture, start in zip(pictures, (2, 14), strict=True))
    media = PromptMedia(items, np.zeros((3, 26), np.int32), 0)
    return Request(str(number), [1] * 26, SamplingParams(max_tokens=2, ignore_eos=True), media=media)


def test_a_line_at_the_end_of_a_call(model: Path, caplog: pytest.LogCaptureFixture):
    def said(num_gpu_blocks: int, **arguments: Any) -> list[str]:
        """Of three calls, each of which lacks blocks, or none."""
        caplog.clear()
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        preempted = [0.0]
        arguments |= {"num_gpu_blocks_override": num_gpu_blocks}
        with caplog.at_level("INFO", logger="jaxllm"), LLM(model, **{**ROOMY, **arguments}) as llm:
            for seed in range(3):
                llm.generate(prompts(12, 40, seed=seed), params, use_tqdm=False)
                preempted.append(next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"))  # pyright: ignore
        assert len(set(preempted)) == (1 if num_gpu_blocks == 97 else 4)
        return [message for message in caplog.messages if message.startswith("Advice (preemptions)")]

    (line,) = said(60)
    assert "num_gpu_blocks_override=97, or max_num_seqs=7" in line
    assert said(60, disable_log_stats=False) == [line]
    assert said(97) == []
    assert said(60, disable_log_stats=True) == []
