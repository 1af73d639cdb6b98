"""Clients that go away, and a server that ends."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from support.serving import get, sent, wait_until_idle

from jaxllm import AsyncLLM


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
