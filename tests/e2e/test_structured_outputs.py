"""Structured outputs through the whole engine. The model's weights are random: what fits, fits because of the masks."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput
from jaxllm.api.sampling_params import StructuredOutputsParams
from jaxllm.engine.io import token_constraints

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kinds": {"type": "array", "items": {"enum": ["a", "bb"]}, "maxItems": 3},
    },
    "required": ["name", "age", "kinds"],
    "additionalProperties": False,
}
REGEX = r"[a-c]{2,9}-[0-9]{3}x"
CHOICE = ["yes", "yes sir", "non, désolé"]
GRAMMAR = 'root ::= "a" ("b" | "c" root)'
CONSTRAINTS: list[dict[str, Any]] = [
    {"json": SCHEMA, "disable_any_whitespace": True},
    {"regex": REGEX},
    {"choice": CHOICE},
    {"grammar": GRAMMAR},
]
PROMPTS = [f"prompt {i}: " + "word " * (9 * i) for i in range(4)]


def fits(output: RequestOutput, constraint: dict[str, Any]) -> bool:
    """Whether the finished text is what was asked for, by other means than ours."""
    text = output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop" and output.error is None
    if "json" in constraint:
        jsonschema.validate(json.loads(text), constraint["json"])
        return True
    if "regex" in constraint:
        return re.fullmatch(constraint["regex"], text) is not None
    if "choice" in constraint:
        return text in constraint["choice"]
    return re.fullmatch("(ac)*ab", text) is not None


def workload() -> tuple[list[str], list[SamplingParams]]:
    """Every constraint greedily and at temperature 1, each followed by a request without one."""
    prompts, params = [], []
    for i, constraint in enumerate(CONSTRAINTS):
        for temperature in (0.0, 1.0):
            prompts += [PROMPTS[i], f"free {i} {temperature}"]
            params += [
                SamplingParams(temperature=temperature, seed=i, max_tokens=120, structured_outputs=dict(constraint)),
                SamplingParams(temperature=temperature, seed=i, max_tokens=40),
            ]
    return prompts, params


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(engine: LLM) -> list[RequestOutput]:
    """The workload, one request at a time."""
    return [engine.generate(prompt, params, use_tqdm=False)[0] for prompt, params in zip(*workload(), strict=True)]


def test_outputs_fit(alone: list[RequestOutput]):
    for i, constraint in enumerate(CONSTRAINTS):
        for output in (alone[4 * i], alone[4 * i + 2]):
            assert fits(output, constraint), output


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"async_scheduling": False},
        {"max_num_seqs": 16, "max_num_batched_tokens": 16, "enable_prefix_caching": False},
        # four long requests do not fit beside each other
        {"num_gpu_blocks_override": 26, "block_size": 8, "max_model_len": 200},
    ],
    ids=["as it is", "synchronous", "small chunks", "preemptions"],
)
def test_neighbours_and_scheduling_change_nothing(
    engine: LLM,
    tiny_model: Path,
    alone: list[RequestOutput],
    arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
):
    prompts, params = workload()
    if "max_num_seqs" in arguments:
        monkeypatch.setattr(token_constraints, "FILLED_TOGETHER", 2)
    if not arguments:
        # the second time the prompts come from the prefix cache
        for _ in range(2):
            assert tokens(engine.generate(prompts, params, use_tqdm=False)) == tokens(alone)
        return
    with LLM(tiny_model, **SMALL | arguments) as llm:
        assert tokens(llm.generate(prompts, params, use_tqdm=False)) == tokens(alone)
        preempted = llm.engine.core.cores[0].scheduler.stats().num_preemptions
        assert bool(preempted) is ("num_gpu_blocks_override" in arguments)


def test_only_steps_with_masks_wait_for_tokens(engine: LLM, monkeypatch: pytest.MonkeyPatch):
    """Free requests run two steps deep; a constrained one samples its step after the one before has been read."""
    core = engine.engine.core.cores[0]
    runner, depths, masked = core._runner, [], []
    execute, sample = runner.execute, runner.sample

    def executing(scheduled):
        depths.append(len(core._in_flight))
        return execute(scheduled)

    def sampling(launched, masks):
        masked.append((len(core._in_flight), sorted(masks)))
        return sample(launched, masks)

    monkeypatch.setattr(runner, "execute", executing)
    engine.generate("free", SamplingParams(max_tokens=12), use_tqdm=False)
    assert max(depths) == 1 and len(depths) >= 12
    monkeypatch.setattr(runner, "sample", sampling)
    depths.clear()
    engine.generate("bound", SamplingParams(max_tokens=50, structured_outputs={"choice": ["abc"]}), use_tqdm=False)
    # a, b, c, the end; and a step that was launched before the end was read
    assert masked == [(0, [0])] * 4 + [(0, [])] and not depths


@pytest.mark.parametrize("stop_early", [{"max_tokens": 3}, {"stop": ["-"], "max_tokens": 50}])
def test_other_ends_cut_it(engine: LLM, stop_early: dict[str, Any]):
    output = engine.generate(
        "x", SamplingParams(structured_outputs={"regex": "a{5}-b+"}, **stop_early), use_tqdm=False
    )[0]
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == (
        ("aaa", "length") if "stop" not in stop_early else ("aaaaa", "stop")
    )


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"min_tokens": 4, "structured_outputs": {"regex": "a*"}}, "aaaa"),
        ({"ignore_eos": True, "structured_outputs": {"regex": "ab"}}, "ab"),
        ({"bad_words": ["a"], "structured_outputs": {"choice": ["ax", "bx"]}}, "bx"),
        ({"logit_bias": {0: 100.0}, "structured_outputs": {"choice": ["cx"]}}, "cx"),
        ({"repetition_penalty": 1.3, "structured_outputs": {"choice": ["qqqq"]}}, "qqqq"),
        ({"structured_outputs": {"regex": ""}}, ""),
    ],
)
def test_together_with_other_parameters(engine: LLM, params: dict[str, Any], text: str):
    output = engine.generate("x", SamplingParams(temperature=0.0, max_tokens=60, **params), use_tqdm=False)[0]
    completion = output.outputs[0]
    if "min_tokens" in params:
        assert completion.text.startswith(text) and set(completion.text) == {"a"}
    else:
        assert (completion.text, completion.finish_reason) == (text, "stop")


def test_logprobs_are_those_of_the_model(engine: LLM):
    """The mask restricts what is sampled, not what `raw_logprobs` report."""
    free = engine.generate("x", SamplingParams(temperature=0.0, max_tokens=1, logprobs=3), use_tqdm=False)[0]
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=3, structured_outputs={"choice": ["é"]})
    bound = engine.generate("x", params, use_tqdm=False)[0]
    top = free.outputs[0].logprobs[0]  # pyright: ignore[reportOptionalSubscript]
    assert top.items() <= bound.outputs[0].logprobs[0].items()  # pyright: ignore[reportOptionalSubscript]


def test_nothing_left_ends_that_request_alone(engine: LLM, alone: list[RequestOutput]):
    prompts, params = workload()
    impossible = SamplingParams(structured_outputs={"regex": "[ab]+"}, allowed_token_ids=[0], max_tokens=5)
    later = SamplingParams(
        structured_outputs={"choice": ["ab"]}, allowed_token_ids=engine.get_tokenizer().encode("a"), max_tokens=5
    )
    outputs = engine.generate(["i", *prompts, "l"], [impossible, *params, later], use_tqdm=False, on_error="return")
    assert tokens(outputs[1:-1]) == tokens(alone)
    assert [outputs[i].outputs[0].finish_reason for i in (0, -1)] == ["error", "error"]
    assert "leaves no token to generate" in str(outputs[0].error) and outputs[-1].outputs[0].text == "a"


@pytest.mark.parametrize("regex", ["(a", "a" * 5000 + "("], ids=["checked at once", "compiled in a thread"])
def test_a_bad_grammar_fails_only_its_request(engine: LLM, alone: list[RequestOutput], regex: str):
    bad = SamplingParams(structured_outputs={"regex": regex})
    prompts, params = workload()
    outputs = engine.generate([*prompts, "bad"], [*params, bad], use_tqdm=False, on_error="return")
    assert tokens(outputs[:-1]) == tokens(alone)
    assert outputs[-1].outputs[0].finish_reason == "error" and "unclosed group" in str(outputs[-1].error)
    with pytest.raises(ValidationError, match="unclosed group"):
        engine.generate(["good", "bad"], [params[0], bad], use_tqdm=False)
    assert tokens(engine.generate(prompts[0], params[0], use_tqdm=False)) == tokens(alone[:1])


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_request_waits_for_its_grammar_and_others_do_not(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, policy: str
):
    with LLM(tiny_model, **SMALL, scheduling_policy=policy) as llm:
        constraints = llm.engine.core.cores[0]._constraints
        compiler = constraints._compiler  # pyright: ignore[reportOptionalMemberAccess]
        compile_really = compiler.compile  # pyright: ignore[reportOptionalMemberAccess]
        compiling: Future = Future()

        def finish() -> None:
            # the engine waits only when there is nothing else to do
            if not compiling.done():
                compiling.set_result(compile_really(constraint).result())

        constraint = StructuredOutputsParams(choice=["abc"])
        bound = SamplingParams(structured_outputs=constraint)
        monkeypatch.setattr(compiler, "compile", lambda params: compiling)
        monkeypatch.setattr(constraints, "wait", finish)
        outputs = llm.generate(["first", "second", "third"], [bound, SamplingParams(), bound], use_tqdm=False)
        first, second, third = (output.metrics for output in outputs)
        assert second.last_token_ts < first.first_token_ts == third.first_token_ts
        assert [outputs[i].outputs[0].text for i in (0, 2)] == ["abc", "abc"]
        # aborted while it waits
        compiling = Future()
        request, text = llm.engine.inputs.request("waits", "p", bound)
        core = llm.engine.core.cores[0]
        core.add_request(request, text)
        core.abort(["waits"])
        compiling.set_result(compile_really(constraint).result())
        assert core.step() == [] and not core.has_unfinished


def test_several_completions_of_a_prompt(engine: LLM):
    params = SamplingParams(n=3, seed=4, max_tokens=100, structured_outputs={"regex": REGEX})
    outputs = engine.generate(["a", "b"], params, use_tqdm=False)
    texts = [completion.text for output in outputs for completion in output.outputs]
    assert len(texts) == 6 and all(re.fullmatch(REGEX, text) for text in texts) and len(set(texts)) > 2
    one = SamplingParams(seed=5, max_tokens=100, structured_outputs={"regex": REGEX})
    assert engine.generate("a", one, use_tqdm=False)[0].outputs[0].text == texts[1]


def test_streaming(engine: LLM):
    params = SamplingParams(structured_outputs={"choice": ["désolé 🙂"]}, max_tokens=40, stream_interval=4)
    pieces = list(engine.stream_chat([{"role": "user", "content": "hi"}], params))
    assert "".join(pieces) == "désolé 🙂" and len(pieces) <= 5


def test_without_a_tokenizer_it_is_refused(tiny_model: Path):
    with LLM(tiny_model, **SMALL, skip_tokenizer_init=True) as llm:
        for params, text in (
            (SamplingParams(structured_outputs={"regex": "a"}), "requires a tokenizer"),
            (SamplingParams(thinking_token_budget=1), "thinking_token_budget needs a tokenizer"),
        ):
            with pytest.raises(ValidationError, match=text):
                llm.generate([1, 2], params, use_tqdm=False)
