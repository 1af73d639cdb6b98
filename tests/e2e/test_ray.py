"""Engines on a Ray cluster answer as one engine does, also when their processes die. The cluster is this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.own_process import ROOT
from support.tiny_model import SMALL, VOCAB_SIZE

from jaxllm import LLM, RequestOutput, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.ray import EnginePool, EngineProcessorConfig, build_processor

ray: Any = pytest.importorskip("ray", reason="ray is not installed: `make test-ray` installs it")

pytestmark = [
    pytest.mark.ray,
    # of Ray's own: files and sockets that it leaves to the collector, and what it will do some day
    pytest.mark.filterwarnings("default::ResourceWarning", "default::FutureWarning", "default::DeprecationWarning"),
]

#: a thread each, and a processor that is left to the stages of a dataset
ENGINE: dict[str, Any] = {"num_cpus": 0.5, **SMALL}
PROMPTS = [f"{number} is a number" for number in range(24)]
#: of different lengths, drawn and greedy in turns
PARAMS = [
    SamplingParams(max_tokens=4 + 3 * (i % 7), temperature=float(i % 2), seed=i, ignore_eos=True)
    for i in range(len(PROMPTS))
]


class Fatal(str):
    """A prompt that ends every process that receives it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def engine_processes() -> list[psutil.Process]:
    """The processes of engines of pools."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that has just ended
            found += [process] if "EngineActor" in " ".join(process.cmdline()) else []
    return found


@pytest.fixture(scope="module")
def pool(program_store: None, tiny_model: Path) -> Iterator[EnginePool]:
    """A pool that has started a cluster of its own, of which nothing is left when it ends."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        with EnginePool(tiny_model, num_engines=2, **ENGINE) as pool:
            yield pool
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    _, left = psutil.wait_procs(left, timeout=10)
    assert not left and not ray.is_initialized()


@pytest.fixture(scope="module")
def expected(engine: LLM) -> list[list[int]]:
    """What one engine answers."""
    return tokens(engine.generate(PROMPTS, PARAMS, use_tqdm=False))


def test_nothing_is_told_to_anybody(pool: EnginePool):
    assert ray._private.worker.global_worker.node.webui_url in (None, "")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_answers_are_those_of_one_engine(pool: EnginePool, expected: list[list[int]]):
    outputs = pool.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert tokens(outputs) == expected
    assert [(output.index, output.prompt) for output in outputs] == list(enumerate(PROMPTS))
    assert len({output.request_id for output in outputs}) == len(PROMPTS)


def test_what_is_drawn_without_a_seed_differs_from_engine_to_engine_as_in_one(
    pool: EnginePool, tiny_model: Path, engine: LLM
):
    params = SamplingParams(max_tokens=8, temperature=1.0, ignore_eos=True)
    drawn = tokens(pool.generate(["again"] * 8, params, use_tqdm=False))
    assert len(set(map(tuple, drawn))) == 8
    # neither engine has had a request without a seed before
    assert drawn == tokens(engine.generate(["again"] * 8, params, use_tqdm=False))


def test_chats_are_rendered(pool: EnginePool, engine: LLM):
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:3]]
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    wanted = engine.chat(conversations, params, use_tqdm=False)
    outputs = pool.chat(conversations, params, use_tqdm=False)
    assert tokens(outputs) == tokens(wanted)
    assert [o.prompt_token_ids for o in outputs] == [o.prompt_token_ids for o in wanted]
    assert tokens(pool.chat(iter(conversations), params, use_tqdm=False)) == tokens(wanted)


def test_prompts_without_a_length_and_outputs_as_they_finish(pool: EnginePool, expected: list[list[int]]):
    found: list[RequestOutput] = []
    assert pool.generate(iter(PROMPTS), iter(PARAMS), use_tqdm=False, on_output=found.append) == []
    assert tokens(sorted(found, key=lambda output: output.index)) == expected


def test_engines_that_are_killed_cost_no_answer_and_give_none_twice(pool: EnginePool, expected: list[list[int]]):
    found: list[RequestOutput] = []
    living = engine_processes()

    def kill(output: RequestOutput) -> None:
        found.append(output)
        if len(found) in (3, 12):
            living.pop().kill()

    pool.generate(PROMPTS, PARAMS, use_tqdm=False, on_output=kill)
    assert not living
    assert sorted(output.index for output in found) == list(range(len(PROMPTS)))
    assert tokens(sorted(found, key=lambda output: output.index)) == expected


