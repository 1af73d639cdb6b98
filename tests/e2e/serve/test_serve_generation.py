"""The endpoints that generate, asked by OpenAI's own client: against what the library gives."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from support.serving import MESSAGES, SCHEMA, get

from jaxllm import AsyncLLM, SamplingParams


def test_served_and_offline_runs_give_the_same_tokens(engine: AsyncLLM, client: openai.OpenAI):
    sampled: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 8, "n": 2}
    (chat,) = engine.llm.chat(MESSAGES, SamplingParams(**sampled, logprobs=2), use_tqdm=False)
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, **sampled, extra_body={"return_token_ids": True}
    )
    assert [choice.message.content for choice in answer.choices] == [one.text for one in chat.outputs]
    assert [choice.token_ids for choice in answer.choices] == [one.token_ids for one in chat.outputs]  # pyright: ignore[reportAttributeAccessIssue]
    assert answer.choices[0].logprobs is not None and answer.usage is not None
    assert len(answer.choices[0].logprobs.content or ()) == 8
    assert answer.usage.prompt_tokens == len(chat.prompt_token_ids) and answer.usage.completion_tokens == 16

    prompts = ["One", "Two, and more"]
    outputs = engine.llm.generate(prompts, SamplingParams(**sampled, top_k=5), use_tqdm=False)
    texts = [one.text for output in outputs for one in output.outputs]
    found = client.completions.create(model="alias", prompt=prompts, **sampled, extra_body={"top_k": 5})
    assert found.model == "alias" and [choice.text for choice in found.choices] == texts


def test_streams_add_up_to_the_whole(client: openai.OpenAI):
    sampled: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 8, "n": 2}
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, **sampled)
    texts, reasons, tokens, usages = ["", ""], ["", ""], [0, 0], []
    for piece in client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, **sampled, **options):
        assert piece.object == "chat.completion.chunk"
        if piece.usage is not None:
            usages.append(piece.usage)
        for choice in piece.choices:
            assert not usages, "the usage comes last"
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += len((choice.logprobs.content or ()) if choice.logprobs else ())
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == ["length"] * 2 and tokens == [8, 8]
    assert [usage.model_dump() for usage in usages] == [whole.usage.model_dump() if whole.usage else None]

    asked: dict[str, Any] = {"model": "tiny", "prompt": ["One", "Two"], "echo": True, "logprobs": 1, **sampled}
    complete = client.completions.create(**asked)
    texts, offsets = [""] * 4, [[], [], [], []]
    for piece in client.completions.create(**asked, **options):
        for choice in piece.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += (choice.logprobs.text_offset or []) if choice.logprobs else []
    assert texts == [choice.text for choice in complete.choices] and texts[0].startswith("One")
    assert offsets == [choice.logprobs.text_offset if choice.logprobs else None for choice in complete.choices]


def test_the_answers_id_is_the_requests(url: str):
    body = {"prompt": "x", "max_tokens": 1, "request_id": "body"}
    assert get(url, "/v1/completions", body)[2]["id"] == "cmpl-body"
    assert get(url, "/v1/completions", body, {"X-Request-Id": "mine"})[2]["id"] == "cmpl-mine"
    status, _, told = get(url, "/v1/completions", body, {"X-Request-Id": "x" * 257})
    assert status == 400 and "X-Request-Id" in told["error"]["message"]


def test_structured_outputs(client: openai.OpenAI):
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 60, "temperature": 0}
    answer = client.chat.completions.create(**asked, response_format=form)
    assert json.loads(answer.choices[0].message.content or "")["city"] in ("Paris", "Rome")
    body = {"structured_outputs": {"choice": ["yes", "no"]}}
    answer = client.chat.completions.create(**asked, extra_body=body)
    assert answer.choices[0].message.content in ("yes", "no")


def test_responses(client: openai.OpenAI, engine: AsyncLLM):
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}
    talk: Any = [{"role": "user", "content": [{"type": "input_text", "text": "What?"}]}]
    (offline,) = engine.llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    for question in ("What?", talk):
        answer = client.responses.create(**asked, input=question)
        assert answer.output_text == offline.outputs[0].text and answer.usage is not None
        assert (answer.status, answer.usage.output_tokens) == ("incomplete", 12)
    events: list[Any] = list(client.responses.create(**asked, input=talk, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.usage == answer.usage
    assert "".join(deltas) == last.response.output_text == offline.outputs[0].text

    tool: Any = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
    called: dict[str, Any] = {**asked, "max_output_tokens": 120, "tools": [tool], "tool_choice": "required"}
    called |= {"parallel_tool_calls": False, "input": "What?"}
    whole: Any = client.responses.create(**called).output[0]
    with client.responses.stream(**called) as stream:
        call: Any = stream.get_final_response().output[0]
    assert whole.type == call.type == "function_call" and whole.arguments == call.arguments
    assert call.name == "weather" and json.loads(call.arguments)["city"] in ("Paris", "Rome")
    history: Any = [
        *talk,
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    assert client.responses.create(**asked, input=history).output_text
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}}
    text = client.responses.create(**{**asked, "max_output_tokens": 60}, input="What?", text=form).output_text
    assert json.loads(text)["city"] in ("Paris", "Rome")
    with pytest.raises(openai.BadRequestError, match="previous_response_id='x' is refused"):
        client.responses.create(**asked, input="x", previous_response_id="x")
