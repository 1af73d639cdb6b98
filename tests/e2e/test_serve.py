"""The server, asked by OpenAI's own client over loopback: against what the library gives."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import prometheus_client.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving import served
from support.tiny_model import SMALL

import jaxllm
from jaxllm import AsyncLLM, SamplingParams
from jaxllm.entrypoints.cli import main
from jaxllm.entrypoints.openai.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    RerankBody,
    ResponsesBody,
    TokenizeBody,
)

MESSAGES: Any = [{"role": "user", "content": "What?"}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
SCHEMA["additionalProperties"] = False
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


#: nothing of the host is read for a request
FILE = [{"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}]


class Closed:
    """Ends an engine at the end of a block."""

    def __init__(self, engine: AsyncLLM):
        self.engine = engine

    def close(self) -> None:
        self.engine.shutdown()


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[AsyncLLM]:
    # a model that knows nothing likes to write spaces
    engine = AsyncLLM(tiny_model, **SMALL, structured_outputs_config={"disable_any_whitespace": True})
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def url(engine: AsyncLLM) -> Iterator[str]:
    with served(engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def get(url: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
    """Status, headers and body of a plain request; JSON is read."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {**({"Content-Type": "application/json"} if data is not None else {}), **(headers or {})}
        connection.request("GET" if data is None else "POST", path, data, sent)
        answer = connection.getresponse()
        text = answer.read()
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    return answer.status, answer.headers, json.loads(text) if is_json else text.decode()


