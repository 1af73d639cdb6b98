"""Clients of others ask the server: litellm and langchain-openai as applications do, schemathesis to break it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.serving import MESSAGES, SCHEMA, TOOLS, Closed, served, wait_until_idle
from support.tiny_model import SMALL

from jaxllm import AsyncLLM, SamplingParams

NEEDED = ("litellm", "langchain_openai", "schemathesis")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{MISSING[0]} is not installed: `make test-clients` installs it", allow_module_level=True)

# what they are warned of is theirs to mend
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]


def imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


schemathesis: Any = imported("schemathesis")
MODES = list(schemathesis.GenerationMode)


@pytest.fixture(scope="package")
def pooling(tiny_model: Path) -> Iterator[AsyncLLM]:
    with contextlib.closing(Closed(AsyncLLM(tiny_model, **SMALL, runner="pooling", convert="embed"))) as closing:
        yield closing.engine


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        # it reads prices from the network otherwise
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        module = imported("litellm")
        patch.setattr(module, "telemetry", False, raising=False)
        yield module


@pytest.fixture(scope="module")
def langchain() -> Any:
    return imported("langchain_openai")


def offline(engine: AsyncLLM, count: int) -> str:
    (output,) = engine.llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=count), use_tqdm=False)
    return output.outputs[0].text


def test_litellm(litellm: Any, engine: AsyncLLM, url: str):
    # "hosted_vllm" is its name for servers of vLLM's API
    for provider in ("openai", "hosted_vllm"):
        asked: dict[str, Any] = {"model": f"{provider}/tiny", "api_base": f"{url}/v1", "api_key": "none"}
        asked |= {"messages": MESSAGES, "temperature": 0, "max_tokens": 8}
        whole = litellm.completion(**asked)
        assert whole.choices[0].message.content == offline(engine, 8) and whole.usage.completion_tokens == 8
        pieces = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == offline(engine, 8)
        assert [piece.usage.completion_tokens for piece in pieces if getattr(piece, "usage", None)] == [8]
        with pytest.raises(litellm.NotFoundError, match="does not exist"):
            litellm.completion(**{**asked, "model": f"{provider}/gpt"})
        with pytest.raises(litellm.BadRequestError, match="temperature must be in"):
            litellm.completion(**{**asked, "temperature": 3})
        if provider == "hosted_vllm":
            # it takes additionalProperties out of schemas, and this model would not come to an end
            continue
        more: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
        (call,) = litellm.completion(**{**asked, "max_tokens": 120}, **more).choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    text = litellm.text_completion(
        model="text-completion-openai/tiny", prompt="x", api_base=f"{url}/v1", api_key="none", max_tokens=3
    )
    assert text.usage.completion_tokens == 3


def test_litellms_embeddings(litellm: Any, pooling: AsyncLLM):
    vectors = [output.outputs.embedding for output in pooling.llm.embed(["One", "Two"], use_tqdm=False)]
    with served(pooling) as url:
        asked: dict[str, Any] = {"model": "openai/tiny", "api_base": f"{url}/v1", "api_key": "none"}
        found = litellm.embedding(**asked, input=["One", "Two"], encoding_format="float")
        for one, vector in zip(found.data, vectors, strict=True):
            assert one["embedding"] == pytest.approx(vector, rel=1e-5, abs=1e-6)


def test_langchain(langchain: Any, engine: AsyncLLM, url: str):
    asked: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": "tiny", "temperature": 0}
    chat = langchain.ChatOpenAI(**asked, max_tokens=8)
    answer = chat.invoke("What?")
    assert answer.content == offline(engine, 8) and answer.usage_metadata["output_tokens"] == 8
    assert "".join(piece.content for piece in chat.stream("What?")) == answer.content
    assert [one.content for one in chat.batch(["What?", "What?"])] == [answer.content] * 2
    long = langchain.ChatOpenAI(**asked, max_tokens=120)
    schema = {"title": "Answer", **SCHEMA}
    for method in ("json_schema", "function_calling"):
        assert long.with_structured_output(schema, method=method).invoke("What?")["city"] in ("Paris", "Rome")
    function = {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA}
    bound = long.bind_tools([{"type": "function", "function": function}], tool_choice="weather")
    (call,) = bound.invoke("What?").tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in ("Paris", "Rome")
    pieces = list(bound.stream("What?"))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert whole.tool_calls[0]["args"] == call["args"]
    responses = langchain.ChatOpenAI(**asked, max_tokens=8, use_responses_api=True)
    assert responses.invoke("What?").text == answer.content
    assert "".join(str(piece.text) for piece in responses.stream("What?")) == answer.content


def test_langchains_embeddings(langchain: Any, pooling: AsyncLLM):
    vectors = [output.outputs.embedding for output in pooling.llm.embed(["One", "Two"], use_tqdm=False)]
    with served(pooling) as url:
        # lengths are checked by the tokenizers of OpenAI's models
        asked: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "check_embedding_ctx_length": False}
        embeddings = langchain.OpenAIEmbeddings(**asked, model="tiny")
        for one, vector in zip(embeddings.embed_documents(["One", "Two"]), vectors, strict=True):
            assert one == pytest.approx(vector, rel=1e-5, abs=1e-6)


def ask_all(schema: Any) -> int:
    """Send whatever the document allows, and what it does not, to each endpoint; count the endpoints."""
    count = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=60,
            derandomize=True,
            suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in MODES)))
        def ask(case: Any) -> None:
            status = case.call().status_code
            # 501: it says that it is not there
            assert status < 500 or status == 501, case.as_curl_command()

        ask()
        count += 1
    return count


def test_nothing_breaks_the_server(engine: AsyncLLM):
    # it may do all that it can
    options: dict[str, Any] = {"tool_call_parser": "hermes", "trust_request_chat_template": True}
    with served(engine, **options) as url:
        assert ask_all(schemathesis.openapi.from_url(f"{url}/openapi.json")) > 20
    wait_until_idle(engine)


def test_nothing_breaks_a_server_that_pools(pooling: AsyncLLM):
    with served(pooling) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        assert ask_all(schema.include(path_regex="embeddings|pooling|score|rerank|classify")) > 5
    wait_until_idle(pooling)
