"""The engine driven from outside, step by step."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path

import pytest
from support.tiny_model import SMALL

from jaxllm import LLM, EngineArgs, LLMEngine, RequestOutput, RequestOutputKind, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.runner.heads.step_results import StepResult

PROMPTS = ["one", "and another", "a third prompt"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture
def stepped(engine: LLM) -> LLMEngine:
    return engine.llm_engine


def drive(engine: LLMEngine) -> list[RequestOutput]:
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def test_requests_come_while_others_run(engine: LLM, stepped: LLMEngine):
    expected = [output.outputs[0].text for output in engine.generate(PROMPTS, GREEDY, use_tqdm=False)]
    outputs, waiting = [], dict(enumerate(PROMPTS))
    while waiting or stepped.has_unfinished_requests():
        if waiting:
            index = min(waiting)
            stepped.add_request(str(index), waiting.pop(index), GREEDY)
        outputs += stepped.step()
    last = {output.request_id: output for output in outputs if output.finished}
    assert [last[str(i)].outputs[0].text for i in range(3)] == expected
    assert len(outputs) > 3, "outputs come before the end"
    assert stepped.get_num_unfinished_requests() == 0


def test_output_kinds(stepped: LLMEngine):
    counts, texts = {}, {}
    for kind in RequestOutputKind:
        params = SamplingParams(temperature=0.0, max_tokens=8, output_kind=kind)
        stepped.add_request(kind.name, PROMPTS[0], params)
        outputs = drive(stepped)
        counts[kind] = len(outputs)
        texts[kind] = outputs[-1].outputs[0].text
        if kind is RequestOutputKind.DELTA:
            texts[kind] = "".join(output.outputs[0].text for output in outputs)
    assert set(counts.values()) == {1, 8} and counts[RequestOutputKind.FINAL_ONLY] == 1
    assert len(set(texts.values())) == 1


def test_aborted_requests_bring_nothing_more(stepped: LLMEngine):
    for name in ("kept", "ended"):
        stepped.add_request(name, PROMPTS[0], GREEDY)
    with pytest.raises(ValidationError, match="'kept' is in use"):
        stepped.add_request("kept", PROMPTS[1], GREEDY)
    stepped.abort_request("ended")
    assert stepped.get_num_unfinished_requests() == 1
    assert {output.request_id for output in drive(stepped)} == {"kept"}


def test_running_requests_survive_a_reset(engine: LLM, stepped: LLMEngine):
    expected = engine.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0].text
    stepped.add_request("x", PROMPTS[0], GREEDY)
    for _ in range(4):
        stepped.step()
    assert stepped.reset_prefix_cache(reset_running_requests=True)
    assert drive(stepped)[-1].outputs[0].text == expected


def test_an_error_while_the_rest_is_read_is_told_to_who_waits(stepped: LLMEngine, monkeypatch: pytest.MonkeyPatch):
    def fail(self: StepResult) -> None:
        raise OSError("the device is gone")

    stepped.add_request("x", PROMPTS[0], GREEDY)
    for _ in range(3):
        stepped.step()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the device is gone"):
        patch.setattr(StepResult, "result", fail)
        stepped.reset_prefix_cache(reset_running_requests=True)
    (output,) = stepped.step()
    assert output.finished and "the device is gone" in (output.error or "")
    assert not stepped.has_unfinished_requests()


def test_a_step_of_a_sleeping_engine_ends_nothing(engine: LLM, stepped: LLMEngine):
    expected = engine.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0].text
    stepped.add_request("x", PROMPTS[0], GREEDY)
    stepped.step()
    stepped.sleep(mode="keep")
    stepped.step()  # what the pause has brought
    with pytest.raises(RuntimeError, match="wake_up"):
        stepped.step()
    assert stepped.wake_up()
    assert drive(stepped)[-1].outputs[0].text == expected


def test_what_was_queued_outlives_the_object_that_queued_it(engine: LLM):
    engine.llm_engine.add_request("x", PROMPTS[0], GREEDY)
    assert engine.llm_engine.get_num_unfinished_requests() == 1
    # whose steps bring the output too
    expected = engine.generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=20), use_tqdm=False)
    assert engine.llm_engine.get_num_unfinished_requests() == 0 and engine.llm_engine.has_unfinished_requests()
    last = engine.llm_engine.step()[-1]
    assert last.finished and last.outputs[0].token_ids == expected[0].outputs[0].token_ids[:8]
    assert not engine.llm_engine.has_unfinished_requests()


def test_an_aborted_request_leaves_no_outputs(engine: LLM, stepped: LLMEngine):
    stepped.add_request("ended", PROMPTS[0], GREEDY)
    engine.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    stepped.abort_request("ended")
    assert not stepped.has_unfinished_requests()


def test_an_engine_of_checked_arguments(tiny_model: Path):
    args = EngineArgs(model=tiny_model, **SMALL)
    stepped = LLMEngine.from_engine_args(args)
    stepped.add_request("x", PROMPTS[0], GREEDY)
    assert drive(stepped)[-1].finished
    # nobody but the caller holds it
    freed = weakref.ref(stepped.llm)
    stepped.add_request("never finished", PROMPTS[0], GREEDY)
    stepped.step()
    del stepped
    assert freed() is None


def test_arguments_are_refused_for_an_engine_that_runs(engine: LLM):
    with pytest.raises(TypeError, match="max_num_seqs"):
        LLMEngine(engine, max_num_seqs=3)


# Ids.


def test_what_was_enqueued_and_aborted_returns_what_there_is(engine: LLM):
    expected = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
    ids = engine.enqueue(PROMPTS, GREEDY)
    engine.llm_engine.abort_request(ids[0])
    outputs = engine.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == ids
    assert outputs[0].finished and outputs[0].outputs[0].finish_reason == "abort"
    assert outputs[0].outputs[0].token_ids == [] and outputs[0].error is None
    for output, whole in zip(outputs[1:], expected[1:], strict=True):
        assert output.outputs[0].token_ids == whole.outputs[0].token_ids


@pytest.mark.parametrize("n", [1, 3])
def test_a_running_generate_is_aborted_by_its_id(engine: LLM, monkeypatch: pytest.MonkeyPatch, n: int):
    """As another thread does which gets the engine's lock between two steps."""
    params = SamplingParams(seed=1, max_tokens=50, ignore_eos=True, n=n)
    client, step = engine.engine.client, engine.engine.client.step
    number = int(client.next_id()) + 1
    count = itertools.count(1)

    def abort_before_the_fifth() -> None:
        if next(count) == 5:
            engine.llm_engine.abort_request(str(number))
        else:
            step()

    with monkeypatch.context() as patch:
        patch.setattr(client, "step", abort_before_the_fifth)
        ended, other = engine.generate(PROMPTS[:2], params, use_tqdm=False)
    assert [completion.finish_reason for completion in ended.outputs] == ["abort"] * n
    assert all(0 < len(completion.token_ids) < 50 for completion in ended.outputs)
    assert [len(completion.token_ids) for completion in other.outputs] == [50] * n