def sent(url: str, path: str, body: bytes) -> socket.socket:
    """The connection of a request whose answer nobody has read."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    return connection


def is_idle(engine: AsyncLLM) -> bool:
    pool = engine.engine.core.cores[0].scheduler.kv_cache_manager.pool
    return not engine.engine.client.has_unfinished and pool.num_used == 0


def wait_until_idle(engine: AsyncLLM) -> None:
    end = time.monotonic() + 30
    while not is_idle(engine):
        assert time.monotonic() < end, "a request was left behind"
        time.sleep(0.01)


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


def test_structured_outputs(client: openai.OpenAI):
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 60, "temperature": 0}
    answer = client.chat.completions.create(**asked, response_format=form)
    assert json.loads(answer.choices[0].message.content or "")["city"] in ("Paris", "Rome")
    body = {"structured_outputs": {"choice": ["yes", "no"]}}
    answer = client.chat.completions.create(**asked, extra_body=body)
    assert answer.choices[0].message.content in ("yes", "no")


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
        message: Any = (
            client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=body).choices[0].message
        )
        assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")


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


def test_tokens_there_and_back(url: str, engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch):
    tokenizer = engine.engine.get_tokenizer()
    ids = tokenizer.encode("Hé", add_special_tokens=False)
    told = get(url, "/tokenize", {"prompt": "Hé", "return_token_strs": True})[2]
    expected = {"count": 3, "max_model_len": 256, "tokens": ids}
    assert told == {**expected, "token_strs": tokenizer.convert_ids_to_tokens(ids)}
    (output,) = engine.llm.chat(MESSAGES, SamplingParams(max_tokens=1), use_tqdm=False)
    assert get(url, "/tokenize", {"messages": MESSAGES})[2]["tokens"] == output.prompt_token_ids
    with monkeypatch.context() as patch:  # the ids are looked at beside what the server does meanwhile
        size, asking = len(tokenizer), []
        patch.setattr(type(tokenizer), "__len__", lambda _: asking.append(threading.current_thread().name) or size)
        assert get(url, "/detokenize", {"tokens": ids})[2] == {"prompt": "Hé"}
        assert [name.split("_")[0] for name in asking] == ["tokenizer"]
    for path, body, text in (
        ("/tokenize", {}, "prompt or messages"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "/etc/passwd"}, "--trust-request-chat-template"),
        ("/detokenize", {"tokens": [5000]}, "Token id 5000 is out of vocabulary"),
        ("/v1/embeddings", {"input": "x"}, "only supported for pooling models"),
        ("/score", {"text_1": "x", "text_2": "y"}, "only supported for pooling models"),
    ):
        status, _, told = get(url, path, body)
        assert status == 400 and text in told["error"]["message"], path


def test_the_engine_is_steered(engine: AsyncLLM, url: str, client: openai.OpenAI):
    for path in ("/sleep?level=1", "/wake_up", "/reset_prefix_cache"):
        status, _, told = get(url, path, b"")
        assert status == 403 and "--enable-admin-endpoints" in told["error"]["message"], path
    assert get(url, "/is_sleeping")[2] == {"is_sleeping": False}
    with served(engine, admin_endpoints=True) as admin:
        assert get(admin, "/sleep?level=7", b"")[0] == 400 and get(admin, "/sleep?level=x", b"")[0] == 400
        assert get(admin, "/sleep?level=1", b"")[0] == 200
        assert get(url, "/is_sleeping")[2] == {"is_sleeping": True}
        with pytest.raises(openai.InternalServerError) as refusal:
            client.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert refusal.value.status_code == 503 and refusal.value.response.headers["retry-after"] == "1"
        assert get(admin, "/wake_up", b"")[0] == 200 and get(url, "/is_sleeping")[2] == {"is_sleeping": False}
        assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices
        assert get(admin, "/reset_prefix_cache", b"")[0] == 200
    status, _, told = get(url, "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/etc"})
    assert status == 501 and "not there yet" in told["error"]["message"]


def test_pooling(tiny_model: Path):
    """The same engine, made to pool: against what the library gives."""
    texts = ["One", "Two, and more", "three"]
    with contextlib.closing(Closed(AsyncLLM(tiny_model, **SMALL, runner="pooling", convert="embed"))) as pooling:
        vectors = [o.outputs.embedding for o in pooling.engine.llm.embed(texts, use_tqdm=False)]
        scores = [o.outputs.score for o in pooling.engine.llm.score(texts[0], texts[1:], use_tqdm=False)]
        with served(pooling.engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            # the client asks for base64 where nothing is said
            forms: list[dict[str, Any]] = [{}, {"encoding_format": "float"}]
            for form in forms:
                answer = client.embeddings.create(model="tiny", input=texts, **form)
                for one, vector in zip(answer.data, vectors, strict=True):
                    assert one.embedding == pytest.approx(vector, rel=1e-5, abs=1e-6)
                assert answer.usage.prompt_tokens == sum(map(len, texts))
            told = get(url, "/pooling", {"input": texts, "task": "embed"})[2]["data"]
            assert [len(one["data"]) for one in told] == [len(vectors[0])] * 3
            told = get(url, "/score", {"text_1": texts[0], "text_2": texts[1:]})[2]["data"]
            assert [one["score"] for one in told] == pytest.approx(scores, rel=1e-5, abs=1e-6)
            body = {"query": texts[0], "documents": texts[1:], "top_n": 1}
            (best,) = get(url, "/v1/rerank", body)[2]["results"]
            assert best["relevance_score"] == pytest.approx(max(scores), rel=1e-5)
            assert best["document"]["text"] == texts[1 + best["index"]]
            for path in ("/score", "/rerank"):
                asked = {"text_1": "x", "text_2": "y"} if path == "/score" else {"query": "x", "documents": ["y"]}
                status, _, told = get(url, path, {**asked, "priority": 1})
                assert status == 400 and "priority scheduling is not enabled" in told["error"]["message"]
            # whoever leaves has a place until the work is done
            body = json.dumps({"text_1": "x", "text_2": ["y" * 200] * 300}).encode()
            with sent(url, "/score", body):
                while not pooling.engine.engine.client.has_unfinished:
                    time.sleep(0.001)
                assert get(url, "/load")[2] == {"server_load": 1}
            while get(url, "/load")[2] != {"server_load": 0}:
                time.sleep(0.001)
            assert not pooling.engine.engine.client.has_unfinished
            with pytest.raises(openai.BadRequestError, match="matryoshka"):
                client.embeddings.create(model="tiny", input="x", dimensions=4)
            with pytest.raises(openai.BadRequestError, match="generative models"):
                client.completions.create(model="tiny", prompt="x")


def test_refusals_are_openais(client: openai.OpenAI, url: str):
    with pytest.raises(openai.NotFoundError, match="`gpt` does not exist"):
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    for body, text in (
        ({"tempreature": 1}, "Did you mean 'temperature'"),
        ({"temperature": "hot"}, "temperature should be a valid number"),
        ({"temperature": 3}, r"temperature must be in \[0, 2\]"),
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "user", "content": FILE}]}, "reads text only"),
        ({"chat_template": "/etc/passwd"}, "--trust-request-chat-template"),
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=text) as refusal:
                client.chat.completions.create(model="tiny", messages=MESSAGES, stream=stream, extra_body=body)
            assert refusal.value.type == "BadRequestError"
    for path, body, status in (
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", None, 405),
        ("/v1/nothing", None, 404),
        ("/v1/models/gpt", None, 404),
        ("/v1/completions", {"prompt": "\ud800"}, 400),
        ("/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400),
    ):
        found, _, told = get(url, path, body)
        assert (found, set(told["error"])) == (status, {"message", "type", "param", "code"}), path


def test_what_the_server_tells_of_itself(client: openai.OpenAI, url: str, engine: AsyncLLM):
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").max_model_len == 256  # pyright: ignore[reportAttributeAccessIssue]
    assert get(url, "/health")[::2] == (200, "") and get(url, "/ping")[0] == 200
    assert get(url, "/version")[2] == {"version": jaxllm.__version__}
    assert get(url, "/load")[2] == {"server_load": 0}
    status, headers, text = get(url, "/metrics")
    families = {family.name for family in prometheus_client.parser.text_string_to_metric_families(text)}
    assert status == 200 and {"vllm:num_requests_running", "vllm:generation_tokens"} <= families
    assert headers["content-type"].startswith("text/plain; version=")
    paths = get(url, "/openapi.json")[2]["paths"]
    assert {"/v1/chat/completions", "/v1/completions"} <= paths.keys()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_request(url: str, engine: AsyncLLM, stream: bool):
    body = json.dumps({"prompt": ["x", "y"], "max_tokens": 200, "ignore_eos": True, "stream": stream}).encode()
    with sent(url, "/v1/completions", body) as connection:
        if stream:
            assert connection.recv(1000)
        else:
            while not engine.engine.client.has_unfinished:
                time.sleep(0.001)
    before = engine.engine.core.stats().generation_tokens
    wait_until_idle(engine)
    # it did not run to its end
    assert engine.engine.core.stats().generation_tokens - before < 300
    assert get(url, "/load")[2] == {"server_load": 0}


def test_keys_sizes_queues_and_pages(engine: AsyncLLM):
    asked: dict[str, Any] = {"api_keys": ("k1", "k2"), "max_body": 2000, "max_queue": 1}
    with served(engine, **asked, allowed_origins=("https://ours",)) as url:
        key = {"Authorization": "Bearer k2"}
        for wrong in ({}, {"Authorization": "Bearer k"}, {"Authorization": "Basic k1"}, {"Authorization": "Bearer é"}):
            sent = {name: value.encode().decode("latin-1") for name, value in wrong.items()}
            assert get(url, "/v1/models", headers=sent)[0] == 401
        assert get(url, "/v1/models", headers=key)[0] == 200 and get(url, "/health")[0] == 200
        assert get(url, "/v1/completions", {"prompt": "x" * 2000}, key)[0] == 413
        assert get(url, "/v1/models", headers={**key, "Origin": "https://theirs"})[0] == 403
        assert get(url, "/v1/models", headers={**key, "Origin": url})[0] == 200
        ours = get(url, "/v1/models", headers={**key, "Origin": "https://ours"})
        assert ours[0] == 200 and ours[1]["access-control-allow-origin"] == "https://ours"
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        with contextlib.closing(connection):  # in chunks, whose sum nobody says before
            sent = {**key, "Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", iter([b" " * 1500] * 2), sent, encode_chunked=True)
            assert connection.getresponse().status == 413
        # four run, one waits
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k1", max_retries=0) as client:
            with client.completions.create(
                model="tiny", prompt=["x"] * 5, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
            ):
                status, headers, told = get(url, "/v1/completions", {"prompt": "x"}, key)
                assert (status, headers["retry-after"], told["error"]["type"]) == (503, "1", "ServiceUnavailableError")
        wait_until_idle(engine)
        assert get(url, "/v1/completions", {"prompt": "x", "max_tokens": 1}, key)[0] == 200


def test_other_names_of_the_server(engine: AsyncLLM):
    """A page whose name was made to point here has the server's own origin; a browser sends none with a GET."""
    with served(engine, allowed_hosts=("localhost", "[::1]", "Box")) as url:
        for host, status in (
            *(("localhost:8000", 200), ("box", 200), ("[::1]:8000", 200), ("[::1]", 200)),
            *(("evil.com:8000", 403), ("localhost.evil.com", 403), ("127.0.0.1:8000", 403), ("localhost:x", 403)),
        ):
            found, _, told = get(url, "/v1/models", headers={"Host": host})
            assert found == status and (status == 200 or "--allowed-hosts" in told["error"]["message"]), host
    with served(engine, allowed_hosts=("*",)) as url:
        assert get(url, "/v1/models", headers={"Host": "evil.com"})[0] == 200
        for origin in ("http://[", "null", "http://evil.com"):
            assert get(url, "/v1/models", headers={"Origin": origin})[0] == 403, origin


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(allow_nan=False, width=16) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
#: a body that is answered, with parameters for others to take the place of
FIT: dict[str, tuple[type[Body], dict[str, Any]]] = {
    "/v1/chat/completions": (
        ChatBody,
        {
            "messages": [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}],
            **{"tools": TOOLS, "tool_choice": "auto", "response_format": {"type": "json_object"}, "max_tokens": 2},
            **{"stop": ["a"], "logit_bias": {"1": 1}, "logprobs": True, "top_logprobs": 2, "documents": [{"a": 1}]},
        },
    ),
    "/v1/completions": (CompletionBody, {"prompt": ["x"], "max_tokens": 2, "logprobs": 1, "echo": True, "n": 2}),
    "/v1/responses": (ResponsesBody, {"input": MESSAGES, "max_output_tokens": 2, "text": {"format": {"type": "text"}}}),
    "/v1/embeddings": (EmbeddingBody, {"input": "x"}),
    "/tokenize": (TokenizeBody, {"messages": MESSAGES, "tools": TOOLS}),
    "/detokenize": (DetokenizeBody, {"tokens": [1]}),
    "/v1/rerank": (RerankBody, {"query": "x", "documents": ["y"]}),
}


