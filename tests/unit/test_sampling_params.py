"""`SamplingParams`: vLLM's defaults, limits and error texts (the table is vLLM's documentation, restated here)."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.api.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jaxllm.api.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

VLLM_DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "flat_logprobs": False,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "stream_interval": None,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "thinking_token_budget": None,
    "repetition_detection": None,
    "skip_reading_prefix_cache": None,
    "extra_args": None,
    "trace_decode_token_ids": None,
}


def nested(levels: int) -> dict[str, Any]:
    """A JSON schema with as many objects and arrays inside each other."""
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


def build(arguments: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**arguments)


def test_defaults_are_vllms():
    assert dataclasses.asdict(SamplingParams()) == VLLM_DEFAULTS


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"n": 0}, "n must be at least 1, got 0."),
        ({"n": 10**30, "temperature": 1}, f"n must be at most 16384, got {10**30}."),
        ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling, got 2."),
        ({"n": 1.0}, "n must be an integer, got 1.0 of type float."),
        ({"n": True}, "n must be an integer, got True of type bool."),
        ({"presence_penalty": 2.1}, "presence_penalty must be in [-2, 2], got 2.1."),
        ({"frequency_penalty": -3}, "frequency_penalty must be in [-2, 2], got -3.0."),
        ({"repetition_penalty": 0}, "repetition_penalty must be greater than zero, got 0.0."),
        ({"repetition_penalty": 1e300}, "repetition_penalty must be from 1e-30 to 1e+30, beyond which logits are no"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be from 1e-30 to 1e+30, beyond which logits are no"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be a finite number, got inf."),
        ({"temperature": -0.1}, "temperature must be in [0, 2], got -0.1."),
        ({"temperature": 2.5}, "temperature must be in [0, 2], got 2.5."),
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan."),
        ({"temperature": np.float32("nan")}, "temperature must be a finite number, got nan."),
        ({"temperature": float("inf")}, "temperature must be a finite number, got inf."),
        ({"temperature": 10**400}, "temperature must fit a float"),
        ({"temperature": None}, "temperature must be a number, got None of type NoneType."),
        ({"temperature": "0.5"}, "temperature must be a number, got '0.5' of type str."),
        ({"temperature": True}, "temperature must be a number, got True of type bool."),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0."),
        ({"top_p": 1.01}, "top_p must be in (0, 1], got 1.01."),
        ({"top_p": float("nan")}, "top_p must be a finite number, got nan."),
        ({"top_k": -2}, "top_k must be 0 or -1 (disable), or at least 1, got -2."),
        ({"top_k": 1.5}, "top_k must be an integer, got 1.5 of type float."),
        ({"min_p": 1.5}, "min_p must be in [0, 1], got 1.5."),
        ({"seed": 2**64}, "seed must fit 64 bits"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"stop": ""}, "stop cannot contain an empty string."),
        ({"stop": ["a", ""]}, "stop cannot contain an empty string."),
        ({"stop": [1]}, "stop must contain only strings, got 1 of type int."),
        ({"stop": "a", "detokenize": False}, "stop strings are only supported when detokenize is True."),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must contain only integers, got 'a' of type str."),
        ({"stop_token_ids": [-1]}, "stop_token_ids must contain token ids, which start at 0, got -1."),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list, got 5 of type int."),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
        ({"max_tokens": float("inf")}, "max_tokens must be an integer, got inf of type float."),
        ({"min_tokens": -1}, "min_tokens must be greater than or equal to 0, got -1."),
        ({"min_tokens": 17}, "min_tokens must be less than or equal to max_tokens=16, got 17."),
        ({"logprobs": -2}, "logprobs must be non-negative or -1, got -2."),
        ({"prompt_logprobs": -2}, "prompt_logprobs must be non-negative or -1, got -2."),
        ({"logprob_token_ids": list(range(129))}, "logprob_token_ids can hold at most 128 ids, got 129."),
        (
            {"logprob_token_ids": [1, 2], "logprobs": 3},
            "When both logprobs and logprob_token_ids are set, logprobs must equal len(logprob_token_ids), got "
            "logprobs=3 and 2 ids. Leave logprobs out: only the ids are reported.",
        ),
        (
            {"prompt_logprobs": 1, "skip_reading_prefix_cache": False},
            "prompt_logprobs=1 needs the whole prompt to be computed, so skip_reading_prefix_cache cannot be False; "
            "leave it None.",
        ),
        ({"flat_logprobs": 1}, "flat_logprobs must be True or False, got 1 of type int."),
        ({"extra_args": ["a"]}, "extra_args must be dict | None, got ['a'] of type list."),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1 of type int."),
        ({"output_kind": "delta"}, "output_kind must be RequestOutputKind, got 'delta' of type str."),
        ({"stream_interval": 0}, "stream_interval must be at least 1, got 0."),
        ({"structured_outputs": "a"}, "structured_outputs must be StructuredOutputsParams | None"),
        (
            {"structured_outputs": {"regexp": "a"}},
            "structured_outputs has no field 'regexp'; its fields are json, regex",
        ),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex must be a string, got 5 of type int"),
        ({"structured_outputs": {"regex": "a\x00"}}, "structured_outputs.regex must not contain a NUL character"),
        ({"structured_outputs": {"choice": []}}, "Choice '[]' cannot be an empty list"),
        ({"structured_outputs": {"choice": "yes"}}, "structured_outputs.choice must be a list of strings"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice must contain only strings, got 1"),
        ({"structured_outputs": {"grammar": " "}}, "structured_outputs.grammar cannot be an empty string"),
        ({"structured_outputs": {"json": ""}}, "structured_outputs.json cannot be an empty string"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json is not JSON"),
        ({"structured_outputs": {"json": {"a": {1}}}}, "structured_outputs.json is not JSON"),
        ({"structured_outputs": {"json": nested(65)}}, "objects and arrays may nest at most 64 levels"),
        ({"structured_outputs": {"json": "[" * 9999 + "]" * 9999}}, "objects and arrays may nest at most 64 levels"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object must be True if set"),
        (
            {"structured_outputs": {"structural_tag": " "}},
            "structured_outputs.structural_tag cannot be an empty string",
        ),
        ({"repetition_detection": {"max_pattern_size": 3, "min_count": 1}}, "min_count must be >= 2 to detect"),
        ({"repetition_detection": {"min_pattern_size": 3}}, "max_pattern_size, min_pattern_size must be >=0"),
        ({"thinking_token_budget": 1.5}, "`thinking_token_budget` must be a non-negative integer or -1"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers, got [1] of type list."),
        ({"logit_bias": {1: float("nan")}}, "logit_bias[1] must be a finite number, got nan."),
        ({"logit_bias": {"a": 1.0}}, "logit_bias must contain only integers, got 'a' of type str."),
        ({"allowed_token_ids": []}, "allowed_token_ids must not be empty"),
        ({"bad_words": [""]}, "bad_words cannot contain an empty string."),
        ({"thinking_token_budget": -2}, "`thinking_token_budget` must be a non-negative integer or -1"),
        ({"extra_args": [1]}, "extra_args must be dict | None"),
    ],
)
def test_bad_values_are_refused_by_name(arguments: dict[str, Any], text: str):
    with pytest.raises(ValidationError) as refusal:
        SamplingParams(**arguments)
    assert text in str(refusal.value)
    assert isinstance(refusal.value, ValueError) and isinstance(refusal.value, JaxLLMError)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ({"top_k": -1}, "top_k", 0),
        ({"seed": -1}, "seed", None),
        ({"seed": np.int64(7)}, "seed", 7),
        ({"temperature": np.float64(0.5)}, "temperature", 0.5),
        ({"temperature": 1}, "temperature", 1.0),
        ({"stop": "END"}, "stop", ["END"]),
        ({"stop": ("a", "b")}, "stop", ["a", "b"]),
        ({"stop_token_ids": np.array([3, 1, 3])}, "stop_token_ids", [3, 1]),
        ({"max_tokens": None, "min_tokens": 10**6}, "max_tokens", None),
        ({"logprobs": True}, "logprobs", 1),
        ({"logprobs": False}, "logprobs", None),
        ({"ignore_eos": np.bool_(True)}, "ignore_eos", True),
        ({"thinking_token_budget": -1}, "thinking_token_budget", None),
        ({"thinking_token_budget": np.int64(3)}, "thinking_token_budget", 3),
        (
            {"structured_outputs": {"choice": ("a", "b")}},
            "structured_outputs",
            StructuredOutputsParams(choice=["a", "b"]),
        ),
        ({"structured_outputs": {"json": nested(64)}}, "structured_outputs", StructuredOutputsParams(json=nested(64))),
        ({"repetition_detection": {}}, "repetition_detection", RepetitionDetectionParams()),
        ({"logit_bias": {"5": 200, 6: float("-inf")}}, "logit_bias", {5: 100.0, 6: -100.0}),
    ],
)
def test_values_are_normalised(arguments: dict[str, Any], field: str, value: Any):
    got = getattr(SamplingParams(**arguments), field)
    assert got == value
    assert type(got) is type(value)


def test_greedy_turns_truncation_off():
    params = SamplingParams(temperature=1e-6, top_p=0.5, top_k=3, min_p=0.2)
    assert params.is_greedy
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 1.0, 0, 0.0)
    assert not SamplingParams().is_greedy


def test_a_tiny_temperature_is_raised_with_a_warning(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        params = SamplingParams(temperature=0.005)
        assert "0.005" in caplog.text
        caplog.clear()
        assert params.clone().temperature == 0.01
    assert not caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "best_of",
        "use_beam_search",
        "early_stopping",
        "length_penalty",
        "logits_processors",
        "truncate_prompt_tokens",
        "guided_decoding",
    ],
)
def test_removed_arguments_say_what_replaced_them(name: str):
    with pytest.raises(TypeError, match=rf"no argument '{name}' any more: \w+"):
        build({name: 2})
    # other libraries hand on what asks for nothing
    assert build({name: None, "max_tokens": 3}) == SamplingParams(max_tokens=3)


def test_what_asks_for_nothing_more_is_taken():
    assert build({"use_beam_search": False, "early_stopping": False, "length_penalty": 1.0}) == SamplingParams()
    given = SamplingParams(temperature=0.5, stop="a")
    assert tuple(inspect.signature(SamplingParams).parameters) == given.__struct_fields__
    assert "__struct_fields__" not in given.__struct_fields__
    assert SamplingParams(**{name: getattr(given, name) for name in given.__struct_fields__}) == given


def test_a_servers_arguments_say_what_they_are_called_here():
    with pytest.raises(TypeError, match=r"no argument 'guided_json': use .*StructuredOutputsParams\(json=\.\.\.\)"):
        build({"guided_json": {}})


def test_unknown_arguments_are_refused_with_the_nearest_name():
    with pytest.raises(TypeError, match="no argument 'max_token'; did you mean 'max_tokens'"):
        build({"max_token": 3})
    with pytest.raises(TypeError, match="no argument 'zzz'"):
        build({"zzz": 3})


def test_a_clone_shares_nothing_and_is_checked_again():
    params = SamplingParams(
        stop=["a"], stop_token_ids=[1], bad_words=["b"], allowed_token_ids=[2], logit_bias={3: 1.0}, extra_args={"k": 1}
    )
    twin = params.clone()
    assert twin == params
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if isinstance(value, (list, dict)):
            assert getattr(twin, field.name) is not value, field.name
    params.temperature = float("nan")
    with pytest.raises(ValidationError, match="temperature must be a finite number"):
        params.clone()


def test_copies_and_pickles_are_equal():
    params = SamplingParams(temperature=0.3, stop="x", output_kind=RequestOutputKind.DELTA)
    assert copy.deepcopy(params) == params
    assert pickle.loads(pickle.dumps(params)) == params


# Hypothesis builds its table of characters at the first draw, which takes long on a slow machine.
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(-1, 3),
            "temperature": st.floats() | st.integers(-1, 3),
            "top_p": st.floats(-0.5, 1.5) | st.just(float("nan")),
            "top_k": st.integers(-3, 10),
            "min_p": st.floats(-0.5, 1.5),
            "presence_penalty": st.floats(-3, 3),
            "repetition_penalty": st.floats(),
            "seed": st.none() | st.integers(),
            "stop": st.none() | st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=2),
            "max_tokens": st.none() | st.integers(-1, 20),
            "min_tokens": st.integers(-1, 20),
            "logit_bias": st.none() | st.dictionaries(st.integers(-1, 5), st.floats(), max_size=2),
        },
    )
)
def test_what_is_accepted_lies_within_the_limits(arguments: dict[str, Any]):
    try:
        params = SamplingParams(**arguments)
    except ValidationError:
        return
    assert params.n >= 1 and not (params.is_greedy and params.n > 1)
    assert params.temperature == 0.0 or 0.01 <= params.temperature <= 2.0
    assert 0.0 < params.top_p <= 1.0 and 0.0 <= params.min_p <= 1.0 and params.top_k >= 0
    assert -2.0 <= params.presence_penalty <= 2.0 and 0.0 < params.repetition_penalty < float("inf")
    assert params.seed != -1
    assert isinstance(params.stop, list) and all(params.stop)
    assert params.min_tokens >= 0 and (params.max_tokens is None or 1 <= params.max_tokens >= params.min_tokens)
    assert all(i >= 0 and -100.0 <= v <= 100.0 for i, v in (params.logit_bias or {}).items())
    assert params.clone() == params


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logprob_token_ids"])
def test_token_ids_are_checked_against_the_vocabulary(field: str):
    build({field: [99]}).check_against(vocab_size=100, max_logprobs=20)
    with pytest.raises(ValidationError, match=rf"{field} contains out-of-vocabulary token ids \[100\].* 100 tokens"):
        build({field: [100]}).check_against(vocab_size=100, max_logprobs=20)
    with pytest.raises(ValidationError, match="logit_bias contains out-of-vocabulary"):
        SamplingParams(logit_bias={100: 1.0}).check_against(vocab_size=100, max_logprobs=20)


def test_logprobs_are_checked_against_the_engines_limit():
    SamplingParams(logprobs=20).check_against(vocab_size=100, max_logprobs=20)
    SamplingParams(logprobs=-1).check_against(vocab_size=100, max_logprobs=-1)
    for count, shown in ((21, 21), (-1, 100)):
        with pytest.raises(ValidationError, match=f"logprobs of {shown}, which is greater than max allowed: 20"):
            SamplingParams(logprobs=count).check_against(vocab_size=100, max_logprobs=20)


def test_structured_outputs_take_exactly_one_kind():
    with pytest.raises(ValidationError, match="You must use one kind"):
        StructuredOutputsParams()
    with pytest.raises(ValidationError, match="multiple are specified: regex, choice"):
        StructuredOutputsParams(regex="a", choice=["b"])


@pytest.mark.parametrize("sizes", [(0, 1, 2), (3, 4, 2), (3, 1, 1), (-1, 0, 2), (2, -1, 2)])
def test_repetition_detection_limits(sizes: tuple[int, int, int]):
    most, least, count = sizes
    with pytest.raises(ValidationError):
        RepetitionDetectionParams(max_pattern_size=most, min_pattern_size=least, min_count=count)


def test_outputs_print_short():
    completion = CompletionOutput(index=0, text="word " * 1000, token_ids=list(range(5000)), finish_reason="length")
    output = RequestOutput(
        request_id="0", prompt="p" * 10_000, prompt_token_ids=[1] * 10_000, outputs=[completion], finished=True
    )
    assert len(repr(output)) < 500
    assert "(10000 tokens)" in repr(output) and "finish_reason='length'" in repr(output)
    assert completion.finished()
    assert output.metrics == RequestMetrics()


def test_a_field_that_does_not_exist_cannot_be_set():
    params = SamplingParams()
    with pytest.raises(AttributeError, match="temprature"):
        params.temprature = 0.5  # pyright: ignore[reportAttributeAccessIssue]
