"""``/invocations``, the one endpoint that SageMaker calls: what a body has says which other endpoint it is for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxllm.entrypoints.openai.bodies import (
    Body,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    EmbeddingBody,
    RerankBody,
    ScoreBody,
)
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.openai.requests import CHAT, COMPLETIONS, EMBEDDINGS
from jaxllm.entrypoints.serve.large_bodies import beside
from jaxllm.entrypoints.serve.service import Service

#: a parameter that no other kind of body has -> the endpoint, and its body
_KINDS: dict[str, tuple[str, type[Body]]] = {
    "messages": (CHAT, ChatBody),
    "prompt": (COMPLETIONS, CompletionBody),
    "input": (EMBEDDINGS, EmbeddingBody),
    "text_1": ("/score", ScoreBody),
    "query": ("/rerank", RerankBody),
}


def routes(service: Service, endpoints: Mapping[str, Callable[..., Any]]) -> APIRouter:
    """Return the endpoint.

    Args:
        endpoints: path -> what answers there.
    """
    router = APIRouter()

    @router.post("/invocations")
    async def invocations(body: dict[str, Any], request: Request) -> Response:
        path, kind = next((found for name, found in _KINDS.items() if name in body), (None, None))
        if path is None or kind is None:
            raise APIError(f"The body has none of {', '.join(_KINDS)}: nobody knows what it asks for.", param="body")
        if path == EMBEDDINGS and service.classifies:
            path, kind = "/classify", ClassifyBody
        given = {"body": await beside(request, kind.read, body), "request": request}
        answer = endpoints[path]
        return await answer(**{name: given[name] for name in inspect.signature(answer).parameters})

    return router