@pytest.mark.thorough
@pytest.mark.parametrize("path", FIT)
def test_no_body_is_the_servers_error(engine: AsyncLLM, path: str):
    """Whatever stands in place of a parameter, the answer is one, or a refusal."""
    kind, fit = FIT[path]
    changes = st.dictionaries(st.sampled_from(sorted(kind.model_fields.keys() - {"model"})), JSON, max_size=3)

    with served(engine, tool_call_parser="hermes", trust_request_chat_template=True) as url:

        @settings(max_examples=100)
        @given(changes)
        def ask(changed: dict[str, Any]) -> None:
            status, _, told = get(url, path, {**fit, **changed})
            assert status in (200, 400), told

        ask()
    wait_until_idle(engine)


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_the_benchmark_asks_a_server(
    url: str, engine: AsyncLLM, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
):
    written = tmp_path / "out.json"
    options = ["--num-prompts", "6", "--input-len", "20", "--output-len", "5", "--max-concurrency", "3"]
    options += ["--request-rate", "200", "--goodput", "ttft:60000", "tpot:0.0001", "--metric-percentiles", "50,99"]
    options += ["--model", str(tiny_model), "--backend", backend, "--output-json", str(written), "--base-url", url]
    before = engine.engine.core.stats().generation_tokens
    assert main(["bench", "serve", *options]) == 0
    # one request warms up
    assert engine.engine.core.stats().generation_tokens - before == 7 * 5
    record = json.loads(written.read_text())
    assert (record["completed"], record["failed"], record["total_output_tokens"]) == (6, 0, 30)
    assert record["total_input_tokens"] >= 120
    assert record["request_goodput"] == 0 and 0 < record["median_ttft_ms"] <= record["p99_e2el_ms"]
    printed = capsys.readouterr().out
    for line in ("Successful requests:                     6", "Request goodput (req/s):", "P50 TPOT (ms):", "P99 ITL"):
        assert line in printed
    assert "E2EL" not in printed