def test_a_prompt_that_ends_engines_is_found_out(pool: EnginePool, expected: list[list[int]]):
    prompts = [*PROMPTS[:5], Fatal("boom"), *PROMPTS[5:]]
    params = [*PARAMS[:5], PARAMS[0], *PARAMS[5:]]
    outputs = pool.generate(prompts, params, use_tqdm=False, on_error="return")
    fatal = outputs.pop(5)
    assert fatal.prompt == "boom" and fatal.outputs[0].finish_reason == "error"
    assert fatal.error is not None and fatal.error.startswith("3 engines died while they had this prompt")
    assert tokens(outputs) == expected and not any(output.error for output in outputs)


def test_a_refused_prompt_fails_alone(pool: EnginePool, expected: list[list[int]]):
    prompts = [PROMPTS[0], [VOCAB_SIZE], PROMPTS[2]]
    outputs = pool.generate(prompts, PARAMS[:3], use_tqdm=False, on_error="return")
    assert outputs[1].error is not None and str(VOCAB_SIZE) in outputs[1].error
    assert tokens([outputs[0], outputs[2]]) == [expected[0], expected[2]]
    with pytest.raises(ValidationError, match=rf"prompts\[1\]: .*{VOCAB_SIZE}"):
        pool.generate(prompts, PARAMS[:3], use_tqdm=False)


def test_a_call_that_is_left_does_not_disturb_the_next(pool: EnginePool, expected: list[list[int]]):
    def leave(_: RequestOutput) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.generate(PROMPTS, SamplingParams(max_tokens=200, ignore_eos=True), use_tqdm=False, on_output=leave)
    assert tokens(pool.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
    with pytest.raises(RuntimeError, match="on_output was called by the pool"):
        pool.generate(PROMPTS[0], use_tqdm=False, on_output=lambda _: pool.generate(PROMPTS[0]))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"hf_overrides": {"num_attention_heads": 5}}, ValidationError, "num_attention_heads=5 is not a multiple"),
        ({"max_modle_len": 5}, TypeError, "Did you mean 'max_model_len'"),
        ({"num_cpus": 10**6}, ValidationError, r"num_engines=1 with num_cpus=1e\+06 .* do not fit .* 0 would fit"),
        ({"num_engines": 0}, ValidationError, "num_engines must be at least 1"),
    ],
)
def test_a_pool_that_cannot_start_says_why_and_leaves_nothing(
    pool: EnginePool, tiny_model: Path, arguments: dict[str, Any], kind: type[Exception], message: str
):
    before = {process.pid for process in engine_processes()}
    with pytest.raises(kind, match=message):
        EnginePool(tiny_model, **{"num_engines": 1, "num_cpus": 0.25, **SMALL, **arguments})
    started = [process for process in engine_processes() if process.pid not in before]
    assert not psutil.wait_procs(started, timeout=10)[1]


def test_a_dataset_is_answered_row_by_row(pool: EnginePool, tiny_model: Path, engine: LLM):
    params = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    rows = [{"id": i, "text": prompt} for i, prompt in enumerate(PROMPTS[:10])]
    config = EngineProcessorConfig(
        model_source=tiny_model, engine_kwargs=SMALL, batch_size=3, num_cpus=0.5, should_continue_on_error=True
    )
    process = build_processor(
        config,
        preprocess=lambda row: {
            "messages": [{"role": "user", "content": row["text"] * (1 if row["id"] != 7 else 50)}],
            "sampling_params": params,
        },
        postprocess=lambda row: {"id": row["id"], "tokens": row["generated_tokens"], "text": row["generated_text"]},
    )
    found = {row["id"]: row for row in process(ray.data.from_items(rows)).take_all()}
    conversations = [[{"role": "user", "content": row["text"]}] for row in rows]
    wanted = engine.chat(conversations, SamplingParams(**params), use_tqdm=False)
    assert sorted(found) == list(range(10))
    for output, row in zip(wanted, rows, strict=True):
        if row["id"] != 7:
            assert list(found[row["id"]]["tokens"]) == output.outputs[0].token_ids
            assert found[row["id"]]["text"] == output.outputs[0].text
            assert found[row["id"]]["__inference_error__"] == ""
    assert "256" in found[7]["__inference_error__"] and found[7]["text"] == PROMPTS[7]
