"""Calls of tools and reasoning, asked by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import openai
from support.serving import MESSAGES, TOOLS, served

from jaxllm import AsyncLLM


def test_tools_that_have_to_be_called(client: openai.OpenAI):
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 120, "temperature": 0, "tools": TOOLS}
    choices: Any = [("required", "tool_calls"), ({"type": "function", "function": {"name": "weather"}}, "stop")]
    for choice, reason in choices:
        answer = client.chat.completions.create(**asked, tool_choice=choice, parallel_tool_calls=False).choices[0]
        assert answer.finish_reason == reason and answer.message.content is None
        (call,) = answer.message.tool_calls or []
        assert call.type == "function" and call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        arguments, name = "", ""
        more: dict[str, Any] = {"tool_choice": choice, "parallel_tool_calls": False, "stream": True}
        for piece in client.chat.completions.create(**asked, **more):
            for delta in piece.choices[0].delta.tool_calls or ():
                name += (delta.function.name if delta.function else "") or ""
                arguments += (delta.function.arguments if delta.function else "") or ""
            reason = piece.choices[0].finish_reason or ""
        assert (name, arguments, reason) == ("weather", call.function.arguments, answer.finish_reason)


def test_calls_and_reasoning_that_the_model_writes(engine: AsyncLLM):
    """A grammar stands in for a model that was taught to write a call."""
    text = 'Well.<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    two = {"structured_outputs": {"choice": [text + text.removeprefix("Well.")]}}
    body = {"structured_outputs": {"choice": [text]}}
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 120, "tools": TOOLS}
    with (
        served(engine, tool_call_parser="hermes") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        choice = client.chat.completions.create(**asked, extra_body=body).choices[0]
        (call,) = choice.message.tool_calls or []
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Well.")
        assert call.type == "function" and json.loads(call.function.arguments) == {"city": "Rome"}
        with client.chat.completions.stream(**asked, extra_body=body) as stream:
            streamed = stream.get_final_completion().choices[0]
        (same,) = streamed.message.tool_calls or []
        assert (streamed.finish_reason, streamed.message.content) == ("tool_calls", "Well.")
        assert (same.function.name, same.function.arguments) == ("weather", call.function.arguments)
        for parallel, count in ((True, 2), (False, 1)):
            more: dict[str, Any] = {"parallel_tool_calls": parallel, "extra_body": two}
            found = client.chat.completions.create(**{**asked, "max_tokens": 200}, **more).choices[0].message
            assert len(found.tool_calls or ()) == count
        # the call and its answer go back, and nothing is read of tools that nobody offers
        talk: Any = [*MESSAGES, choice.message.model_dump(exclude_none=True)]
        talk.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
        assert client.chat.completions.create(model="tiny", messages=talk, max_tokens=3).choices
        plain = client.chat.completions.create(**asked, tool_choice="none", extra_body=body).choices[0].message
        assert plain.content == text and plain.tool_calls is None
    with (
        served(engine, reasoning_parser="deepseek_r1") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        body = {"structured_outputs": {"choice": ["Hm.</think>Yes."]}}
        asking: Any = {"model": "tiny", "messages": MESSAGES, "extra_body": body}
        message: Any = (
            client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=body).choices[0].message
        )
        assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")
        # a token is a byte: eleven of reasoning and its mark, four of the answer
        forms: Any = ({"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True})
        for options in forms:
            stream: Any = client.chat.completions.create(**asking, stream=True, stream_options=options)
            usages = [piece.usage for piece in stream if piece.usage is not None]
            usages.append(client.chat.completions.create(**asking).usage)
            told = [usage.completion_tokens_details.reasoning_tokens for usage in usages]
            assert told == sorted(told) and told[-2:] == [11, 11] and usages[-1].completion_tokens >= 15
        question: Any = {"model": "tiny", "input": "What?", "extra_body": body}
        events: Any = list(client.responses.create(**question, stream=True))
        for response in (client.responses.create(**question), events[-1].response):
            assert response.usage is not None
            assert response.usage.output_tokens_details.reasoning_tokens == 11
