"""The endpoints that generate: ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/responses``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxllm.entrypoints.openai.bodies import MAX_REQUEST_ID, Body, ChatBody, CompletionBody, ResponsesBody
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.openai.items import RESPONSES, ResponseItems, chat_body
from jaxllm.entrypoints.openai.pieces import AnswerPieces
from jaxllm.entrypoints.openai.requests import CHAT, COMPLETIONS, Call
from jaxllm.entrypoints.serve.clients import while_there
from jaxllm.entrypoints.serve.json_answers import DONE, EventStream, JSONAnswer, event
from jaxllm.entrypoints.serve.large_bodies import LargeBodies, beside
from jaxllm.entrypoints.serve.service import Placed, Service, whole_answer


def routes(service: Service) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(route_class=LargeBodies)

    @router.post(CHAT)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await _answer(service, CHAT, body, request)

    @router.post(COMPLETIONS)
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await _answer(service, COMPLETIONS, body, request)

    @router.post(RESPONSES)
    async def responses(body: ResponsesBody, request: Request) -> Response:
        call = await beside(request, lambda: service.translator.translate(CHAT, chat_body(body)))
        items = ResponseItems(body, call)
        if not call.stream:
            (output,) = await while_there(request, service.whole(call))
            return JSONAnswer(items.whole(output))
        outputs = service.outputs(call)
        first = await while_there(request, anext(outputs))
        return EventStream(_item_events(items, first, outputs))

    return router


async def _answer(service: Service, url: str, body: Body, request: Request) -> Response:
    call = await beside(request, service.translator.translate, url, body)
    if given := request.headers.get("x-request-id"):
        if len(given) > MAX_REQUEST_ID:
            raise APIError(f"X-Request-Id has more than {MAX_REQUEST_ID} characters: {given!r:.80}")
        call = dataclasses.replace(call, request_id=given)
    if not call.stream:
        outputs = await while_there(request, service.whole(call))
        return await whole_answer(call, outputs)
    outputs = service.outputs(call)
    # whatever is refused is refused before the stream begins
    first = await while_there(request, anext(outputs))
    return EventStream(_events(call, first, outputs))


async def _events(call: Call, first: Placed, outputs: AsyncGenerator[Placed, None]) -> AsyncGenerator[bytes, None]:
    pieces = AnswerPieces(call)
    async with contextlib.aclosing(outputs):
        try:
            for piece in pieces.take(*first):
                yield event(piece)
            async for placed in outputs:
                for piece in pieces.take(*placed):
                    yield event(piece)
        except APIError as error:
            yield event(error.body())
        else:
            last: dict[str, Any] | None = pieces.last()
            if last is not None:
                yield event(last)
        yield DONE


async def _item_events(
    items: ResponseItems, first: Placed, outputs: AsyncGenerator[Placed, None]
) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(outputs):
        try:
            for made in (*items.begin(), *items.take(first[1])):
                yield event(made, made["type"])
            async for _, output in outputs:
                for made in items.take(output):
                    yield event(made, made["type"])
        except APIError as error:
            told = {"type": "error", "code": str(error.code or error.status), "message": error.message, "param": None}
            yield event(told, "error")
