"""OpenAI's request bodies as prompts and SamplingParams. The bodies are checked by the openai package's own types."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jaxllm.api.constraints import RepetitionDetectionParams, StructuredOutputsParams
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.entrypoints.openai.bodies import ResponsesBody
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.openai.items import chat_body
from jaxllm.entrypoints.openai.parameters import SAMPLING, SamplingReader
from jaxllm.entrypoints.openai.requests import CHAT, COMPLETIONS, EMBEDDINGS, Call, Translator
from jaxllm.entrypoints.openai.responses import head

MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
CALL_WITHOUT_JSON = {"type": "function", "function": {"name": "f", "arguments": "{"}}


def call(url: str, body: Any, defaults: SamplingParams | None = None) -> Call:
    before = json.dumps(body)
    sampling = SamplingReader(defaults or SamplingParams())
    translated = Translator(model_names=["m", "alias"], sampling=sampling).translate(url, body)
    assert json.dumps(body) == before, "the caller's body is not changed"
    return translated


def chat(**body: Any) -> SamplingParams:
    params = call(CHAT, {"messages": MESSAGES, **body}).params
    assert params is not None
    return params


def complete(**body: Any) -> SamplingParams:
    params = call(COMPLETIONS, {"prompt": "x", **body}).params
    assert params is not None
    return params


def test_defaults_are_openais():
    assert chat() == SamplingParams(max_tokens=None)
    assert complete() == SamplingParams(max_tokens=16)


#: parameter -> a value that is none of the defaults
VALUES: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "seed": 3,
    "n": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.5,
    "stop": ["a", "b"],
    "stop_token_ids": [1],
    "ignore_eos": True,
    "min_tokens": 1,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "allowed_token_ids": [4],
    "bad_words": ["w"],
    "prompt_logprobs": 1,
    "thinking_token_budget": 5,
    "logit_bias": {"5": 2.0},
}


@pytest.mark.parametrize("name", sorted(SAMPLING))
def test_every_sampling_parameter_is_passed_on(name: str):
    value = VALUES[name]
    expected: Any = {5: 2.0} if name == "logit_bias" else value
    assert chat(**{name: value}) == SamplingParams(max_tokens=None, **{name: expected})
    assert complete(**{name: value}) == SamplingParams(**{name: expected})
    # JSON's null is the same as nothing
    assert chat(**{name: None}) == SamplingParams(max_tokens=None)


def test_lengths():
    assert chat(max_tokens=5).max_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=7).max_tokens == 7
    assert complete(max_tokens=5).max_tokens == 5


def test_the_models_defaults_hold_where_the_body_says_nothing():
    own = SamplingParams(temperature=0.6, top_k=20, top_p=0.8)
    params = call(CHAT, {"messages": MESSAGES, "top_k": 3}, own).params
    assert params == SamplingParams(temperature=0.6, top_k=3, top_p=0.8, max_tokens=None)
    # vLLM: max_new_tokens of the generation config limits every request
    limited = SamplingParams(max_tokens=100)
    for body, length in (({}, 100), ({"max_tokens": 500}, 100), ({"max_tokens": 5}, 5)):
        params = call(CHAT, {"messages": MESSAGES, **body}, limited).params
        assert params is not None and params.max_tokens == length


def test_logprobs():
    assert chat(logprobs=True).logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).logprobs == 4
    assert chat(logprobs=False).logprobs is None
    assert complete(logprobs=3).logprobs == 3
    echoed = call(COMPLETIONS, {"prompt": "x", "echo": True, "logprobs": 1, "max_tokens": 0})
    assert echoed.echo and echoed.echo_only and echoed.params is not None
    assert (echoed.params.prompt_logprobs, echoed.params.max_tokens) == (1, 1)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
    ],
)
def test_structured_outputs(body: dict[str, Any], expected: dict[str, Any] | None):
    wanted = None if expected is None else StructuredOutputsParams(**expected)
    assert chat(**body).structured_outputs == wanted
    assert complete(**body).structured_outputs == wanted


def test_repetition_detection():
    params = chat(repetition_detection={"max_pattern_size": 4, "min_count": 3})
    assert params.repetition_detection == RepetitionDetectionParams(max_pattern_size=4, min_count=3)


def test_conversations_go_to_the_renderer_as_they_are():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    body = {"messages": MESSAGES, "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    body |= {"documents": [{"text": "d"}], "cache_salt": "s", "reasoning_effort": "low"}
    assert call(CHAT, body).prompts == [
        {
            "messages": MESSAGES,
            "tools": tools,
            "cache_salt": "s",
            "chat_template_kwargs": {
                "enable_thinking": False,
                "documents": [{"text": "d"}],
                "reasoning_effort": "low",
            },
        }
    ]
    (prompt,) = call(CHAT, {"messages": MESSAGES, "continue_final_message": True}).prompts
    assert prompt["continue_final_message"] and not prompt["add_generation_prompt"]


@pytest.mark.parametrize("url", [COMPLETIONS, EMBEDDINGS])
def test_prompts_of_all_forms(url: str):
    name = "prompt" if url == COMPLETIONS else "input"
    for value, prompts in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [{"prompt_token_ids": [1, 2]}]),
        ([[1], [2, 3]], [{"prompt_token_ids": [1]}, {"prompt_token_ids": [2, 3]}]),
    ):
        assert call(url, {name: value}).prompts == prompts
    with pytest.raises(APIError, match=f"'{name}' is required"):
        call(url, {})
    for value in (None, 5, [], [[]], ["a", 1], [["a"]], [True], {"a": 1}):
        with pytest.raises(APIError, match=f"{name} must be text"):
            call(url, {name: value})


def test_models():
    assert call(CHAT, {"messages": MESSAGES}).model == "m"
    assert call(CHAT, {"messages": MESSAGES, "model": "alias"}).model == "alias"
    with pytest.raises(APIError, match="The model `gpt` does not exist") as refusal:
        call(CHAT, {"messages": MESSAGES, "model": "gpt"})
    assert refusal.value.status == 404
    assert refusal.value.body()["error"]["type"] == "NotFoundError"


def test_labels_change_nothing():
    assert chat(user="u", metadata={"a": "b"}, safety_identifier="s", stream=False) == chat()


@pytest.mark.parametrize(
    ("url", "body", "message"),
    [
        (CHAT, {"tempreature": 1}, "'tempreature' does not exist. Did you mean 'temperature'"),
        (CHAT, {"stream": True}, "stream=True is refused: a batch is not streamed"),
        (CHAT, {"temperature": 3}, r"temperature must be in \[0, 2\]"),
        (CHAT, {"temperature": "hot"}, "temperature should be a valid number; got 'hot'"),
        (CHAT, {"n": 0}, "n must be at least 1"),
        (CHAT, {"max_tokens": "5"}, "max_tokens should be a valid integer; got '5'"),
        (CHAT, {"top_logprobs": 2}, "`logprobs` must be set to true"),
        (CHAT, {"logprobs": 5}, "logprobs should be a valid boolean; got 5"),
        (CHAT, {"stop": 5}, "stop should be a valid string or a valid list; got 5"),
        (CHAT, {"tool_choice": "required"}, "`tools` must be set"),
        (CHAT, {"tool_choice": "auto", "tools": TOOLS}, "--tool-call-parser NAME"),
        (CHAT, {"tool_choice": {"function": {"name": "g"}}, "tools": TOOLS}, "with one of f"),
        (CHAT, {"tool_choice": {"type": "function", "function": "f"}, "tools": TOOLS}, "with one of f"),
        (CHAT, {"tool_choice": {"type": "function", "function": {"name": ["f"]}}, "tools": TOOLS}, "with one of f"),
        (CHAT, {"request_id": "x" * 257}, "request_id"),
        (CHAT, {"tool_choice": "required", "tools": [{"type": "code"}]}, "a tool is"),
        (CHAT, {"tool_choice": "required", "tools": TOOLS, "response_format": {"type": "json_object"}}, "leave out"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [CALL_WITHOUT_JSON]}]}, "are not JSON"),
        (CHAT, {"stream_options": {"include_usage": True}}, "when `stream=True`"),
        (CHAT, {"functions": [{}]}, "functions="),
        (CHAT, {"modalities": ["audio"]}, "modalities="),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format has type 'xml'"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "needs json_schema"),
        (CHAT, {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "not both"),
        (CHAT, {"structured_outputs": {"regxe": "a"}}, "regxe"),
        (CHAT, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "multiple are specified"),
        (CHAT, {"chat_template_kwargs": {"tools": []}}, "cannot set 'tools'"),
        (CHAT, {"chat_template_kwargs": "x"}, "chat_template_kwargs should be a valid dictionary"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "Cannot set both"),
        (CHAT, {"messages": "hi"}, "messages should be a valid list; got 'hi'"),
        (CHAT, {"prompt": "x"}, "'prompt' does not exist"),
        (CHAT, {"priority": "high"}, "priority should be a valid integer"),
        (COMPLETIONS, {"suffix": "x"}, "suffix='x' is refused"),
        (COMPLETIONS, {"best_of": 3}, "best_of=3 is refused"),
        (COMPLETIONS, {"echo": True, "prompt": [1]}, "echo needs prompts of text"),
        (EMBEDDINGS, {"dimensions": 0}, "Dimensions must be greater than 0"),
        (EMBEDDINGS, {"encoding_format": "hex"}, "encoding_format should be 'float' or 'base64'"),
        ("/v1/images", {}, "Supported endpoints: /v1/chat/completions"),
    ],
)
def test_refusals(url: str, body: dict[str, Any], message: str):
    least: dict[str, Any] = {CHAT: {"messages": MESSAGES}, COMPLETIONS: {"prompt": "x"}, EMBEDDINGS: {"input": "x"}}
    with pytest.raises(APIError, match=message) as refusal:
        call(url, {**least.get(url, {}), **body})
    assert refusal.value.status == 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation=True"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage=True is refused"),
        ({"stream_options": {}}, "when `stream=True`"),
        ({"text": {"verbosity": "low"}}, "text.verbosity='low' is refused"),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, "reasoning.summary='auto' is refused"),
        ({"prompt_logprobs": 1}, "prompt_logprobs=1 is refused"),
    ],
)
def test_refusals_of_responses(body: dict[str, Any], message: str):
    with pytest.raises(APIError, match=message):
        ResponsesBody.read({"input": "x", **body})


def test_what_asks_for_nothing_in_responses():
    body = ResponsesBody.read(
        {
            **{"input": "x", "stream": True, "stream_options": {"include_obfuscation": False}},
            **{
                "text": {"format": {"type": "text"}, "verbosity": None},
                "reasoning": {"effort": "low", "summary": None},
            },
        }
    )
    assert chat_body(body).reasoning_effort == "low"


def test_the_answers_id_is_the_requests():
    assert head(call(CHAT, {"messages": MESSAGES, "request_id": "mine"}))["id"] == "chatcmpl-mine"
    assert head(call(COMPLETIONS, {"prompt": "x", "request_id": "mine"}))["id"] == "cmpl-mine"


def test_what_is_nested_too_deeply():
    deep: Any = 1
    for _ in range(126):
        deep = {"a": deep}
    assert call(CHAT, {"messages": MESSAGES, "metadata": deep}).params
    for name in ("metadata", "chat_template_kwargs", "tools"):
        with pytest.raises(APIError, match="at most 128 levels"):
            call(CHAT, {"messages": MESSAGES, name: {"a": {"a": deep}}})


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_bodies_that_are_none(body: Any):
    with pytest.raises(APIError, match="The body must be an object"):
        call(CHAT, body)


def test_openais_own_parameters_are_all_known():
    """Whatever OpenAI's client can send is either honoured or refused by name, never called unknown."""
    types = pytest.importorskip("openai.types.chat.completion_create_params")
    completions = pytest.importorskip("openai.types.completion_create_params")
    for url, names in (
        (
            CHAT,
            types.CompletionCreateParamsNonStreaming.__annotations__ | types.CompletionCreateParamsBase.__annotations__,
        ),
        (COMPLETIONS, completions.CompletionCreateParamsBase.__annotations__),
    ):
        for name in names:
            least = {"messages": MESSAGES} if url == CHAT else {"prompt": "x"}
            try:
                call(url, least | ({} if name in ("messages", "prompt", "model") else {name: object.__name__}))
            except APIError as error:
                assert "does not exist" not in error.message, f"{url}: {name}"
