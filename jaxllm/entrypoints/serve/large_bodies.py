"""Bodies of megabytes are read beside the event loop, which answers others meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from jaxllm.entrypoints.openai.bodies import Body
from jaxllm.entrypoints.openai.errors import APIError

Result = TypeVar("Result")

#: bytes up to which a body takes less than the way to a thread and back is worth: reading them takes a millisecond
SMALL = 2**15


async def beside(request: Request, work: Callable[..., Result], *given: Any) -> Result:
    """Return what `work` makes of a request: in a thread, where its body is large."""
    if len(await request.body()) <= SMALL:
        return work(*given)
    return await asyncio.to_thread(work, *given)


class LargeBodies(APIRoute):
    """A route whose body, one of `Body`, is parsed and checked in a thread where it is large; the answers to what is
    wrong with it are the same. JSON's parser lets nobody else run: for 16 MiB, a few tenths of a second.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        kind = None if self.body_field is None else self.body_field.field_info.annotation

        async def read(request: Request) -> Response:
            if isinstance(kind, type) and issubclass(kind, Body) and _is_json(request):
                body = await request.body()
                if len(body) > SMALL:
                    # what Starlette would have parsed, and FastAPI takes as it is
                    request._json = await asyncio.to_thread(_read, kind, body)
            return await answer(request)

        return read


def _is_json(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def _read(kind: type[Body], body: bytes) -> Body:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise APIError(f"The body is not JSON: {error}", param="body") from None
    return kind.read(value)
