"""A server in a thread of this process, on loopback."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from jaxllm import AsyncLLM
from jaxllm.entrypoints.serve.app import make_app
from jaxllm.entrypoints.serve.listening import listen
from jaxllm.entrypoints.serve.settings import Settings

#: of requests
MESSAGES: Any = [{"role": "user", "content": "What?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


@contextlib.contextmanager
def served(engine: AsyncLLM, **asked: Any) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    asked.setdefault("model_names", ("tiny", "alias"))
    with listen("127.0.0.1", 0, None) as (bound, url):
        config = uvicorn.Config(make_app(engine, Settings(**asked)), log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([bound],), name="test server", daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()


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


class Closed:
    """Ends an engine at the end of a block."""

    def __init__(self, engine: AsyncLLM):
        self.engine = engine

    def close(self) -> None:
        self.engine.shutdown()