def test_the_users_ids_and_the_engines_own_do_not_collide(engine: LLM, stepped: LLMEngine):
    first = int(engine.engine.client.next_id())
    names = [str(first + i) for i in range(1, 4)]
    for name in names:
        stepped.add_request(name, PROMPTS[0], GREEDY)
    outputs = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    assert not {output.request_id for output in outputs} & set(names), "an id names one request"
    assert {output.request_id for output in drive(stepped)} == set(names)
    # and the other way around: these are the engine's
    ids = engine.enqueue(PROMPTS, GREEDY)
    several = SamplingParams(seed=1, max_tokens=8, n=2)
    assert [stepped.add_request(name, PROMPTS[0], several) for name in (*ids, "0_" + ids[0])] == [*ids, "0_" + ids[0]]
    stepped.abort_request(ids[0])
    assert {output.request_id for output in drive(stepped) if output.finished} == {ids[1], ids[2], "0_" + ids[0]}
    assert {o.outputs[0].finish_reason for o in engine.wait_for_completion(use_tqdm=False)} == {"length"}
    with pytest.raises(TypeError, match="request_id must be a string, got int"):
        stepped.add_request(13, PROMPTS[0], GREEDY)  # pyright: ignore[reportArgumentType]


def test_the_configuration_is_read_under_vllms_names(tiny_model: Path, engine: LLM, stepped: LLMEngine):
    config = stepped.vllm_config
    assert config is engine.llm_engine.vllm_config and config.model_config is stepped.model_config
    assert (config.model_config.model, config.model_config.dtype) == (str(tiny_model), "float32")
    assert config.model_config.max_model_len == config.scheduler_config.max_model_len == 256
    assert config.model_config.hf_config.architectures == ["LlamaForCausalLM"]
    # transformers' own defaults are there
    assert config.model_config.hf_config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert (config.model_config.get_vocab_size(), config.model_config.get_hidden_size()) == (257, 64)
    assert config.scheduler_config.max_num_seqs == 4
    assert config.cache_config.num_gpu_blocks == engine.memory_plan.num_blocks
    parallel = config.parallel_config
    assert (parallel.data_parallel_rank, parallel.data_parallel_size, parallel.world_size) == (0, 1, 1)
