"""What every request has to pass: the key, the size of its body, and the page that it comes from."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.serve.json_answers import error_answer

#: for probes, and the page, which asks for the key
_OPEN = ("/", "/page.js", "/health", "/ping")


class Guard:
    """Refuses requests before anything reads them.

    Args:
        api_keys: any of them opens the server; none: it is open.
        max_body: bytes.
        allowed_hosts: names, without a port, that a request's Host may have; none, or "*": any.
        allowed_origins: of web pages, besides the server's own; "*": all.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str],
        max_body: int,
        allowed_hosts: Sequence[str],
        allowed_origins: Sequence[str],
    ):
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._max_body = max_body
        self._hosts = () if "*" in allowed_hosts else tuple(name.lower() for name in allowed_hosts)
        self._origins = allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await error_answer(refusal)(scope, receive, send)
            return
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_body:
                raise HTTPException(413, self._too_large())
            return message

        # cancelled is what runs when the server has to end: uvicorn would log a traceback of each
        with contextlib.suppress(asyncio.CancelledError):
            await self._app(scope, limited, send)

    def _refusal(self, path: str, headers: Headers) -> APIError | None:
        origin, host = headers.get("origin"), headers.get("host", "")
        if host and self._hosts and _name(host) not in self._hosts:
            # a page's own name can be made to point at this machine, and its origin is then the server's (DNS
            # rebinding); browsers always send a Host
            return APIError(f"This server is not called {host!r:.80}: see --allowed-hosts.", status=403)
        if origin is not None and not self._is_allowed(origin, host):
            # a page anywhere can have a browser send requests to this machine
            return APIError(f"Pages of {origin!r:.80} may not use this server: see --allowed-origins.", status=403)
        if self._keys and path not in _OPEN and not self._is_known(headers.get("authorization", "")):
            return APIError("The API key is missing or wrong: Authorization: Bearer KEY.", status=401)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body:
            return APIError(self._too_large(), status=413)
        return None

    def _is_known(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode()
        # each is compared, in a time that says nothing of the keys
        found = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(found)

    def _is_allowed(self, origin: str, host: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        try:
            return bool(host) and urlsplit(origin).netloc == host
        except ValueError:  # it is no URL
            return False

    def _too_large(self) -> str:
        return f"The body is larger than {self._max_body} bytes; --max-body-size says what the server takes."


def _name(host: str) -> str:
    """Return a Host without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).lower()
