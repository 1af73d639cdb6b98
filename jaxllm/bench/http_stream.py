"""A small HTTP/1.1 client whose answers come line by line: one connection a request, over asyncio's streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import urlsplit

from jaxllm.api.errors import JaxLLMError

#: bytes of a line; one of a stream holds a token, and perhaps its log-probabilities
_LONGEST = 2**24


async def lines(
    url: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
) -> AsyncGenerator[bytes, None]:
    """The lines of an answer, without their ends: to a POST of `body` as JSON, or to a GET.

    Raises JaxLLMError when the server cannot be reached, or answers with an error.
    """
    place = urlsplit(url)
    secure = place.scheme == "https"
    host, port = place.hostname or "", place.port or (443 if secure else 80)
    data = b"" if body is None else json.dumps(body).encode()
    head = {"Host": place.netloc, "Connection": "close", **(headers or {})}
    if body is not None:
        head |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
    path = f"{place.path or '/'}{'?' + place.query if place.query else ''}"
    method = "GET" if body is None else "POST"
    text = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in head.items()) + "\r\n"
    try:
        reader, writer = await asyncio.open_connection(host, port, ssl=secure or None, limit=_LONGEST)
    except OSError as error:
        raise JaxLLMError(f"{url} cannot be reached: {error}") from error
    try:
        writer.write(text.encode() + data)
        await writer.drain()
        status, fields = await _head(reader)
        chunked = fields.get("transfer-encoding", "").lower() == "chunked"
        rest = b""
        async with contextlib.aclosing(_pieces(reader, chunked)) as pieces:
            if status != 200:
                raise JaxLLMError(f"{url} answered with status {status}: {await _told(pieces)}")
            async for piece in pieces:
                *whole, rest = (rest + piece).split(b"\n")
                for line in whole:
                    yield line
        if rest:
            yield rest
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        raise JaxLLMError(f"{url} broke off its answer: {error}") from error
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status = (await reader.readline()).split(b" ", 2)
    if len(status) < 2 or not status[1].isdigit():
        raise ValueError("it is no HTTP")
    fields = {}
    while (line := (await reader.readline()).decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        fields[name.lower()] = value.strip()
    return int(status[1]), fields


async def _pieces(reader: asyncio.StreamReader, chunked: bool) -> AsyncGenerator[bytes, None]:
    """The body as it comes; RFC 9112, section 7.1."""
    if not chunked:
        while piece := await reader.read(2**16):
            yield piece
        return
    while size := int((await reader.readline()).partition(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readline()


async def _told(pieces: AsyncGenerator[bytes, None]) -> str:
    """The message of an error."""
    text = b"".join([piece async for piece in pieces]).decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
