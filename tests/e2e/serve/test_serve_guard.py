"""What the server refuses: strangers, and bodies that are wrong."""

from __future__ import annotations

import contextlib
import http.client
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving import MESSAGES, TOOLS, get, served, wait_until_idle

from jaxllm import AsyncLLM
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

#: nothing of the host is read for a request
FILE = [{"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}]


def test_refusals_are_openais(client: openai.OpenAI, url: str):
    with pytest.raises(openai.NotFoundError, match="`gpt` does not exist"):
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    for body, text in (
        ({"tempreature": 1}, "Did you mean 'temperature'"),
        ({"guided_json": {}}, r"structured_outputs=\{'json': \.\.\.\} takes its place"),
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