def test_the_benchmark_says_what_is_wrong(url: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]):
    few = ["bench", "serve", "--model", str(tiny_model), "--num-prompts", "2", "--input-len", "4"]
    for options, text in (
        (["--base-url", "http://127.0.0.1:1"], "cannot be reached"),
        (["--base-url", url, "--served-model-name", "gpt"], "status 404: The model `gpt` does not exist"),
        (["--base-url", url, "--goodput", "itl:5"], "'itl:5' is not NAME:MILLISECONDS"),
        (["--base-url", url, "--percentile-metrics", "x"], "there are ttft, tpot, itl, e2el"),
    ):
        assert main([*few, *options]) == 1
        assert text in capsys.readouterr().err


def test_the_page(url: str):
    status, headers, page = get(url, "/")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    script = get(url, "/page.js")[2]
    # what the script looks for is there, and nothing comes from elsewhere
    for name in set(re.findall(r'\$\("(\w+)"\)', script)):
        assert f'id="{name}"' in page, name
    assert "http" not in page + script
    told = get(url, "/stats")[2]
    assert set(re.findall(r"stats\.(\w+)", script)) <= told.keys() and "KV cache" in told["memory_plan"]


@pytest.mark.thorough
def test_many_clients_that_come_and_go(url: str, engine: AsyncLLM):
    """200 streams at once, two of three of which are left before their end."""
    draw = random.Random(0)

    async def ask() -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:

            async def one(number: int, after: int) -> int:
                prompt = f"{number} {'x' * (number % 40)}"
                stream = await client.completions.create(
                    model="tiny",
                    prompt=prompt,
                    max_tokens=24,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                pieces = 0
                async with stream:
                    async for _ in stream:
                        pieces += 1
                        if pieces == after:
                            break
                return pieces

            limits = [draw.choice((1, draw.randint(2, 20), 1000)) for _ in range(200)]
            found = await asyncio.gather(*(one(*item) for item in enumerate(limits)))
            assert all(pieces <= limit for pieces, limit in zip(found, limits, strict=True))
            return found

    found = asyncio.run(ask())
    assert len(found) == 200 and all(found)
    wait_until_idle(engine)
    assert get(url, "/load")[2] == {"server_load": 0}
    client = engine.engine.client
    assert not (client._receivers or client._children or client._named)


def test_the_command_drains_and_ends(tiny_model: Path, tmp_path: Path):
    """Ctrl-C while an answer is streamed, over a Unix socket that its owner alone can use."""
    path = tmp_path / "socket"
    engine = ["--load-format", "null", "--max-model-len", "500", "--max-num-seqs", "4"]
    command = [sys.executable, "-m", "jaxllm", "serve", str(tiny_model), *engine, "--uds", str(path)]
    process = subprocess.Popen([*command, "--served-model-name", "m"], stderr=subprocess.PIPE, text=True)
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)  # whatever fails
        assert process.stderr is not None
        lines = []
        while not lines or "jaxllm serve: " not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        assert lines[-1] == f"jaxllm serve: m at unix:{path}\n" and path.stat().st_mode & 0o777 == 0o600
        connection = http.client.HTTPConnection("localhost")
        connection.sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.sock.connect(str(path))
        body = json.dumps({"prompt": "x", "max_tokens": 490, "stream": True, "ignore_eos": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        process.send_signal(signal.SIGINT)
        pieces = answer.read().split(b"\n\n")
        assert pieces[-2:] == [b"data: [DONE]", b""] and json.loads(pieces[-3][6:])["choices"][0]["finish_reason"]
        rest = process.stderr.read()
        assert process.wait() == 0 and "Traceback" not in rest, rest
    assert not path.exists()
