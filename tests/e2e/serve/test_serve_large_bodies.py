"""Large bodies and calls of many prompts: others are answered meanwhile, and refusals have the same words."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from support.serving import MESSAGES, get, wait_until_idle

from jaxllm import AsyncLLM
from jaxllm.entrypoints.openai.bodies import Body, ChatBody
from jaxllm.entrypoints.serve import service
from jaxllm.entrypoints.serve.large_bodies import SMALL
from jaxllm.entrypoints.serve.service import AT_ONCE


def test_large_bodies_are_read_beside_the_loop(url: str, monkeypatch: pytest.MonkeyPatch):
    threads: list[str] = []
    read = Body.__dict__["read"].__func__

    def noted(cls: type[Body], body: Any) -> Body:
        threads.append(threading.current_thread().name)
        return read(cls, body)

    monkeypatch.setattr(ChatBody, "read", classmethod(noted))
    note = {"x": "y" * SMALL}
    small: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 4}
    answers = [get(url, "/v1/chat/completions", body)[2]["choices"] for body in (small, {**small, "metadata": note})]
    assert answers[0] == answers[1]
    # the server's own is called after what it runs
    assert len(threads) == 1 and "(run)" not in threads[0]


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": "hot"},
        {"tempreature": 1},
        {"temperature": 3},
        {"messages": []},
        {"messages": None},
        {"stream_options": {}},
        {"model": "gpt"},
    ],
)
def test_what_is_wrong_is_told_in_the_same_words(url: str, body: dict[str, Any]):
    asked = {"messages": MESSAGES, **body}
    status, _, told = get(url, "/v1/chat/completions", asked)
    assert status in (400, 404)
    assert get(url, "/v1/chat/completions", {**asked, "metadata": {"x": "y" * SMALL}})[::2] == (status, told)


def test_what_is_no_json(url: str):
    for path in ("/v1/chat/completions", "/tokenize", "/score"):
        for data, text in ((b"[" * (SMALL + 1), "not JSON"), (b"[" + b"1," * SMALL + b"1]", "must be an object")):
            status, _, told = get(url, path, data)
            assert status == 400 and text in told["error"]["message"], told
        data = json.dumps({"prompt": "x" * SMALL}).encode()
        status, _, told = get(url, path, data, {"Content-Type": "text/plain"})
        assert status == 400 and "Content-Type: application/json" in told["error"]["message"]


@pytest.mark.parametrize("most", [2 * AT_ONCE, 20 * AT_ONCE])
def test_many_prompts_begin_a_few_at_a_time(most: int):
    begun, ended, turns = [0], [0], []
    count = 10 * AT_ONCE

    async def stream(number: int) -> AsyncGenerator[Any, None]:
        begun[0] += 1
        try:
            yield number
            # it lasts until all have begun that may
            while begun[0] < min(most, count):
                await asyncio.sleep(0)
        finally:
            ended[0] += 1

    async def watch() -> None:
        while True:
            turns.append((begun[0], begun[0] - ended[0]))
            await asyncio.sleep(0)

    async def ask() -> list[int]:
        watching = asyncio.create_task(watch())
        found = []
        async for position, output in service._merged([stream(number) for number in range(count)], most):
            assert position == output
            found.append(output)
        watching.cancel()
        return found

    assert sorted(asyncio.run(ask())) == list(range(count)) and begun == ended == [count]
    # the first turn of a task comes after the one that made it
    assert max(after - before for (before, _), (after, _) in itertools.pairwise(turns)) <= 2 * AT_ONCE
    assert max(running for _, running in turns) <= most


def test_many_prompts_are_answered(url: str, engine: AsyncLLM):
    body = {"prompt": [str(number) for number in range(3 * AT_ONCE + 1)], "max_tokens": 1, "temperature": 0}
    choices = get(url, "/v1/completions", {**body, "return_token_ids": True})[2]["choices"]
    assert [choice["index"] for choice in choices] == list(range(3 * AT_ONCE + 1))
    ids = engine.engine.get_tokenizer().encode
    assert [choice["prompt_token_ids"] for choice in choices] == [ids(prompt) for prompt in body["prompt"]]
    # one that is refused ends all of them
    assert get(url, "/v1/completions", {**body, "prompt": [*body["prompt"], "x" * 300]})[0] == 400
    wait_until_idle(engine)
