"""A server in a thread of this process, on loopback."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from jaxllm import AsyncLLM
from jaxllm.entrypoints.serve.app import make_app
from jaxllm.entrypoints.serve.listening import listen
from jaxllm.entrypoints.serve.settings import Settings


@contextlib.contextmanager
def served(engine: AsyncLLM, **asked: Any) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    asked.setdefault("model_names", ("tiny", "alias"))
    with listen("127.0.0.1", 0, None) as (bound, url):
        config = uvicorn.Config(make_app(engine, Settings(**asked)), log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()
