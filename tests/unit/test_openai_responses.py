"""The bodies of OpenAI's answers, read back by the openai package's own types."""

from __future__ import annotations

import base64
import json
import math
import types
from typing import Any

import numpy as np
import pytest

from jaxllm.api.outputs import CompletionOutput, Logprob, RequestOutput
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.openai.requests import CHAT, COMPLETIONS, EMBEDDINGS, Call
from jaxllm.entrypoints.openai.responses import response_body

#: two tokens; the second was not among the likeliest two
LOGPROBS = [
    {7: Logprob(-0.5, 1, "He"), 8: Logprob(-1.5, 2, "Ha")},
    {9: Logprob(-math.inf, 5, "é"), 8: Logprob(-0.25, 1, "Ha"), 7: Logprob(-2.0, 2, "He")},
]


def output(n: int = 1, **changes: Any) -> RequestOutput:
    completions = [
        CompletionOutput(index=i, text=f"Heé{i}", token_ids=[7, 9], finish_reason="stop", logprobs=LOGPROBS)
        for i in range(n)
    ]
    given: dict[str, Any] = {"prompt": "Oh", "prompt_token_ids": [3, 4, 5], "num_cached_tokens": 2, **changes}
    return RequestOutput(request_id="0", outputs=completions, finished=True, **given)


def answer(url: str, *outputs: Any, **form: Any) -> dict[str, Any]:
    body = response_body(Call(url=url, model="m", prompts=[None] * len(outputs), **form), outputs)
    return json.loads(json.dumps(body, allow_nan=False))


def test_chat_completions():
    openai = pytest.importorskip("openai.types.chat")
    body = answer(CHAT, output(n=2), top_logprobs=2)
    read = openai.ChatCompletion.model_validate(body, strict=True)
    assert [choice.index for choice in read.choices] == [0, 1]
    choice = read.choices[1]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Heé1", "stop")
    first, second = choice.logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("He", -0.5, [72, 101])
    assert (second.token, second.logprob, second.bytes) == ("é", -9999.0, [0xC3, 0xA9])
    assert [(top.token, top.logprob) for top in second.top_logprobs] == [("Ha", -0.25), ("He", -2.0)]
    usage = read.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 4, 7)
    assert usage.prompt_tokens_details.cached_tokens == 2
    assert openai.ChatCompletion.model_validate(answer(CHAT, output()), strict=True).choices[0].logprobs is None


def test_completions_of_several_prompts():
    openai = pytest.importorskip("openai.types")
    body = answer(COMPLETIONS, output(n=2), output(n=2, prompt="Ah"), top_logprobs=1, echo=False)
    read = openai.Completion.model_validate(body, strict=True)
    assert [choice.index for choice in read.choices] == [0, 1, 2, 3]
    logprobs = read.choices[3].logprobs
    assert (logprobs.tokens, logprobs.text_offset) == (["He", "é"], [0, 2])
    assert logprobs.token_logprobs == [-0.5, -9999.0]
    assert logprobs.top_logprobs[0] == {"He": -0.5, "Ha": -1.5}
    assert (read.usage.prompt_tokens, read.usage.completion_tokens) == (6, 8)


def test_echo():
    prompt = [None, {4: Logprob(-1.0, 1, "x")}, {5: Logprob(-2.0, 1, "y")}]
    whole = answer(COMPLETIONS, output(prompt_logprobs=prompt), top_logprobs=1, echo=True)["choices"][0]
    assert whole["text"] == "OhHeé0"
    assert whole["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -0.5, -9999.0]
    assert whole["logprobs"]["top_logprobs"][0] is None
    # the first token has no log-probability that would bring its text: it is what the others leave of the prompt
    first = answer(COMPLETIONS, output(prompt="Ohxy", prompt_logprobs=prompt), top_logprobs=1, echo=True)["choices"][0]
    assert first["logprobs"]["tokens"][:3] == ["Oh", "x", "y"]
    assert first["logprobs"]["text_offset"][:4] == [0, 2, 3, 4]
    only = answer(COMPLETIONS, output(prompt_logprobs=prompt), top_logprobs=1, echo=True, echo_only=True)
    assert only["choices"][0]["text"] == "Oh"
    assert only["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert only["usage"]["completion_tokens"] == 0


def test_token_ids():
    body = answer(CHAT, output(), return_token_ids=True, tokens_as_ids=True, top_logprobs=0)
    assert (body["prompt_token_ids"], body["choices"][0]["token_ids"]) == ([3, 4, 5], [7, 9])
    assert [entry["token"] for entry in body["choices"][0]["logprobs"]["content"]] == ["token_id:7", "token_id:9"]


@pytest.mark.parametrize("as_base64", [False, True])
def test_embeddings(as_base64: bool):
    openai = pytest.importorskip("openai.types")
    vector = [0.5, -1.25, 3.0]
    one = types.SimpleNamespace(
        outputs=types.SimpleNamespace(embedding=vector), prompt_token_ids=[1, 2], error=None, finished=True
    )
    body = answer(EMBEDDINGS, one, one, base64=as_base64)
    assert [entry["index"] for entry in body["data"]] == [0, 1]
    assert (body["usage"]["prompt_tokens"], body["usage"]["total_tokens"]) == (4, 4)
    if as_base64:  # as openai's client decodes it
        decoded = np.frombuffer(base64.b64decode(body["data"][1]["embedding"]), dtype="<f4")
        assert decoded.tolist() == vector
    else:
        read = openai.CreateEmbeddingResponse.model_validate(body, strict=True)
        assert read.data[1].embedding == vector


def test_a_refused_prompt_refuses_the_call():
    with pytest.raises(APIError, match="^too long$"):
        answer(CHAT, output(error="too long"))
    with pytest.raises(APIError, match="prompt 1: too long"):
        answer(COMPLETIONS, output(), output(error="too long"))
