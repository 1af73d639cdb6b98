"""The server as an ASGI application."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import jaxllm
from jaxllm.async_llm import AsyncLLM
from jaxllm.entrypoints.openai.bodies import refusal
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.serve import control, generation, invocations, page, pooling, tokens
from jaxllm.entrypoints.serve.clients import ClientGone
from jaxllm.entrypoints.serve.guard import Guard
from jaxllm.entrypoints.serve.json_answers import error_answer
from jaxllm.entrypoints.serve.service import Service
from jaxllm.entrypoints.serve.settings import Settings

#: nginx's status of a request whose client has gone away: it is for the log alone
CLIENT_GONE = 499


def make_app(engine: AsyncLLM, settings: Settings) -> FastAPI:
    """Return the application; the engine is the caller's to shut down."""
    # its pages of documentation would load scripts from elsewhere
    app = FastAPI(title="jaxllm", version=jaxllm.__version__, docs_url=None, redoc_url=None)
    service = Service(engine, settings)
    modules = (generation, pooling, tokens, control, page)
    routers = [module.routes(service) for module in modules]
    found = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    routers.append(invocations.routes(service, {route.path: route.endpoint for route in found}))
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(APIError, _told)
    app.add_exception_handler(RequestValidationError, _told)
    app.add_exception_handler(HTTPException, _told)
    app.add_exception_handler(ClientGone, _told)
    app.add_exception_handler(Exception, _told)
    app.add_middleware(
        Guard,
        api_keys=settings.api_keys,
        max_body=settings.max_body,
        allowed_hosts=settings.allowed_hosts,
        allowed_origins=settings.allowed_origins,
    )
    if settings.allowed_origins:
        # the outermost: browsers ask it, without a key, what they may send
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


async def _told(request: Request, error: Exception) -> Response:
    """Return what the client gets of an error: OpenAI's object."""
    if isinstance(error, ClientGone):
        return Response(status_code=CLIENT_GONE)
    if isinstance(error, RequestValidationError):
        error = _refusal(error)
    elif isinstance(error, HTTPException):
        error = APIError(str(error.detail), status=error.status_code)
    elif not isinstance(error, APIError):
        # the log has the rest, which may be nobody's business
        error = APIError("The server failed on this request; its log says more.", status=500)
    return error_answer(error)


def _refusal(error: RequestValidationError) -> APIError:
    errors = list(error.errors())
    if errors and errors[0]["type"] == "json_invalid":
        return APIError(f"The body is not JSON: {errors[0].get('ctx', {}).get('error', '')}", param="body")
    if errors and isinstance(errors[0].get("input"), bytes):
        return APIError("The body is not JSON: send it with Content-Type: application/json.", param="body")
    # places begin with what part of the request it is
    return refusal([{**one, "loc": one["loc"][1:]} for one in errors])
