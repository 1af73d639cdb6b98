"""Sleep, weights and the calls that reach into the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny_model import SMALL, write_tiny_model

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPTS = ["one prompt", "another, longer prompt " * 3]


#: on a CPU, a program for single rows reads bfloat16 weights in a form of its own
SINGLE_ROWS = {**SMALL, "dtype": "bfloat16", "enforce_eager": False}


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **SMALL) as llm:
        yield llm


def texts(llm: LLM) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def texts_and_one_alone(llm: LLM) -> list[str]:
    return [*texts(llm), llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0].text]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_what_slept_wakes_up_the_same(llm: LLM, level: int):
    before = texts(llm)
    runner: Any = llm.engine.runner
    llm.sleep(level)
    assert llm.is_sleeping
    assert (runner._state is None) == (level > 0)
    assert (runner.params is None) == (level == 2)
    with pytest.raises(RuntimeError, match="wake_up"):
        llm.generate("hello", GREEDY, use_tqdm=False)
    assert llm.wake_up()
    assert texts(llm) == before


def test_waking_up_in_parts(llm: LLM):
    before = texts(llm)
    llm.sleep(2)
    assert not llm.wake_up(["weights"]) and llm.is_sleeping
    assert llm.wake_up(["kv_cache"]) and not llm.is_sleeping
    assert texts(llm) == before
    llm.release_kv_cache_memory()
    runner: Any = llm.engine.runner
    assert runner._state is None and runner.params is not None
    assert llm.wake_up()
    assert texts(llm) == before


def begin(llm: LLM, steps: int) -> None:
    llm.enqueue(PROMPTS, GREEDY)
    for _ in range(steps):
        llm.engine.client.step()


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_requests_are_brought_to_rest_before_the_engine_sleeps(llm: LLM, mode: str):
    before = texts(llm)
    begin(llm, 6)
    llm.sleep(1, mode=mode)
    assert llm.engine.core.cores[0].scheduler.kv_cache_manager.pool.num_used == 0
    llm.wake_up()
    outputs = llm.wait_for_completion(RequestOutput, use_tqdm=False)
    reasons = {output.outputs[0].finish_reason for output in outputs}
    found = [output.outputs[0].text for output in outputs]
    if mode == "abort":
        assert reasons == {"abort"}
        assert any(found) and all(whole.startswith(text) for whole, text in zip(before, found, strict=True))
        assert found != before
    else:
        assert reasons == {"length"} and found == before


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda llm: llm.sleep(3), ValidationError, "level must be 0, 1 or 2, got 3"),
        (lambda llm: llm.sleep(mode="nap"), ValidationError, "got 'nap'"),
        (lambda llm: llm.wake_up(["weight"]), ValidationError, "'weight'"),
        (lambda llm: llm.collective_rpc("dance"), ValidationError, "no method 'dance'; it has .*reload_weights"),
        (lambda llm: llm.collective_rpc("_sample"), ValidationError, "no method '_sample'"),
        (lambda llm: llm.wait_for_completion(dict, use_tqdm=False), TypeError, "RequestOutput"),
    ],
)
def test_bad_calls_say_what_is_wrong(engine: LLM, call: Any, kind: type[Exception], words: str):
    engine.enqueue("hello", GREEDY)
    with pytest.raises(kind, match=words):
        call(engine)
    engine.wait_for_completion(use_tqdm=False)


@pytest.mark.parametrize("options", [SMALL, SINGLE_ROWS], ids=["any rows", "single rows"])
def test_weights_are_a_pytree_that_can_be_replaced(options: dict[str, Any], tiny_model: Path, tmp_path: Path):
    with LLM(tiny_model, **options) as llm, LLM(write_tiny_model(tmp_path, seed=1), **options) as other:
        check_replacing(llm, other)
        check_named(llm, load_file(tmp_path / "model.safetensors"), load_file(tiny_model / "model.safetensors"), other)


def check_named(llm: LLM, tensors: dict[str, Any], own: dict[str, Any], other: LLM) -> None:
    """Tensors by their names: all of them, and by vLLM's way one at a time."""
    mine, theirs = map(texts_and_one_alone, (llm, other))
    llm.update_weights(tensors)
    assert texts_and_one_alone(llm) == theirs
    for name, tensor in own.items():
        model = llm.llm_engine.model_executor.driver_worker.model_runner.model
        assert model.load_weights([(name, tensor)]) == {name}
    assert texts_and_one_alone(llm) == mine
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
    assert texts_and_one_alone(llm) == theirs
    for others in ({"is_checkpoint_format": False}, {"weights_path": "/x"}):
        with pytest.raises(ValidationError, match="reload_weights takes tensors by Hugging Face's names"):
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(own.items()), **others})
    assert texts_and_one_alone(llm) == theirs
    # a body's names without the prefix of the whole model; what torch keeps beside the weights
    llm.update_weights({name.removeprefix("model."): tensor for name, tensor in own.items()})
    llm.update_weights({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    assert texts_and_one_alone(llm) == mine
    # requests that wait while the engine sleeps, as a training loop puts it to sleep
    llm.enqueue("hello", GREEDY, use_tqdm=False)
    llm.sleep(level=2, mode="keep")
    llm.wake_up(tags=["weights"])
    llm.update_weights(tensors)
    assert llm.wake_up(tags=["kv_cache"])
    (kept,), (expected,) = llm.wait_for_completion(use_tqdm=False), other.generate("hello", GREEDY, use_tqdm=False)
    assert kept.outputs[0].token_ids == expected.outputs[0].token_ids
    for wrong, words in (
        ({"model.layers.0.mlp.up.weight": own["lm_head.weight"]}, "no tensor .* mean 'model.layers.0.mlp.up_proj.weig"),
        (
            {"lm_head.weight": own["lm_head.weight"][:7]},
            r"must have the shape \(257, 64\), got \(7, 64\)",
        ),
        ({"lm_head.weight": np.zeros((257, 64), np.int32)}, "must be of floats, got int32"),
    ):
        with pytest.raises(ValidationError, match=words):
            llm.update_weights(wrong)
    with pytest.raises(AttributeError, match="no 'named_modules' inside of its engine: LLM.apply_model shows"):
        llm.llm_engine.engine_core.model_executor.named_modules()


def test_what_vllms_scripts_do_with_an_engine(llm: LLM):
    by_prompts, by_ids = (
        llm.generate(**{name: [[1, 2, 3], [4]]}, sampling_params=GREEDY, use_tqdm=False)  # pyright: ignore
        for name in ("prompts", "prompt_token_ids")
    )
    assert [o.outputs[0].token_ids for o in by_ids] == [o.outputs[0].token_ids for o in by_prompts]
    old: Any = llm.generate
    for args, ids in (((None, GREEDY), [[1, 2, 3]]), (([1, 2, 3], GREEDY), None)):
        (found,) = old(*args, prompt_token_ids=ids, use_tqdm=False)
        assert found.outputs[0].token_ids == by_prompts[0].outputs[0].token_ids
    with pytest.raises(TypeError, match="pass one of prompts and prompt_token_ids"):
        old("x", GREEDY, prompt_token_ids=[[1]])
    engine = llm.llm_engine
    engine.do_log_stats()
    assert not engine.is_sleeping() and engine.tokenizer is llm.get_tokenizer()
    assert engine.cache_config.cache_dtype == "auto" and engine.parallel_config.world_size == 1
    assert engine.scheduler_config.max_num_seqs == SMALL["max_num_seqs"]
    assert engine.model_config.architectures == ["LlamaForCausalLM"]
    assert engine.engine_core.collective_rpc(lambda runner: 1) == engine.collective_rpc(lambda runner: 1) == [1]
    # which free vLLM's memory
    del llm.llm_engine.model_executor.driver_worker
    del llm.llm_engine.model_executor
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate("x", GREEDY, use_tqdm=False)


def check_replacing(llm: LLM, other: LLM) -> None:
    mine, theirs = map(texts_and_one_alone, (llm, other))
    assert all(one != another for one, another in zip(mine, theirs, strict=True))
    (params,) = llm.apply_model(lambda params: params)
    (others,) = other.apply_model(lambda params: jax.tree.map(np.array, params))
    llm.update_weights(others)
    assert texts_and_one_alone(llm) == theirs
    llm.update_weights(params)
    assert texts_and_one_alone(llm) == mine
    assert llm.collective_rpc(lambda runner, scale: scale * len(jax.tree.leaves(runner.params)), args=(2,))[0] > 0
    llm.update_weights(others)
    llm.collective_rpc("reload_weights")
    assert texts_and_one_alone(llm) == mine
    # what the caller gave is the caller's: it has not been deleted
    assert np.isfinite(np.asarray(jax.tree.leaves(params)[0])).all()


def test_weights_of_another_shape_are_refused_by_name(llm: LLM):
    (params,) = llm.apply_model(lambda params: params)
    wrong = dataclasses.replace(params, embedding=params.embedding[:, :8])
    with pytest.raises(ValidationError, match=r"params.embedding must be float32\[257, 64\], got float32\[257, 8\]"):
        llm.update_weights(wrong)
    begin(llm, 1)
    with pytest.raises(RuntimeError, match="while requests run"):
        llm.update_weights(params)


def test_the_prefix_cache_is_reset_under_running_requests(llm: LLM):
    before = texts(llm)
    begin(llm, 6)
    assert not llm.reset_prefix_cache()
    assert llm.reset_prefix_cache(reset_running_requests=True)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == before
    assert all(output.metrics.num_preemptions == 1 for output in outputs)


def test_enqueued_requests_come_back_in_their_order(engine: LLM):
    alone = [engine.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].text for prompt in PROMPTS]
    short = SamplingParams(temperature=0.0, max_tokens=2)
    ids = engine.enqueue(PROMPTS, [GREEDY, short])
    chat = engine.enqueue_chat([{"role": "user", "content": "hi"}], short)
    with pytest.raises(ValidationError, match="empty"):
        engine.enqueue(["fine", []], GREEDY)
    outputs = engine.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == ids + chat
    assert outputs[0].outputs[0].text == alone[0] and alone[1].startswith(outputs[1].outputs[0].text)
    assert outputs[2].prompt == "user: hi\n"
    assert engine.wait_for_completion(use_tqdm=False) == []


def test_a_stream_that_is_cut_short_says_so(engine: LLM):
    stream = engine.stream("hello", SamplingParams(temperature=0.0, max_tokens=50))
    next(stream)
    engine.sleep(0)
    engine.wake_up()
    with pytest.raises(RuntimeError, match="cut short"):
        list(stream)


def test_random_weights_give_way_to_those_on_disk(engine: LLM, tiny_model: Path):
    with LLM(tiny_model, load_format="dummy", **SMALL) as llm:
        assert texts(llm) != texts(engine)
        with pytest.raises(
            ValidationError, match=r"update_config changes what reload_weights reads.*got \{'seed': 3\}"
        ):
            llm.collective_rpc("update_config", args=({"seed": 3},))
        llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
        llm.collective_rpc("reload_weights")
        assert texts(llm) == texts(engine)
