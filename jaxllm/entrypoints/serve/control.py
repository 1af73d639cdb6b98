"""The endpoints that tell of the server and change its state."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import PlainTextResponse, Response

import jaxllm
from jaxllm.entrypoints.openai.bodies import LoadAdapterBody, UnloadAdapterBody
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.serve import inspection
from jaxllm.entrypoints.serve.json_answers import JSONAnswer
from jaxllm.entrypoints.serve.service import Service


def routes(service: Service) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()
    engine = service.engine
    registry = engine.engine.watching.prometheus_registry()
    created = int(time.time())
    admin = [Depends(_refuse_users)] if not service.settings.admin_endpoints else []

    def model(name: str) -> dict[str, Any]:
        adapter = service.adapters.get(name)
        root, parent = str(engine.engine.args.model), None
        if adapter is not None:
            root, parent = adapter.path, service.settings.model_names[0]
        own = {"id": name, "object": "model", "created": created, "owned_by": "jaxllm", "root": root, "parent": parent}
        return {**own, "max_model_len": engine.engine.core.config.max_model_len}

    def names() -> list[str]:
        return [*service.settings.model_names, *service.adapters]

    @router.get("/v1/models")
    async def models() -> Response:
        return JSONAnswer({"object": "list", "data": [model(name) for name in names()]})

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name not in names():
            raise APIError(f"The model `{name:.80}` does not exist.", status=404, param="model")
        return JSONAnswer(model(name))

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    @router.get("/ping")
    @router.post("/ping")
    async def health() -> Response:
        if not engine.is_running:
            raise APIError("The engine has ended.", status=503)
        return Response()

    @router.get("/version")
    async def version() -> Response:
        return JSONAnswer({"version": jaxllm.__version__})

    @router.get("/load")
    async def load() -> Response:
        return JSONAnswer({"server_load": service.load.calls})

    @router.get("/metrics")
    async def metrics() -> Response:
        with service.told():
            return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.post("/sleep", dependencies=admin)
    async def sleep(level: int = 1, mode: str = "abort") -> Response:
        with service.told():
            await engine.sleep(level, mode)
        return Response()

    @router.post("/wake_up", dependencies=admin)
    async def wake_up(tags: Annotated[list[str] | None, Query()] = None) -> Response:
        with service.told():
            await engine.wake_up(tags)
        return Response()

    @router.get("/is_sleeping")
    async def is_sleeping() -> Response:
        with service.told():
            return JSONAnswer({"is_sleeping": await engine.is_sleeping()})

    @router.post("/reset_prefix_cache", dependencies=admin)
    async def reset_prefix_cache(reset_running_requests: bool = False, reset_external: bool = False) -> Response:
        with service.told():
            if not await engine.reset_prefix_cache(reset_running_requests, reset_external):
                raise APIError("Requests run, and hold blocks: try again, or reset_running_requests=true.", status=409)
        return JSONAnswer({"success": True})

    router.include_router(inspection.routes(service, admin))

    @router.post("/v1/load_lora_adapter", dependencies=admin)
    async def load_adapter(body: LoadAdapterBody) -> Response:
        with service.told():
            load = functools.partial(service.adapters.load, in_place=bool(body.load_inplace))
            await asyncio.to_thread(load, body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", dependencies=admin)
    async def unload_adapter(body: UnloadAdapterBody) -> Response:
        with service.told():
            found = await asyncio.to_thread(service.adapters.unload, body.lora_name, body.lora_int_id)
        if not found:
            raise APIError(f"The lora adapter {body.lora_name!r:.80} cannot be found.", status=404, param="lora_name")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _refuse_users(request: Request) -> None:
    """One client could stop all others."""
    raise APIError(f"{request.url.path} is answered by a server with --enable-admin-endpoints.", status=403)
