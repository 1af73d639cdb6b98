"""Answers are JSON, whole or in pieces (server-sent events)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from jaxllm.entrypoints.openai.errors import APIError

DONE = b"data: [DONE]\n\n"


def encode(value: Any) -> bytes:
    """Return `value` as JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # lone surrogates, which JSON can escape and UTF-8 cannot hold
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def event(value: Any, name: str | None = None) -> bytes:
    """Return `value` as an event of a stream (WHATWG HTML, 9.2).

    Args:
        name: the kind of event; None: it has none.
    """
    kind = b"" if name is None else b"event: " + name.encode() + b"\n"
    return kind + b"data: " + encode(value) + b"\n\n"


class JSONAnswer(Response):
    """An answer in one piece."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


def error_answer(error: APIError) -> JSONAnswer:
    """Return what the client of a refused call gets."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONAnswer(error.body(), status_code=error.status, headers=headers)


class EventStream(StreamingResponse):
    """An answer in pieces. When the client goes away, what makes them is closed at once."""

    def __init__(self, events: AsyncGenerator[bytes, None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            await super().stream_response(send)
